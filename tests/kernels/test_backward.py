"""The backward kernels against the definition."""

from dataclasses import replace

import pytest
import torch

from trifast_inductor.kernels.triangle_attention import reference
from trifast_inductor.testing import (
    KEY_TERMS,
    Inputs,
    assert_within_budget,
    eager,
    logits_rounding,
    random_inputs,
    results,
)

pytest.importorskip("triton")
from trifast_inductor.kernels.triangle_attention import backward, forward
from trifast_inductor.kernels.triangle_attention.hopper import whole_choice
from trifast_inductor.kernels.triangle_attention.portable import whole

NAMES = ("dq", "dk", "dv", "dbias")


def gradients(x: Inputs, needs_dbias: bool = True) -> tuple[torch.Tensor, ...]:
    saved = forward.launch(*x.op)
    return backward.launch(x.grad_out, *x.op[:6], *saved, *x.op[6:], needs_dbias)


def cancellation(x: Inputs) -> float:
    """What is left of dp - δ where they are equal: a few float32 roundings, as they are summed apart."""
    terms = torch.einsum("brihd,brjhd->brhij", x.grad_out.double().abs(), x.v.double().abs())
    return torch.finfo(torch.float32).eps * terms.max().item()


def assert_gradients_within_budget(x: Inputs, times: float = 2.0) -> tuple[torch.Tensor, ...]:
    exact = reference.backward(x.grad_out.double(), *x.to(torch.float64).op)
    ds = cancellation(x)
    cancelled = (
        ds * x.scale * x.k.abs().max().item(),
        ds * x.scale * x.q.abs().max().item(),
        0.0,
        ds * x.q.shape[1],
    )
    in_eager = [t for name, t in results(eager, x).items() if name != "out"]
    found = gradients(x)
    for name, actual, rounded, right, left in zip(NAMES, found, in_eager, exact, cancelled, strict=False):
        assert actual.is_contiguous()
        floor = left + logits_rounding(x) * right.abs().nan_to_num(0.0).max().item()
        assert_within_budget(actual, rounded, right, name=name, times=times, floor=floor)
    return found


def test_agrees_with_reference(case, device):
    x = case.inputs(device)
    dq, dk, dv, dbias = assert_gradients_within_budget(x)
    assert (dq.shape, dk.shape, dv.shape) == (x.q.shape, x.k.shape, x.v.shape)
    assert dq.dtype == dk.dtype == dv.dtype == x.q.dtype
    assert dbias.shape == (x.bias.shape if x.bias is not None else (0,))


