"""The Hopper forward against the definition; what it compiles to is looked at without a GPU."""

import re
from dataclasses import replace

import pytest
import torch

from trifast_inductor.kernels.triangle_attention import reference
from trifast_inductor.testing import Inputs, assert_within_budget, eager, random_inputs, results

from .conftest import skip_off_hopper
from .gluon_compile import said

pytest.importorskip("triton")
from trifast_inductor.kernels.triangle_attention.hopper import choice

if choice.gluon_refusal() is not None:
    pytest.skip(choice.gluon_refusal(), allow_module_level=True)
from trifast_inductor.kernels.triangle_attention import backward
from trifast_inductor.kernels.triangle_attention.hopper import forward

SHAPES = {
    "two partitions": choice.Shape(BLOCKS=1, NUM_WARPS=8),
    "four partitions": choice.Shape(),
    "one tile a stage": choice.Shape(BLOCKS=1, NUM_WARPS=8, TILES=1, STAGES=6),
    "sums in registers": choice.Shape(BLOCKS=1, NUM_WARPS=8, SUM_BY_PRODUCT=False),
}


@pytest.fixture
def hopper() -> str:
    skip_off_hopper()
    return "cuda"


def fixed_shift(x: Inputs, shape: choice.Shape | None = None):
    """The Gluon kernel alone: NaN in a row sum asks for the block to be computed again."""
    q, k, v, bias, key_bias, key_mask, *_ = x.op
    key = key_bias if key_mask is None else key_mask.view(torch.uint8)
    return forward.Plan(*x.op, shape).fixed_shift(q, k, v, bias, key)[:3]


def launch(x: Inputs, shape: choice.Shape | None = None):
    return forward.Plan(*x.op, shape)(*x.op[:6])


def as_projections(x: Inputs) -> Inputs:
    """q, k, v as heads of a projection `[B, R, N, 3·H·D]`, the bias as one of `[B, I, J, H]`."""

    def wide(t: torch.Tensor) -> torch.Tensor:
        B, R, N, H, D = t.shape
        storage = torch.full((B, R, N, 3 * H * D), float("nan"), dtype=t.dtype, device=t.device)
        return storage[..., H * D : 2 * H * D].view(B, R, N, H, D).copy_(t)

    bias = x.bias.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return replace(x, q=wide(x.q), k=wide(x.k), v=wide(x.v), bias=bias)


def as_ending_node(x: Inputs) -> Inputs:
    """Rows and residues stored the other way round."""

    def swapped(t: torch.Tensor) -> torch.Tensor:
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    return replace(x, q=swapped(x.q), k=swapped(x.k), v=swapped(x.v), bias=x.bias.mT.contiguous().mT)


LAYOUTS = {"projections": as_projections, "ending node": as_ending_node, "contiguous": lambda x: x}


def check(x: Inputs, result: tuple[torch.Tensor, ...]) -> None:
    out, row_max, row_sum = result
    exact = reference.forward(*x.to(torch.float64).op)
    assert_within_budget(out, eager(*x.op), exact[0], name="out")
    # Any shift will do, with a sum to match. Bias over scale is rounded once more, and what is summed are
    # probabilities as they are multiplied with v.
    rounding = torch.finfo(x.q.dtype).eps
    finite = exact[1].isfinite() & (exact[1] > -1e4)
    log_sum, exact_sum = row_max + row_sum.log(), exact[1] + exact[2].log()
    most = rounding * (1 + x.bias[x.bias.isfinite()].abs().max())
    assert ((log_sum - exact_sum)[finite].abs() <= most).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("D", [16, 32, 64])
