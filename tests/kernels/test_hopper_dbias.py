"""The Hopper kernel for dbias against the definition; what it compiles to is looked at without a GPU."""

import re
from dataclasses import replace

import pytest
import torch

from trifast_inductor.testing import assert_within_budget, eager, random_inputs, results

from .conftest import skip_off_hopper
from .dbias_cases import CHANGES, Given, given, inputs, wholly_filled, wholly_left_out
from .gluon_compile import said
from .test_hopper_forward import LAYOUTS

pytest.importorskip("triton")
from trifast_inductor.kernels.triangle_attention.hopper import choice, dbias_choice

if choice.gluon_refusal() is not None:
    pytest.skip(choice.gluon_refusal(), allow_module_level=True)
from trifast_inductor.kernels.triangle_attention.hopper import dbias

from .dbias_prepared import prepared

SHAPES = {
    "four partitions": dbias_choice.Shape(),
    "two partitions": dbias_choice.Shape(COLUMNS=128),
    "halves": dbias_choice.Shape(HALVES=2),
    "two stages": dbias_choice.Shape(STAGES=2),
}


@pytest.fixture
def hopper() -> str:
    skip_off_hopper()
    return "cuda"


def launch(g: Given, shape: dbias_choice.Shape | None = None) -> torch.Tensor:
    x = g.x
    plan = dbias.Plan(x.grad_out, *x.op, shape)
    return plan(x.grad_out, x.q, x.k, x.v, x.bias, g.key, *g.statistics, *prepared(g))


