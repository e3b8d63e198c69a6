"""What stands around the Hopper kernel for dq, dk and dv, with that kernel written in torch: as it reads it."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from trifast_inductor.testing import Inputs, random_inputs

pytest.importorskip("triton")
from tests.kernels.conftest import skip_off_hopper
from tests.kernels.test_backward import assert_gradients_within_budget
from tests.kernels.test_lean_backward import CASES, draw, left_out, take_any_size
from trifast_inductor.kernels.triangle_attention import backward, forward
from trifast_inductor.kernels.triangle_attention.hopper.lists import Lists
from trifast_inductor.kernels.triangle_attention.hopper.query_terms import QueryTerms
from trifast_inductor.kernels.triangle_attention.lean import launch as lean
from trifast_inductor.kernels.triangle_attention.lean.words import Words

LOG2E = math.log2(math.e)


def lists_of(listed: Tensor) -> tuple[list[int], list[int], list[int]]:
    """Heads that are marked and want logits, that are marked and want none, and all others."""
    marked, walked, *places = listed.tolist()
    heads = len(places) // 2
    return places[:walked], places[heads : heads + marked - walked], places[marked:heads][::-1][: heads - marked]


def in_torch(x: Inputs, terms: Tensor, listed: Tensor, gradients: tuple[Tensor, Tensor, Tensor]) -> None:
    """`_triangle_attention_bwd_dqkv_hopper`."""
    B, R, _, H, _ = x.q.shape
    q, k, v, do = (t.float() for t in (x.q, x.k, x.v, x.grad_out))
    logsum, delta = terms[..., None].unbind(-2)
    qk = torch.einsum("brihd,brjhd->brhij", q, k) - logsum / (x.scale * LOG2E)
    key = None if x.key_bias is None else (x.key_bias.float() / x.scale).maximum(torch.tensor(-1e30))
    if x.key_mask is not None:
        key = torch.where(x.key_mask, -1e30, 0.0)
    if key is not None:
        qk += key[:, :, None, None]
    p = torch.exp2(qk * (x.scale * LOG2E) + x.bias.float()[:, None] * LOG2E)
    ds = p * (torch.einsum("brihd,brjhd->brhij", do, v) - delta)
    p, ds = p.to(x.q.dtype).float(), ds.to(x.q.dtype).float()
    gradients[0].copy_(torch.einsum("brhij,brjhd->brihd", ds, k) * x.scale)
    gradients[1].copy_(torch.einsum("brhij,brihd->brjhd", ds, q) * x.scale)
    gradients[2].copy_(torch.einsum("brhij,brihd->brjhd", p, do))
    walked, uniform, others = lists_of(listed)
    assert sorted(walked + uniform + others) == list(range(B * R * H))
    for head in walked + uniform:
        for gradient in gradients:
            gradient[head // (R * H), head // H % R, :, head % H] = math.nan


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[list[Inputs]]:
    """Every call goes to the kernel in torch, for the inputs in this list."""
    skip_off_hopper(request.getfixturevalue("device"))
    inputs: list[Inputs] = []
    take_any_size(monkeypatch)
    monkeypatch.setattr(lean.dqkv_choice, "refusal", lambda *_: None)
    monkeypatch.setattr(lean.dbias_choice, "refusal", lambda *_: "not tested here")
    monkeypatch.setattr(lean.hopper, "multiprocessors", lambda _: 2)  # far fewer programs than blocks
    monkeypatch.setattr(lean.hopper, "attempt", lambda run, *given: run(*given))
    monkeypatch.setattr(lean, "_planned_dqkv", lambda *_: lambda *given: in_torch(inputs[0], *given[6:]) or True)
    backward._plans.clear()
    yield inputs
    backward._plans.clear()


@pytest.mark.parametrize("of", [name for name in CASES if name != "no bias"])
def test_special_rows_and_tiles(device, around, of):
    x = CASES[of](device)
    around.append(x)
    assert_gradients_within_budget(x)


def test_only_what_is_marked_is_done_after(device, around, monkeypatch):
    """Zeros from the kernel stay, but in the two heads of a row that is wholly left out and in that of a far query."""
    x = left_out(draw(device, R=4, H=2, I=70, J=66, key_term="additive"), 2, 0)
    x.bias[0, 1, 3] -= 20000.0
    monkeypatch.setattr(lean, "_planned_dqkv", lambda *_: lambda *given: bool([t.zero_() for t in given[-1]]))
    dq, dk, dv, _ = backward.launch(x.grad_out, *x.op[:6], *forward.launch(*x.op), *x.op[6:], False)
    for gradient in (dq, dk, dv):
        done = (gradient != 0).any(-1).any(2)[0]  # [R, H]
        assert done.tolist() == [[False, True], [False, True], [True, True], [False, True]]


@pytest.mark.parametrize("key_term_first", [False, True])
@pytest.mark.parametrize("key_term", ["additive", "mask"])
@pytest.mark.parametrize("seen", [0, 1])
def test_uniform_heads(device, around, monkeypatch, key_term, key_term_first, seen):
    """A row that is wholly left out needs no logits; a row of which one key is seen, or one query is not lost, does."""
    x = left_out(
        draw(device, R=4, H=2, I=70, J=130, key_term=key_term, key_term_first=key_term_first), slice(1, 3), seen
    )
    x.bias[0, 1, 3, :60] = 1e8
    around.append(x)
    listed: list[Tensor] = []
    monkeypatch.setattr(
        lean,
        "_planned_dqkv",
        lambda *_: lambda *given: bool(listed.append(given[-2])) or in_torch(x, *given[6:]) or True,
    )
    assert_gradients_within_budget(x)
    _, uniform, _ = lists_of(listed[0])
    # The bias of the second head brings one query back, but not from the fill, which is the least float32.
    expected = [2, 4] if key_term == "additive" else [2, 3, 4, 5]
    assert uniform == ([] if seen else expected)


@pytest.mark.parametrize("share", [0, 0.1, 1])
def test_list_of_heads(device, share):
    """More heads than are looked at together; each is listed once, in order."""
    huge = (torch.rand((1250, 2, 3), device=device) < share).int()
    huge *= torch.randint(1, 3, huge.shape, device=device, dtype=torch.int32)
    spans = torch.zeros((1250, 2), dtype=torch.int32, device=device)
    spans[700, 1] = 1
    key = torch.zeros((1, 1250, 5), device=device)
    listed = Lists(1, 1250, 2, 130, 5, key, 1.0, tiled=False)(huge, spans, None, key).marked
    is_marked = ((huge.sum(-1) > 0) | (spans[:, 1:] > 0)).flatten().cpu()
    is_uniform = (huge == 2).all(-1).flatten().cpu()
    walked, uniform, others = lists_of(listed)
    assert walked == (is_marked & ~is_uniform).nonzero()[:, 0].tolist()
    assert uniform == is_uniform.nonzero()[:, 0].tolist()
    assert others == (~is_marked).nonzero()[:, 0].tolist()


def test_terms_of_queries(device):
    x = random_inputs(B=2, R=3, I=70, J=66, H=2, D=16, dtype=torch.bfloat16, device=device)
    x.bias[1, 0, 65] += 20000.0
    out, row_max, row_sum = forward.launch(*x.op)
    left = torch.empty((*row_max.shape, 2), device=device), torch.empty((2, 3, 2, 2), device=device).int()
    words, *_ = QueryTerms(x.grad_out, x.bias, tiled=False)(x.bias, x.grad_out, out, row_max, row_sum, left)
    for made, expected in zip(words, Words(x.bias)(x.bias), strict=True):
        assert torch.equal(made, expected)
    logsum = row_max.double() * LOG2E + row_sum.double().log2()
    delta = (out.double() * x.grad_out.double()).sum(-1).transpose(2, 3)
    terms, huge = left
    torch.testing.assert_close(terms.double(), torch.stack((logsum, delta), -1), rtol=1e-6, atol=1e-5)
    assert huge[1, :, 0].tolist() == [[0, 1]] * 3
    assert huge.sum() == 3
