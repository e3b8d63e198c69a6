"""The lean backward against the definition, where its loops are whole, end early, or meet a key term."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from trifast_inductor.kernels.triangle_attention import reference
from trifast_inductor.testing import KEY_TERMS, Inputs, random_inputs

pytest.importorskip("triton")
from tests.kernels.conftest import LAYOUTS, Case, skip_off_hopper
from tests.kernels.covering import covering_array
from tests.kernels.test_backward import NAMES, assert_gradients_within_budget, gradients, without_one_pass
from trifast_inductor.kernels.triangle_attention import backward, forward
from trifast_inductor.kernels.triangle_attention.hopper import dqkv_choice
from trifast_inductor.kernels.triangle_attention.lean import launch as lean


def take_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that other kernels would get otherwise go to the lean ones, too."""
    without_one_pass(monkeypatch)
    monkeypatch.setattr(dqkv_choice, "SHORTEST", dict.fromkeys(dqkv_choice.SHORTEST, 1))
    monkeypatch.setattr(lean, "FEWEST_LOGITS", 1)
    monkeypatch.setattr(lean, "MOST_PADDED", float("inf"))


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Every size; skips where the kernels cannot run at all."""
    skip_off_hopper(request.getfixturevalue("device"))
    take_any_size(monkeypatch)
    backward._plans.clear()
    yield
    backward._plans.clear()


def refusal(x: Inputs) -> str | None:
    return lean.refusal(x.grad_out, x.q, x.k, x.v, x.bias, x.key_mask, x.fill)


def draw(device: str, **given: object) -> Inputs:
    sizes = {"H": 1, "R": 2, "D": 16, "dtype": torch.bfloat16, "device": device}
    return random_inputs(**{**sizes, **given})


def left_out(x: Inputs, row: slice | int, first: int) -> Inputs:
    """Every key of a row, or of several, from the first on, and none of theirs before it."""
    for term in (x.key_bias, x.key_mask):
        if term is not None:
            term[:, row] = 0
            term[:, row, first:] = -1e9 if term.is_floating_point() else True
    return x


def with_fill(x: Inputs, fill: float) -> Inputs:
    return replace(x, fill=fill) if x.key_mask is not None else x


def moderate(x: Inputs) -> Inputs:
    """A term that weighs keys and leaves none out."""
    return replace(x, key_bias=2 * torch.randn_like(x.key_bias))


def masked_bias(device: str) -> Inputs:
    """Keys left out by the bias alone: huge logits, and no key term that would announce them."""
    x = draw(device, I=65, J=64, R=1)
    x.bias[..., 5, :] = -1e9
    x.bias[..., 40:] = -1e9
    return x


def answered(device: str, **given: object) -> Inputs:
    """A bias that brings back the keys which the term leaves out, for some queries."""
    x = left_out(draw(device, I=64, J=130, **given), slice(None), 60)
    x.bias[..., :20, 100:] = 1e9
    return x


CASES: dict[str, Callable[[str], Inputs]] = {
    "whole blocks": lambda device: draw(device, I=128, J=64, R=1),
    "partial blocks": lambda device: draw(device, I=70, J=130, R=1, dtype=torch.float16),
    "head size 32": lambda device: draw(device, I=64, J=65, D=32, B=2, R=1, H=2),
    "head size 64": lambda device: draw(device, I=65, J=128, D=64, key_term="additive"),
    "head size 64, one row wholly": lambda device: left_out(
        left_out(draw(device, I=64, J=70, D=64, key_term="additive"), 0, 64), 1, 0
    ),
    "no bias": lambda device: draw(device, I=64, J=70, has_bias=False, key_term="additive"),
    "large bias": lambda device: replace(x := draw(device, I=64, J=64), bias=x.bias * 1e4),
    "sharp": lambda device: draw(device, I=64, J=64, sharpness=30.0, key_term="mask"),
    "masked bias": masked_bias,
    "term answered by the bias": lambda device: answered(device, key_term="additive"),
    "fill answered by the bias": lambda device: answered(device, key_term="mask", key_term_first=True),
    "moderate term": lambda device: moderate(draw(device, I=64, J=128, key_term="additive", dtype=torch.float16)),
    "several groups of rows": lambda device: draw(device, I=16, J=64, R=32, key_term="mask"),
    **{
        f"{term}, {name}": lambda device, term=term, change=change: change(draw(device, I=64, J=130, key_term=term))
        for term in ("additive", "mask", "-inf mask")
        for name, change in {
            "at random": lambda x: x,
            "before the bias": lambda x: replace(x, key_term_first=True),
            "padding": lambda x: left_out(x, slice(None), 60),
            "one row wholly": lambda x: left_out(left_out(x, 0, 64), 1, 0),
        }.items()
    },
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_reference(device, name):
    x = CASES[name](device)
    assert refusal(x) is None
    if "-inf" in name and "wholly" in name:
        # NaN where eager has it, and nowhere else.
        for gradient, got, want in zip(NAMES, gradients(x), reference.backward(x.grad_out, *x.op), strict=True):
            torch.testing.assert_close(
                got, want, rtol=0.05, atol=0.05, equal_nan=True, msg=lambda text, name=gradient: f"{name}: {text}"
            )
        return
    assert_gradients_within_budget(x)


AXES = {
    "dtype": ("bfloat16", "float16"),
    "N": (64, 100, 257, 192),
    "longer": (0, 29, -1, 64),
    "D": (16, 32, 64),
    "key_term": KEY_TERMS,
    "key_term_first": (False, True),
    "layout": ("contiguous", "heads first", "ending node", "sliced"),
    "has_bias": (True, False),
}
GRID = [Case(**point, R=5) for point in covering_array(AXES, 2)]


@pytest.mark.gpu
@pytest.mark.parametrize("point", GRID, ids=str)
def test_each_pair_of_choices(device, point):
    x = point.inputs(device)
    assert refusal(x) is None
    assert_gradients_within_budget(x)


@pytest.mark.gpu
@pytest.mark.parametrize("term", KEY_TERMS)
def test_at_full_length(device, term):
    """Groups of rows, many tiles to a loop, rows that are wholly left out behind others that are not."""
    x = draw(device, I=512, J=512, R=90, D=32, key_term=term)
    x = left_out(x, slice(80, None), 0) if term != "-inf mask" else x
    assert_gradients_within_budget(x)
    for first, second in zip(gradients(x), gradients(x), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("layout", "J"), [("heads first", 64), ("ending node", 70), ("sliced", 64), ("expanded", 64)])
def test_strides(device, layout, J):
    x = draw(device, I=64, J=J, H=2, key_term="additive")
    moved = LAYOUTS[layout](x)
    if layout == "expanded":
        moved = replace(moved, grad_out=x.grad_out)  # one element for all is no row that starts on 16 bytes
        x = replace(x, k=moved.k.contiguous(), v=moved.v.contiguous(), key_bias=moved.key_bias.contiguous())
    assert refusal(moved) is None
    for name, got, want in zip(NAMES, gradients(moved), gradients(x), strict=True):
        assert torch.equal(got, want), name


def test_a_query_that_is_not_a_number_spoils_its_own_row_alone(device):
    x = draw(device, I=64, J=64, key_term="additive")
    clean = gradients(x)
    x.q[0, 1, 3] = float("nan")
    dq, dk, dv, dbias = gradients(x)
    assert dq[0, 1, 3].isnan().all()
    assert dbias[0, 0, 3].isnan().all()
    assert dk[0, 1].isnan().any()
    for got, want in zip((dq, dk, dv), clean, strict=False):
        assert torch.equal(got[0, 0], want[0, 0])
    torch.testing.assert_close(dbias[0, 0, 4:], clean[3][0, 0, 4:], rtol=0.02, atol=0.02)


def test_rows_that_are_to_be_zero(device):
    """A maximum of +inf is what `op.py` leaves where rows of nothing but -inf have the output 0."""
    x = left_out(draw(device, I=64, J=64, key_term="-inf mask"), 1, 0)
    out, row_max, row_sum = forward.launch(*x.op)
    out[:, 1], row_max[:, 1], row_sum[:, 1] = 0.0, float("inf"), 1.0
    got = backward.launch(x.grad_out, *x.op[:6], out, row_max, row_sum, *x.op[6:], True)
    alone = replace(x, **{name: getattr(x, name)[:, :1] for name in ("q", "k", "v", "key_mask", "grad_out")})
    for name, gradient, want in zip(NAMES, got, gradients(alone), strict=True):
        if name != "dbias":
            assert (gradient[:, 1] == 0).all(), name
            gradient = gradient[:, :1]
        torch.testing.assert_close(gradient, want, rtol=0.02, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_keep_the_shapes_of_the_operands(device):
    x = draw(device, I=64, J=70, R=1)
    for got, of in zip(gradients(x), (x.q, x.k, x.v, x.bias), strict=True):
        assert (got.shape, got.dtype) == (of.shape, of.dtype)
        assert got.is_contiguous()
    *others, dbias = gradients(x, needs_dbias=False)
    assert dbias.shape == (0,)
    for got, want in zip(others, gradients(x), strict=False):
        assert torch.equal(got, want)


def test_two_runs_agree_to_the_bit(device):
    x = draw(device, I=64, J=130, key_term="additive")
    for first, second in zip(gradients(x), gradients(x), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x: replace(x, q=x.q.float(), k=x.k.float(), v=x.v.float(), bias=x.bias.float()), "16-bit"),
        (lambda x: replace(x, bias=x.bias.float()), "16-bit"),
        (lambda x: random_inputs(I=9, J=9, D=24, dtype=torch.bfloat16), "D=24"),
        (lambda x: replace(x, q=x.q.mT.contiguous().mT), "16 bytes"),
        (lambda x: replace(x, fill=-1e3), "may still be seen"),
        (lambda x: replace(x, fill=float("nan")), "may still be seen"),
    ],
)
def test_refusals_say_why(device, change, why):
    x = change(random_inputs(I=9, J=9, D=16, dtype=torch.bfloat16, key_term="mask"))
    assert why in (refusal(x) or "")


def test_small_calls_are_left_to_the_portable_kernels(device, monkeypatch):
    monkeypatch.undo()
    assert refusal(draw("cpu", I=128, J=512, R=64, H=4)) == "too small"
    assert refusal(draw("cpu", I=192, J=192, R=2, H=4)) == "too small"
    assert refusal(draw("cpu", I=192, J=192, R=192, H=4, key_term="mask")) is None
    assert refusal(draw("cpu", I=127, J=192, R=256, H=8, D=64)) == "too small"
    assert refusal(draw("cpu", I=128, J=128, R=256, H=8, D=64, key_term="mask")) is None
    assert refusal(draw("cpu", I=160, J=160, R=160, H=8, D=64)) == "tiles of 64 do not fit 160 queries by 160 keys"
    assert refusal(draw("cpu", I=200, J=200, R=200, H=4, D=64)) is None