@pytest.mark.gpu
# Few: each is compiled anew, for each kind of key term.
@pytest.mark.parametrize(
    ("dtype", "D"),
    [(torch.bfloat16, 16), (torch.bfloat16, 32), (torch.bfloat16, 64), (torch.float16, 32)],
    ids=["bfloat16-16", "bfloat16-32", "bfloat16-64", "float16-32"],
)
@pytest.mark.parametrize("key_term", ["none", "additive", "mask", "-inf mask"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_reference(hopper, dtype, D, key_term, layout):
    drawn = random_inputs(B=2, R=3, I=200, J=333, D=D, dtype=dtype, device=hopper, key_term=key_term)
    exact, rounded = results(eager, drawn.to(torch.float64)), results(eager, drawn)
    x = LAYOUTS[layout](drawn)
    if layout == "ending node":
        x = replace(x, grad_out=x.grad_out.transpose(1, 2).contiguous().transpose(1, 2))
    assert_within_budget(launch(given(x)), rounded["dbias"], exact["dbias"], name="dbias")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("I", [1, 128, 300])
@pytest.mark.parametrize("J", [64, 65, 333, 512])
@pytest.mark.parametrize("key_term", ["none", "mask"])
def test_any_shape_and_length(hopper, shape, I, J, key_term):
    g = given(inputs(hopper, key_term, R=5, I=I, J=J, D=32))
    torch.testing.assert_close(launch(g, SHAPES[shape]), g.expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("R", [1, 2, 33, 300])
@pytest.mark.parametrize("key_term", ["none", "additive"])
def test_any_number_of_rows(hopper, shape, R, key_term):
    """Fewer than stages, more than a word has bits, and so many that groups of rows get a part each."""
    g = given(inputs(hopper, key_term, R=R, D=32))
    torch.testing.assert_close(launch(g, SHAPES[shape]), g.expected, rtol=1e-3, atol=1e-4 * max(1, R / 30))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
def test_rows_with_no_key_left_are_passed_over(hopper, shape, share):
    """More rows than a word has bits, some of which add nothing to the sums, or all of a part, or all."""
    x = inputs(hopper, "mask", R=300, D=32)
    x.key_mask[..., 3] = False
    x.key_mask[:, torch.rand(300, generator=torch.Generator().manual_seed(0)) < share] = True
    if share == 0.1:
        x.key_mask[:, :200] = True
    g = given(x)
    torch.testing.assert_close(launch(g, SHAPES[shape]), g.expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("change", CHANGES)
def test_special_rows_and_tiles(hopper, shape, change):
    changed, key_term = CHANGES[change]
    g = given(changed(inputs(hopper, key_term, D=32)))
    torch.testing.assert_close(launch(g, SHAPES[shape]), g.expected, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("key_term", ["additive", "mask"])
def test_key_term_before_the_bias(hopper, key_term):
    x = inputs(hopper, key_term, key_term_first=True, D=32)
    g = given(wholly_left_out(x) if key_term == "additive" else wholly_filled(x))
    torch.testing.assert_close(launch(g), g.expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_two_runs_agree_to_the_bit(hopper, shape):
    g = given(inputs(hopper, "additive", R=300, I=260, J=390, H=4, D=32))
    first = launch(g, SHAPES[shape])
    assert torch.equal(first, launch(g, SHAPES[shape]))


def test_other_devices_get_the_portable_kernel():
    x = random_inputs(J=256, dtype=torch.bfloat16)
    why = dbias_choice.refusal(x.grad_out, x.q, x.k, x.v, x.bias, None, 1.0, 0.0, False)
    assert why == "the device is no Hopper"
    why = dbias_choice.refusal(x.grad_out.float(), x.q, x.k, x.v, x.bias, None, 1.0, 0.0, False)
    assert why == "the gradient of the output is torch.float32, not torch.bfloat16"
    expanded = x.grad_out[:, :1].expand(x.grad_out.shape)
    why = dbias_choice.refusal(expanded, x.q, x.k, x.v, x.bias, None, 1.0, 0.0, False)
    assert why == "the gradient of the output has rows that are not dense or not on 16 bytes"
    why = dbias_choice.refusal(x.grad_out, x.q, x.k, x.v, None, None, 1.0, 0.0, False)
    assert why == "there is no bias"


@pytest.mark.parametrize("D", [16, 32, 64])
def test_shapes_fit_into_shared_memory(D):
    # Two KiB for barriers and for what the partitions are given.
    assert dbias_choice.shape_for(D).shared_memory(D) + 2048 <= choice.SHARED_MEMORY


@pytest.mark.parametrize(("R", "tiles"), [(1, 1), (5, 3), (256, 16), (384, 36), (512, 64), (1024, 256), (2048, 1024)])
def test_groups_of_rows_fill_the_multiprocessors(R, tiles):
    group = dbias_choice.rows_of_a_part(R, tiles, 132)
    programs = -(-R // group) * tiles
    waves = -(-programs // 132)
    assert 1 <= group <= R
    # Within a quarter of what it would take if all were always at work, where rows are enough to be shared.
    assert waves * group <= 1.25 * max(R * tiles / 132, min(R, 8))


COMPILE = """
from tests.kernels.gluon_compile import desc, report
from trifast_inductor.kernels.triangle_attention.hopper import dbias, dbias_choice

kernel = dbias._triangle_attention_bwd_dbias_hopper
shape = dbias_choice.shape_for(32)
constants = dict(D=32, KEY_TERM="add", REGISTERS=shape.REGISTERS, **vars(shape))
types = {f"{name}_desc": desc("bf16", [1, 1, 128, 1, 32]) for name in ("q", "do", "k", "v")}
types |= {f"{name}_desc": desc("fp32", [8, 32]) for name in ("terms", "key")}
types |= {"summed_ptr": "*i32", "key_bits_ptr": "*i32", "parts_ptr": "*fp32", "scale": "fp32"}
report(kernel, types, constants)
"""


def test_products_stay_asynchronous():
    """ptxas waits after each product, and says so, when it meets something in their way or lacks registers."""
    found = said(COMPILE)
    assert "Used 96 registers" in found, found  # five times 128 threads
    assert "serialized" not in found, found
    # A few before and after the loop.
    spilled = re.search(r"(\d+) bytes spill stores", found)
    assert spilled, found
    assert int(spilled[1]) < 128, found
    left = int(re.search(r"shared memory left: (-?\d+)", found)[1])
    assert left >= 0, f"{-left} bytes of shared memory too many"
