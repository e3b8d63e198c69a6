"""Each cell of docs/support.md, and that the page is what its generator writes."""

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor

import trifast_inductor
from trifast_inductor.kernels.triangle_attention import op, reference
from trifast_inductor.rewrite import rewrite_all
from trifast_inductor.testing import Inputs, assert_within_budget, random_inputs

from . import support
from .support import CASES, MODES, TOO_LARGE, Case

CHECKOUT = Path(__file__).parents[2]


def in_torch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """`[B, R, I, H, D]`, spelled so that it is recognised."""
    logits = scale * torch.einsum("brihd,brjhd->brhij", q, k) + bias[:, None]
    return torch.einsum("brhij,brjhd->brihd", logits.softmax(-1), v)


def results(attention, x: Inputs, training: bool) -> list[Tensor]:
    leaves = [t.detach().requires_grad_(training) for t in (x.q, x.k, x.v, x.bias)]
    out = attention(*leaves, x.scale)
    return [out.detach(), *(torch.autograd.grad(out, leaves, x.grad_out) if training else ())]


def by_name(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    return op.triangle_attention(q, k, v, bias, None, None, scale, 0.0, False)[0]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[pytest.mark.gpu] * (case.device == "cuda")) for case in CASES]
)
def test_each_cell(case: Case) -> None:
    if case.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch._dynamo.reset()
    x = random_inputs(B=2, R=3, I=5, J=5, H=2, D=case.D, dtype=case.dtype, device=case.device)
    kind, mode = case.call.split(", ")
    rewritten = []

    def run_by_torch(gm, inputs):
        rewritten.extend(row for row in rewrite_all(gm) if row.rewritten)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    attention = torch.compile(in_torch, backend=run_by_torch) if kind == "compiled" else by_name
    with torch.set_grad_enabled(mode == "training"):
        actual = results(attention, x, mode == "training")
        eager = results(in_torch, x, mode == "training")
        exact = results(in_torch, x.to(torch.float64), mode == "training")
    assert len(rewritten) == (kind == "compiled")
    for index, (a, b, c) in enumerate(zip(actual, eager, exact, strict=True)):
        # So few elements that eager may be lucky: a few roundings of the largest one are allowed in any case.
        floor = 4 * torch.finfo(case.dtype).eps if case.dtype != torch.float64 else 1e-14
        assert_within_budget(a, b, c, name=f"result {index}", floor=floor)


def test_larger_heads_are_declined_and_heads_of_one_channel_left_alone() -> None:
    torch._dynamo.reset()
    x = random_inputs(B=2, R=3, I=5, J=5, H=2, D=1)
    assert trifast_inductor.explain(in_torch, x.q, x.k, x.v, x.bias, x.scale).rewritten == 0
    torch._dynamo.reset()
    x = random_inputs(B=2, R=3, I=5, J=5, H=2, D=TOO_LARGE)
    (row,) = trifast_inductor.explain(in_torch, x.q, x.k, x.v, x.bias, x.scale).rows
    assert (row.rewritten, row.reason) == (False, "head-size")


@pytest.mark.parametrize(("mode", "cpu", "cuda"), MODES, ids=[mode for mode, *_ in MODES])
def test_each_mode_names_tests_that_exist(mode: str, cpu: str, cuda: str) -> None:
    for test in filter(None, (cpu, cuda)):
        file, *names = test.split("::")
        body = ast.parse((CHECKOUT / file).read_text()).body
        for name in names:
            (found,) = (node for node in body if getattr(node, "name", None) == name)
            body = found.body
        assert test != cuda or "gpu" in ast.unparse(found), f"{test} does not run on a GPU"


def test_the_page_is_up_to_date() -> None:
    written = support.PAGE.read_text(encoding="utf-8")
    assert written == support.render(), "run python -m tests.docs.support"


def test_the_reference_agrees_with_the_spelling_here() -> None:
    x = random_inputs(B=2, R=3, I=5, J=5, H=2, D=8, dtype=torch.float64)
    torch.testing.assert_close(in_torch(x.q, x.k, x.v, x.bias, x.scale), reference.forward(*x.op)[0])
