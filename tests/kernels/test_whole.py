"""The backward of short sequences in one pass: which calls it takes, and its gradients against the definition."""

from dataclasses import replace

import pytest
import torch

from trifast_inductor.testing import KEY_TERMS, random_inputs

pytest.importorskip("triton")
from tests.kernels.conftest import skip_off_hopper
from tests.kernels.test_backward import assert_gradients_within_budget, gradients
from trifast_inductor.kernels.triangle_attention import backward, launching, sums
from trifast_inductor.kernels.triangle_attention.portable import whole


@pytest.fixture(autouse=True)
def hopper(device):
    skip_off_hopper(device)
    backward._plans.clear()
    yield
    backward._plans.clear()


def inputs(device, **options):
    given = {"R": 3, "I": 17, "J": 17, "H": 2, "D": 16, "dtype": torch.bfloat16, "device": device, **options}
    return random_inputs(**given)


def refusal(x):
    return whole.refusal(x.grad_out, x.q, x.k, x.v, x.bias)


def assert_taken():
    assert all(isinstance(plan.elsewhere, whole.Plan) for plan in backward._plans.values())


@pytest.mark.parametrize("key_term_first", [False, True])
@pytest.mark.parametrize("key_term", KEY_TERMS)
@pytest.mark.parametrize(
    ("I", "J", "D", "has_bias"),
    [(1, 5, 8, True), (32, 32, 32, False), (33, 17, 24, True), (64, 64, 16, True), (57, 64, 32, True)],
)
def test_agrees_with_reference(device, I, J, D, has_bias, key_term, key_term_first):
    given = {"has_bias": has_bias, "key_term": key_term, "key_term_first": key_term_first and has_bias}
    assert_gradients_within_budget(inputs(device, I=I, J=J, D=D, **given))
    assert_taken()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_are_summed_over_programs(device, monkeypatch, dtype):
    """Whatever the number of multiprocessors, of which a program each takes some rows, the last one fewer."""
    x = inputs(device, B=2, R=11, I=20, J=12, dtype=dtype, key_term="mask")
    for rows in (1, 4, 11):
        monkeypatch.setattr(whole, "rows_of_a_program", lambda *_, rows=rows: rows)
        backward._plans.clear()
        assert_gradients_within_budget(x)
        assert_taken()


@pytest.mark.parametrize("groups", [1, 8, 19])
def test_parts_that_lie_tile_by_tile_are_summed_in_rows(device, groups):
    """As `hopper/whole.py` leaves them, whose tiles go past the end of the sum."""
    heads, I, J = 3, 70, 130
    parts = torch.randn(groups, heads, 3, 2, 64, 64, device=device)
    found = torch.empty(heads, I, J, dtype=torch.bfloat16, device=device)
    sums.sum_of_tiles(heads, I, J, groups)(parts, found)
    whole_tiles = parts.double().sum(0).permute(0, 2, 3, 1, 4).reshape(heads, 128, 192)
    torch.testing.assert_close(found, whole_tiles[:, :I, :J].to(found.dtype), rtol=2**-7, atol=1e-5)


def test_without_dbias_the_same_gradients(device):
    x = inputs(device, I=40, J=40)
    *others, dbias = gradients(x, needs_dbias=False)
    assert dbias.shape == (0,)
    for got, want in zip(others, gradients(x), strict=False):
        assert torch.equal(got, want)
    assert_taken()


def test_two_runs_agree_to_the_bit(device):
    x = inputs(device, R=9, I=50, J=60, key_term="additive")
    for first, second in zip(gradients(x), gradients(x), strict=True):
        assert torch.equal(first, second)


def test_what_it_does_not_serve(device, monkeypatch):
    x = inputs(device)
    assert refusal(x) is None
    assert refusal(inputs(device, I=64, J=2)) is None
    assert "longer than 64" in refusal(inputs(device, I=2, J=65))
    assert "16-bit" in refusal(x.to(torch.float32))
    assert "one dtype" in refusal(replace(x, bias=x.bias.float()))
    assert "one dtype" in refusal(replace(x, grad_out=x.grad_out.float()))
    assert "D=64" in refusal(inputs(device, D=64))
    far = torch.empty_strided(x.k.shape, (0, 0, 2**24, 16, 1), dtype=x.k.dtype, device="meta")
    assert "32 bits" in refusal(replace(x, k=far))
    monkeypatch.setattr(launching, "cuda_arch", lambda: 80)
    monkeypatch.setattr(whole.triton.knobs.runtime, "interpret", False)
    assert "Hopper" in refusal(x)


@pytest.mark.parametrize(
    ("R", "heads", "at_once", "rows"),
    [(64, 4, 264, 2), (64, 32, 264, 8), (32, 4, 264, 2), (1, 1, 264, 1), (3, 500, 264, 3)],
)
def test_programs_end_together(R, heads, at_once, rows):
    """H200: a wave of programs, of two rows each at N=64 with four heads."""
    assert whole.rows_of_a_program(R, heads, at_once) == rows