@pytest.mark.parametrize("key_term", ["none", "additive", "mask", "-inf mask"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_reference(hopper, dtype, D, key_term, layout):
    x = random_inputs(B=2, R=3, I=200, J=333, H=2, D=D, dtype=dtype, device=hopper, key_term=key_term)
    # Without a second look: the kernel itself must do for all these rows.
    check(x, fixed_shift(LAYOUTS[layout](x)))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("I", [1, 129, 300])
@pytest.mark.parametrize("J", [64, 65, 333, 512])
def test_any_shape_and_length(hopper, shape, I, J):
    x = random_inputs(B=1, R=5, I=I, J=J, D=32, dtype=torch.bfloat16, device=hopper, key_term="additive")
    check(x, fixed_shift(x, SHAPES[shape]))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_more_items_than_programs(hopper, shape):
    x = random_inputs(B=2, R=80, I=260, J=200, H=3, dtype=torch.bfloat16, device=hopper, key_term="mask")
    check(x, fixed_shift(x, SHAPES[shape]))


def _later_logits_far_above(x: Inputs) -> Inputs:
    x.bias[..., 2, 150:] += 300.0
    return x


def _left_out(x: Inputs, keys: slice) -> Inputs:
    B, R, J = x.k.shape[:3]
    key_bias = torch.zeros((B, R, J), dtype=x.q.dtype, device=x.q.device)
    key_bias[..., keys] = max(-1e9, torch.finfo(x.q.dtype).min)
    return replace(x, key_bias=key_bias)


def _first_keys_left_out(x: Inputs) -> Inputs:
    """Not a reason to look again: a shift is taken without the key term."""
    return _left_out(x, slice(0, 100))


def _all_keys_left_out(x: Inputs) -> Inputs:
    return _left_out(x, slice(None))


def _first_keys_at_minus_infinity(x: Inputs) -> Inputs:
    x.bias[..., 2, :100] = float("-inf")
    return x


def _all_at_minus_infinity(x: Inputs) -> Inputs:
    x.bias[..., 2, :] = float("-inf")
    return x


def _far_from_zero(x: Inputs) -> Inputs:
    x.bias[..., 2, :] = -20000.0
    return x


def _nan_in_q(x: Inputs) -> Inputs:
    x.q[0, 1, 2] = float("nan")
    return x


def _infinite_bias(x: Inputs) -> Inputs:
    x.bias[..., 2, 180] = float("inf")
    return x


def _infinite_v(x: Inputs) -> Inputs:
    x.v[0, 1, 180] = float("inf")
    return x


# The change, and the rows r and queries i that are computed again.
AGAIN = {
    "later logits far above": (_later_logits_far_above, [0, 1, 2], [2]),
    "first keys left out": (_first_keys_left_out, [], []),
    "all keys left out": (_all_keys_left_out, [0, 1, 2], range(130)),
    "first keys at -inf": (_first_keys_at_minus_infinity, [0, 1, 2], [2]),
    "all at -inf": (_all_at_minus_infinity, [0, 1, 2], [2]),
    "far from zero": (_far_from_zero, [0, 1, 2], [2]),
    "NaN in q": (_nan_in_q, [1], [2]),
    "infinite bias": (_infinite_bias, [0, 1, 2], [2]),
    "infinite v": (_infinite_v, [1], range(130)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("change", AGAIN)
def test_rows_that_need_another_shift(hopper, dtype, shape, change):
    changed, rows, queries = AGAIN[change]
    x = changed(random_inputs(R=3, I=130, J=260, dtype=dtype, device=hopper))
    unsound = fixed_shift(x, SHAPES[shape])[2].isnan()
    expected = torch.zeros_like(unsound)
    for r in rows:
        expected[:, r, :, list(queries)] = True
    assert torch.equal(unsound, expected)
    out, _, row_sum = launch(x, SHAPES[shape])
    in_float32 = reference.forward(*x.to(torch.float32).op)
    torch.testing.assert_close(out.float(), in_float32[0], rtol=2e-2, atol=2e-2, equal_nan=True)
    assert torch.equal(row_sum.isnan(), in_float32[2].isnan())


@pytest.mark.gpu
def test_overflow_of_float16_is_noticed(hopper):
    """At 12 above the shift a probability passes 65504, which bfloat16 has room for."""
    x = random_inputs(R=3, I=130, J=260, dtype=torch.float16, device=hopper)
    x.bias[..., 2, :] = 0.0
    x.bias[..., 2, 150:] = 20.0
    assert fixed_shift(x)[2].isnan()[..., 2].all()
    assert fixed_shift(x.to(torch.bfloat16))[2].isfinite().all()
    check(x, launch(x))


@pytest.mark.gpu
@pytest.mark.parametrize("amount", [-1e9, float("-inf")])
def test_wholly_left_out_rows(hopper, amount):
    x = random_inputs(R=3, I=130, J=260, dtype=torch.bfloat16, device=hopper, key_term="additive")
    key_bias = x.key_bias.float()
    key_bias[key_bias != 0] = amount
    key_bias[0, 1] = amount
    x = replace(x, key_bias=key_bias)
    out, row_max, _ = launch(x)
    expected = reference.forward(*x.to(torch.float32).op)
    torch.testing.assert_close(out.float(), expected[0], rtol=2e-2, atol=2e-2, equal_nan=True)
    torch.testing.assert_close(row_max[0, 1], expected[1][0, 1], rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("left_out", ["none", "last", "first", "some", "all but one", "all"])
@pytest.mark.parametrize("R", [150, 151])
def test_rows_with_no_key_left_are_passed_over(hopper, left_out, R):
    """Several items to a program, of which some, or all but the first, have no row to do; also half an item."""
    x = random_inputs(B=2, R=R, I=130, J=260, H=4, dtype=torch.bfloat16, device=hopper, key_term="mask")
    x.key_mask[..., 3] = False
    rows = torch.zeros(2, R, dtype=torch.bool)
    if left_out == "last":
        rows[:, 130:] = True
    elif left_out == "first":
        rows[:, :21] = True
    elif left_out == "some":
        rows[:] = torch.rand(2, R, generator=torch.Generator().manual_seed(0)) < 0.7
    elif left_out != "none":
        rows[:] = True
        rows[1, 77] = left_out == "all"
    rows = rows.to(hopper)
    x.key_mask[rows] = True
    unsound = fixed_shift(x)[2].isnan()
    assert torch.equal(unsound, rows[:, :, None, None].expand_as(unsound))
    out, row_max, row_sum = launch(x)
    check(x, (out, row_max, row_sum))


@pytest.mark.gpu
def test_backward_takes_its_statistics(hopper):
    x = random_inputs(R=4, I=256, J=256, dtype=torch.bfloat16, device=hopper, key_term="additive")
    ours = backward.launch(x.grad_out, *x.op[:6], *launch(x), x.scale, x.fill, x.key_term_first, True)

    in_eager, exact = results(eager, x), results(eager, x.to(torch.float64))
    for name, actual in zip(("dq", "dk", "dv", "dbias"), ours, strict=True):
        assert_within_budget(actual, in_eager[name], exact[name], name=name)


@pytest.mark.gpu
@pytest.mark.parametrize(("fill", "first"), [(-9999.0, False), (-1e9, True)])
def test_a_fill_that_may_keep_some_probability_is_declined(hopper, fill, first):
    x = random_inputs(R=64, I=512, J=512, dtype=torch.bfloat16, device=hopper, key_term="mask")
    assert choice.refusal(x.q, x.k, x.v, x.bias, x.key_mask, x.scale, -1e30, first) is None
    assert str(fill) in choice.refusal(x.q, x.k, x.v, x.bias, x.key_mask, x.scale, fill, first)


@pytest.mark.parametrize("D", [16, 32, 64])
def test_shapes_fit_into_shared_memory(D):
    # Half a KiB for barriers and for what the partitions are given.
    assert choice.shape_for(D).shared_memory(D) + 512 <= choice.SHARED_MEMORY
    assert max(shape.shared_memory(32) for shape in SHAPES.values()) + 512 <= choice.SHARED_MEMORY


COMPILE = """
import sys
from tests.kernels.gluon_compile import desc, report
from trifast_inductor.kernels.triangle_attention.hopper import choice, forward

D = int(sys.argv[1])
shape = choice.shape_for(D)
stage_j, block_i = shape.TILES * shape.BLOCK_J, 16 * shape.NUM_WARPS

kernel = forward._triangle_attention_fwd_hopper
constants = dict(D=D, HAS_KEY_TERM=True, **{k: v for k, v in vars(shape).items() if k in kernel.arg_names})
keys = desc("bf16", [1, 1, stage_j, 1, D])
types = {"k_desc": keys, "v_desc": keys, "q_desc": desc("bf16", [1, 1, block_i, 1, D])}
types["terms_desc"] = desc("fp32", [stage_j])
types["words_desc"] = desc("i32", [block_i, shape.BLOCK_J // 2])
pointers = dict(flags="*i32", left_out="*i32", out="*bf16", row_max="*fp32", row_sum="*fp32")
types |= {"scale": "fp32"}
types |= {f"{name}_ptr": kind for name, kind in pointers.items()}
report(kernel, types, constants, shape.NUM_WARPS)
"""


@pytest.mark.parametrize("D", [32, 64])
def test_products_stay_asynchronous(D):
    """ptxas waits after each product, and says so, when it meets something in their way or lacks registers."""
    found = said(COMPILE, str(D))
    assert "Used 96 registers" in found, found
    assert "serialized" not in found, found
    left = int(re.search(r"shared memory left: (-?\d+)", found)[1])
    assert left >= 0, f"{-left} bytes of shared memory too many"
