"""The forward kernel against the definition."""

from dataclasses import replace

import pytest
import torch

from trifast_inductor.kernels.triangle_attention import reference
from trifast_inductor.testing import assert_within_budget, eager, logits_rounding, random_inputs

pytest.importorskip("triton")
from trifast_inductor.kernels.triangle_attention import arguments, forward


def test_agrees_with_reference(case, device):
    x = case.inputs(device)
    out, row_max, row_sum = forward.launch(*x.op)
    exact = reference.forward(*x.to(torch.float64).op)
    assert out.is_contiguous()
    assert out.dtype == x.q.dtype
    assert row_max.dtype == row_sum.dtype == torch.float32
    floor = logits_rounding(x) * x.v.abs().max().item()
    assert_within_budget(out, eager(*x.op), exact[0], name="out", floor=floor)
    # Both are float32 whatever q is: the measure is the definition in float32.
    in_float32 = reference.forward(*x.to(torch.float32).op)
    rounding = logits_rounding(x)
    assert_within_budget(row_max, in_float32[1], exact[1], name="row_max", floor=rounding)
    floor = rounding * exact[2].max().item()
    assert_within_budget(row_sum, in_float32[2], exact[2], name="row_sum", floor=floor)


@pytest.mark.parametrize("key_term_first", [False, True])
@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, -1e9, float("-inf")])
@pytest.mark.parametrize("J", [16, 17])
def test_wholly_masked_row_is_uniform_or_nan(device, J, fill, key_term_first):
    x = random_inputs(R=3, I=5, J=J, D=8, device=device, key_term="mask", key_term_first=key_term_first)
    x.key_mask[0, 1] = True
    x = replace(x, fill=fill)
    out, row_max, row_sum = forward.launch(*x.op)
    # In float32: at a fill of -1e9 with the bias after it, float64 keeps a bias that float32 rounds away.
    expected = reference.forward(*x.op)
    torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(row_max, expected[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(row_sum, expected[2], rtol=1e-5, atol=0)
    if fill == float("-inf"):
        assert out[0, 1].isnan().all()
        assert (row_sum[0, 1] == 0).all()
    elif not (key_term_first and fill == -1e9):
        mean = x.v[0, 1].mean(0).expand_as(out[0, 1])
        torch.testing.assert_close(out[0, 1], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("amount", [-1e9, float("-inf")])
@pytest.mark.parametrize("key_term_first", [False, True])
def test_wholly_left_out_row_with_additive_term(device, key_term_first, amount):
    x = random_inputs(R=3, I=5, J=17, D=8, device=device, key_term="additive", key_term_first=key_term_first)
    x.key_bias[x.key_bias != 0] = amount
    x.key_bias[0, 1] = amount
    out, _, _ = forward.launch(*x.op)
    torch.testing.assert_close(out, reference.forward(*x.op)[0], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("first_tile", ["masked", "kept"])
def test_maximum_that_comes_late(device, first_tile):
    """Keys of one tile at -inf or the lowest float, and the true maximum in another."""
    for fill in (float("-inf"), torch.finfo(torch.float32).min):
        x = random_inputs(R=2, I=4, J=80, D=8, device=device, key_term="mask")
        x.key_mask[:] = False
        x.key_mask[..., : 64 if first_tile == "masked" else 0] = True
        x.key_mask[..., 64 if first_tile == "kept" else 80 :] = True
        x = replace(x, fill=fill)
        out, _, _ = forward.launch(*x.op)
        torch.testing.assert_close(out, reference.forward(*x.op)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sharp_softmax(device, dtype):
    x = random_inputs(R=2, I=33, J=33, D=16, dtype=dtype, device=device, sharpness=30.0)
    out, _, _ = forward.launch(*x.op)
    # Logits of 100: their last bit, which three tf32 products leave out, is 1e-5 of a weight.
    floor = logits_rounding(x) * x.v.abs().max().item()
    assert_within_budget(out, eager(*x.op), reference.forward(*x.to(torch.float64).op)[0], floor=floor)


def test_bias_and_key_term_of_other_dtypes(device):
    x = random_inputs(R=2, I=9, J=17, D=16, dtype=torch.bfloat16, device=device, key_term="additive")
    mixed = replace(x, bias=x.bias.float() * 1.001, key_bias=x.key_bias.double())
    out, _, _ = forward.launch(*mixed.op)
    assert_within_budget(out, eager(*mixed.op), reference.forward(*mixed.to(torch.float64).op)[0])


def test_more_rows_than_a_group_of_programs_holds(device):
    x = random_inputs(R=35, I=130, J=3, H=1, D=8, device=device)
    out, _, _ = forward.launch(*x.op)
    torch.testing.assert_close(out, reference.forward(*x.op)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", ["B", "R", "I", "J", "H"])
def test_empty(device, axis):
    sizes = {"B": 2, "R": 3, "I": 4, "J": 5, "H": 2, axis: 0}
    x = random_inputs(**sizes, D=8, device=device, key_term="mask")
    out, row_max, row_sum = forward.launch(*x.op)
    assert out.shape == x.q.shape
    assert row_max.shape == row_sum.shape == (sizes["B"], sizes["R"], sizes["H"], sizes["I"])
    assert (out == 0).all()
    assert (row_sum == 0).all()
    assert (row_max == float("-inf")).all()


@pytest.mark.gpu
@pytest.mark.parametrize("D", [32, 64, 128])
def test_float32_follows_the_precision_of_torch(device, D):
    x = random_inputs(I=100, J=100, D=D, device=device, sharpness=3.0)
    before = torch.backends.cuda.matmul.fp32_precision
    exact = reference.forward(*x.to(torch.float64).op)[0]
    errors = {}
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            out, _, _ = forward.launch(*x.op)
            # Triton cuts a float32 off where cuBLAS rounds it to tf32: twice the error of one operand.
            assert_within_budget(out, eager(*x.op), exact, name=precision, times=3.0)
            errors[precision] = (out - exact).abs().max()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["tf32"] > 10 * errors["ieee"]


@pytest.mark.gpu
@pytest.mark.parametrize(("D", "made_of"), [(32, "3xtf32"), (64, "3xtf32"), (65, "ieee"), (128, "ieee")])
def test_float32_products_on_tensor_cores(device, D, made_of):
    """Three tf32 products stay as near to float64 as eager's float32, over a sum long enough to drift."""
    assert arguments.dot_precision(torch.float32, D) == made_of
    x = random_inputs(R=4, I=64, J=768, D=D, device=device)
    out, _, _ = forward.launch(*x.op)
    assert_within_budget(out, eager(*x.op), reference.forward(*x.to(torch.float64).op)[0])


@pytest.mark.gpu
def test_offsets_past_2_to_the_31(far_inputs, near_inputs):
    assert torch.equal(forward.launch(*far_inputs.op)[0], forward.launch(*near_inputs.op)[0])
