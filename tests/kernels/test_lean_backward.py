"""The lean backward against the definition, where its loops are whole, end early, or meet a key term."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from trifast_inductor.testing import Inputs, random_inputs

pytest.importorskip("triton")
from tests.kernels.test_backward import assert_gradients_within_budget, gradients
from trifast_inductor.kernels.triangle_attention import backward
from trifast_inductor.kernels.triangle_attention.lean import launch as lean


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch, device: str) -> Iterator[None]:
    """Sizes that the portable kernels would get otherwise; skips where the kernels cannot run at all."""
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setattr(lean, "SHORTEST", 1)
    monkeypatch.setattr(lean, "FEWEST_PROGRAMS", 1)
    backward._plans.clear()
    yield
    backward._plans.clear()


def draw(device: str, **given: object) -> Inputs:
    sizes = {"H": 2, "R": 2, "D": 16, "dtype": torch.bfloat16, "device": device}
    x = random_inputs(**{**sizes, **given})
    assert lean.refusal(x.q, x.k, x.v, x.bias, x.grad_out) is None
    return x


def left_out(x: Inputs, **where: slice | int) -> Inputs:
    """The keys from `kept` on, of row `row` or of all."""
    row, kept = where.get("row", slice(None)), where.get("kept", 0)
    for term in (x.key_bias, x.key_mask):
        if term is not None:
            term[:, row, kept:] = -1e9 if term.is_floating_point() else True
    return x


def with_a_masked_bias(device: str) -> Inputs:
    """Keys left out by the bias alone: huge logits, and no key term that would announce them."""
    x = draw(device, I=65, J=64, R=1)
    x.bias[..., 5, :] = -1e9
    x.bias[..., 40:] = -1e9
    return x


CASES: dict[str, Callable[[str], Inputs]] = {
    "whole blocks": lambda device: draw(device, I=128, J=64, R=1),
    "partial blocks": lambda device: draw(device, I=70, J=130, R=1, dtype=torch.float16),
    "head size 32": lambda device: draw(device, I=64, J=65, D=32, B=2, H=1),
    "no bias": lambda device: draw(device, I=64, J=70, has_bias=False),
    "large bias": lambda device: replace(x := draw(device, I=64, J=64), bias=x.bias * 1e4),
    "masked bias": with_a_masked_bias,
    "several groups of rows": lambda device: draw(device, I=16, J=64, R=32, H=1),
    **{
        f"{term}, {name}": lambda device, term=term, change=change: change(draw(device, I=64, J=130, key_term=term))
        for term in ("additive", "mask", "-inf mask")
        for name, change in {
            "at random": lambda x: replace(x, key_term_first=True),
            "padding": lambda x: left_out(x, kept=60),
            "a row wholly": lambda x: left_out(left_out(x, kept=64), row=1),
        }.items()
    },
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_reference(device, name):
    assert_gradients_within_budget(CASES[name](device))


def test_gradients_keep_the_shapes_of_the_operands(device):
    x = draw(device, I=64, J=70, R=1)
    for got, of in zip(gradients(x), (x.q, x.k, x.v, x.bias), strict=True):
        assert (got.shape, got.dtype) == (of.shape, of.dtype)
        assert got.is_contiguous()
    assert gradients(x, needs_dbias=False)[3].shape == (0,)


def test_two_runs_agree_to_the_bit(device):
    x = draw(device, I=64, J=130, key_term="additive")
    for first, second in zip(gradients(x), gradients(x), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x: replace(x, q=x.q.float(), k=x.k.float(), v=x.v.float(), bias=x.bias.float()), "16-bit"),
        (lambda x: replace(x, bias=x.bias.float()), "16-bit"),
        (lambda x: random_inputs(I=9, J=9, D=24, dtype=torch.bfloat16), "head size"),
        (lambda x: replace(x, q=x.q.mT.contiguous().mT), "16 bytes"),
    ],
)
def test_refusals_say_why(device, change, why):
    x = change(random_inputs(I=9, J=9, D=16, dtype=torch.bfloat16))
    refusal = lean.refusal(x.q, x.k, x.v, x.bias, x.grad_out)
    assert refusal is not None
    assert why in refusal