@pytest.mark.parametrize("key_term_first", [False, True])
@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, -1e9, float("-inf")])
@pytest.mark.parametrize("J", [16, 17])
def test_wholly_masked_row(device, J, fill, key_term_first):
    """A finite fill leaves dv and, where the bias came after it, dbias; -inf gives NaN where eager does."""
    x = random_inputs(R=3, I=5, J=J, D=8, device=device, key_term="mask", key_term_first=key_term_first)
    x.key_mask[0, 1] = True
    x = replace(x, fill=fill)
    actual = gradients(x)
    for name, got, want in zip(NAMES, actual, reference.backward(x.grad_out, *x.op), strict=True):
        torch.testing.assert_close(
            got, want, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert (actual[0][0, 1] == 0).all()
    assert (actual[1][0, 1] == 0).all()


@pytest.mark.parametrize("amount", [-1e9, float("-inf")])
@pytest.mark.parametrize("key_term_first", [False, True])
def test_wholly_left_out_row_with_additive_term(device, key_term_first, amount):
    """The gradient of an added term flows through the logits, of a uniform row as of any other."""
    x = random_inputs(R=3, I=5, J=17, D=8, device=device, key_term="additive", key_term_first=key_term_first)
    x.key_bias[x.key_bias != 0] = amount
    x.key_bias[0, 1] = amount
    for name, got, want in zip(NAMES, gradients(x), reference.backward(x.grad_out, *x.op), strict=True):
        torch.testing.assert_close(
            got, want, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sharp_softmax(device, dtype):
    assert_gradients_within_budget(random_inputs(R=2, I=33, J=33, D=16, dtype=dtype, device=device, sharpness=30.0))


def test_dbias_keeps_the_dtype_of_the_bias(device):
    x = random_inputs(R=2, I=9, J=17, D=16, dtype=torch.bfloat16, device=device)
    x = replace(x, bias=x.bias.float())
    assert assert_gradients_within_budget(x)[3].dtype == torch.float32


def test_dbias_is_left_out_when_not_needed(device):
    x = random_inputs(R=2, I=9, J=9, D=8, device=device)
    *others, dbias = gradients(x, needs_dbias=False)
    assert dbias.shape == (0,)
    for got, want in zip(others, gradients(x), strict=False):
        assert torch.equal(got, want)


def test_two_runs_agree_to_the_bit(device):
    x = random_inputs(R=3, I=40, J=40, D=16, dtype=torch.bfloat16, device=device, key_term="mask")
    for first, second in zip(gradients(x), gradients(x), strict=True):
        assert torch.equal(first, second)


def without_one_pass(monkeypatch):
    """Sequences that kernels for Hopper take in one pass go to the others."""
    for kernel in (whole, whole_choice):
        monkeypatch.setattr(kernel, "LONGEST", 0)


@pytest.fixture
def portable_only(monkeypatch):
    """As where there is no Hopper GPU, for short sequences."""
    without_one_pass(monkeypatch)
    backward._plans.clear()
    yield
    backward._plans.clear()


@pytest.mark.parametrize("key_term_first", [False, True])
@pytest.mark.parametrize("key_term", KEY_TERMS)
@pytest.mark.parametrize(("I", "J"), [(17, 33), (64, 64), (70, 66)])
def test_short_sequences_on_other_gpus(device, portable_only, I, J, key_term, key_term_first):
    given = {"dtype": torch.bfloat16, "key_term": key_term, "key_term_first": key_term_first, "device": device}
    assert_gradients_within_budget(random_inputs(R=3, I=I, J=J, H=2, D=16, **given))


def test_the_last_group_of_rows_adds_dbias_up(device, monkeypatch, portable_only):
    """The same to the bit, whichever program ends last; and what a kernel of its own, in another order, makes of it."""
    on_gpu = torch.device(device).type == "cuda"
    shapes = [{"B": 2, "R": 17, "I": 66, "J": 18, "H": 1}]  # the last tiles and the last group are not full
    if on_gpu:
        shapes += [{"R": 128, "I": 128, "J": 128, "H": 4}, {"R": 192, "I": 192, "J": 192, "H": 2}]
    for shape in shapes:
        x = random_inputs(**shape, D=16, dtype=torch.bfloat16, device=device, key_term="additive")
        backward._plans.clear()
        added_up = [gradients(x) for _ in range(20 if on_gpu else 1)]
        (plan,) = backward._plans.values()
        assert plan.portable.counts_shape is not None
        assert plan.portable.sum is None
        backward._plans.clear()
        with monkeypatch.context() as patched:
            patched.setattr(backward, "fits_counts", lambda count, programs: False)
            expected = gradients(x)
        (plan,) = backward._plans.values()
        assert plan.portable.sum is not None
        backward._plans.clear()
        for actual in added_up:
            for a, b in zip(actual, added_up[0], strict=True):
                assert torch.equal(a, b)
        for a, b in zip(added_up[0], expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("axis", ["B", "R", "I", "J", "H"])
def test_empty(device, axis):
    sizes = {"B": 2, "R": 3, "I": 4, "J": 5, "H": 2, axis: 0}
    x = random_inputs(**sizes, D=8, device=device, key_term="mask")
    for got, of in zip(gradients(x), (x.q, x.k, x.v, x.bias), strict=True):
        assert got.shape == of.shape
        assert (got == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("D", [32, 64, 128])
def test_float32_follows_the_precision_of_torch(device, D):
    x = random_inputs(I=100, J=100, D=D, device=device)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        # Triton cuts a float32 off where cuBLAS rounds it to tf32. Cut products all lean towards 0, so that
        # dp cancels less well against δ, which is summed without tf32: dq was off by 4.4 times as much.
        assert_gradients_within_budget(x, times=6.0)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.gpu
def test_offsets_past_2_to_the_31(far_inputs, near_inputs):
    for name, got, want in zip(NAMES, gradients(far_inputs), gradients(near_inputs), strict=True):
        assert torch.equal(got, want), name


def test_results_of_the_forward_may_lie_anywhere(device):
    """Off a boundary of 16 bytes, and not dense."""
    x = random_inputs(R=3, I=17, J=20, D=16, dtype=torch.bfloat16, device=device)
    saved = forward.launch(*x.op)
    moved = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t) for t in saved]
    moved[1] = saved[1].mT.contiguous().mT
    for a, b in zip(
        *(backward.launch(x.grad_out, *x.op[:6], *s, *x.op[6:], True) for s in (saved, moved)), strict=True
    ):
        assert torch.equal(a, b)
