"""The Hopper forward of short sequences against the definition; what it compiles to is looked at without a GPU."""

import re
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch

from trifast_inductor.kernels.triangle_attention import reference
from trifast_inductor.testing import KEY_TERMS, Inputs, assert_within_budget, eager, random_inputs

pytest.importorskip("triton")
from trifast_inductor.kernels.triangle_attention.hopper import choice, whole_forward_choice

if choice.gluon_refusal() is not None:
    pytest.skip(choice.gluon_refusal(), allow_module_level=True)
from tests.kernels.conftest import skip_off_hopper
from tests.kernels.gluon_compile import said
from tests.kernels.test_hopper_choice import OnOneHopper
from tests.kernels.test_hopper_whole import as_in_a_model
from tests.kernels.test_lean_backward import left_out
from trifast_inductor.kernels.triangle_attention import forward
from trifast_inductor.kernels.triangle_attention.hopper import whole_forward


@pytest.fixture
def hopper(monkeypatch) -> Iterator[str]:
    skip_off_hopper()
    monkeypatch.setattr(whole_forward_choice, "_FEWEST_ROWS", {2: 1, 3: 1})
    forward._plans.clear()
    yield "cuda"
    forward._plans.clear()


def inputs(device: str = "cpu", **options: object) -> Inputs:
    given = {"B": 2, "R": 5, "I": 120, "J": 120, "H": 2, "D": 32, "dtype": torch.bfloat16, "device": device, **options}
    return random_inputs(**given)


def check(x: Inputs) -> None:
    """out within its budget; the maximum and the sum as the portable kernel has them, to the order of a sum."""
    out, row_max, row_sum = forward.launch(*x.op)
    exact = reference.forward(*x.to(torch.float64).op)
    assert_within_budget(out, eager(*x.op), exact[0], name="out")
    _, expected_max, expected_sum = forward.portable(*x.op)
    torch.testing.assert_close(row_max, expected_max, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(row_sum, expected_sum, rtol=1e-4, atol=0, equal_nan=True)
    assert all(isinstance(plan.on_hopper, whole_forward.Plan) for plan in forward._plans.values())


@pytest.mark.gpu
@pytest.mark.parametrize("key_term_first", [False, True])
@pytest.mark.parametrize("key_term", KEY_TERMS)
@pytest.mark.parametrize(("dtype", "D"), [(torch.bfloat16, 16), (torch.bfloat16, 32), (torch.float16, 32)], ids=str)
def test_agrees_with_reference(hopper, dtype, D, key_term, key_term_first):
    for I, J in ((128, 128), (150, 187)):
        check(inputs(hopper, I=I, J=J, D=D, dtype=dtype, key_term=key_term, key_term_first=key_term_first))


@pytest.mark.gpu
@pytest.mark.parametrize("I", [112, 127, 128, 129, 192])
@pytest.mark.parametrize("J", [112, 113, 128, 130, 192])
def test_any_length(hopper, I, J):
    """Two or three tiles of keys and of queries; the last of them whole, or nearly empty."""
    check(inputs(hopper, I=I, J=J, key_term="mask"))
    check(inputs(hopper, I=I, J=J))


@pytest.mark.gpu
@pytest.mark.parametrize("key_term", ["additive", "mask", "-inf mask"])
def test_rows_without_a_key(hopper, key_term):
    for J in (128, 130):
        x = inputs(hopper, I=140, J=J, key_term=key_term)
        check(left_out(x, slice(None, None, 2), 0))


@pytest.mark.gpu
def test_queries_at_minus_infinity(hopper):
    x = inputs(hopper, I=128, J=192)
    x.bias[..., 2, :] = float("-inf")
    x.bias[..., 3, :64] = float("-inf")
    check(x)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 11])
def test_any_number_of_rows_to_a_program(hopper, monkeypatch, rows):
    """Fewer rows than are done at a time, an odd number, more than there is room for; the last program has fewer."""
    monkeypatch.setattr(whole_forward_choice.Shape, "rows_of_a_program", lambda *_: rows)
    for I, J in ((128, 128), (192, 192), (128, 150)):
        x = inputs(hopper, R=11, I=I, J=J, key_term="additive")
        check(x)
        assert all(map(torch.equal, forward.launch(*x.op), forward.launch(*x.op)))


@pytest.mark.gpu
def test_strides_of_a_model(hopper):
    check(as_in_a_model(inputs(hopper, R=9, I=112, J=112, key_term="mask")))


@pytest.mark.gpu
def test_where_it_cannot_run_the_portable_kernel_does(hopper, monkeypatch, caplog):
    monkeypatch.setattr(choice, "_broken", None)
    monkeypatch.setattr(whole_forward.Plan, "__call__", mock.Mock(side_effect=RuntimeError("no such layout")))
    x = inputs(hopper)
    assert all(map(torch.equal, forward.launch(*x.op), forward.portable(*x.op)))
    assert "no such layout" in caplog.text


def refusal(x: Inputs) -> str | None:
    return whole_forward_choice.refusal(OnOneHopper(x.q), x.k, x.v, x.bias)


def test_what_it_does_not_serve(monkeypatch):
    monkeypatch.setattr(choice, "is_hopper", lambda device: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "20 rows" in refusal(inputs())
    assert refusal(inputs(R=256)) is None
    assert "800 rows" in refusal(inputs(R=200))
    assert refusal(inputs(R=200, I=192, J=192)) is None
    long = {"R": 256, "I": 150, "J": 150}
    assert "111 queries by 150 keys" in refusal(inputs(**long | {"I": 111}))
    assert "193 keys" in refusal(inputs(**long | {"J": 193}))
    assert "D=24" in refusal(inputs(**long, D=24))
    assert "D=64" in refusal(inputs(**long, D=64))
    assert "no bias" in refusal(inputs(**long, has_bias=False))
    even = inputs(R=256, I=192, J=192)
    assert "repeats" in refusal(replace(even, bias=even.bias[:1].expand_as(even.bias)))
    assert whole_forward_choice.refusal(even.q, even.k, even.v, even.bias) == "the device is no Hopper"


@pytest.mark.parametrize("D", [16, 32])
@pytest.mark.parametrize("J", [112, 129, 192])
@pytest.mark.parametrize("I", [112, 129])
def test_a_row_is_copied_ahead(I, J, D):
    shape = whole_forward_choice.shape_for(I, J, D)
    assert shape.STAGES >= 2
    assert shape.ROWS * shape.TI in (3, 4)


@pytest.mark.parametrize(("R", "heads", "rows"), [(128, 4, 4), (128, 32, 32), (1, 1, 2)])
def test_programs_end_together(R, heads, rows):
    assert whole_forward_choice.shape_for(128, 128, 32).rows_of_a_program(R, heads, 132) == rows


COMPILE = """
import sys
from tests.kernels.gluon_compile import desc, report
from trifast_inductor.kernels.triangle_attention.hopper import whole_forward, whole_forward_choice

I, J, key_term, key = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
shape = vars(whole_forward_choice.shape_for(I, J, 32))
constants = dict(D=32, KEY_TERM=key_term, KEY_TERM_FIRST=False, EVEN_J=J % 64 == 0, **shape)
types = {f"{name}_desc": desc("bf16", [1, 1, 64, 1, 32]) for name in ("q", "k", "v", "out")}
types |= {"bias_desc": desc("bf16", [1, 1, 64, 64]), "key_ptr": key, "scale": "fp32", "fill": "fp32"}
types |= {f"{name}_ptr": "*fp32" for name in ("row_max", "row_sum")}
report(whole_forward._triangle_attention_fwd_whole_hopper, types, constants)
"""


@pytest.mark.parametrize(
    ("I", "J", "key_term"),
    [
        (128, 128, "none *bf16"),
        (128, 128, "select *u8"),
        (128, 190, "add *fp32"),
        (192, 192, "add *fp32"),
        (192, 192, "select *u8"),
    ],
)
def test_products_stay_asynchronous(I, J, key_term):
    """ptxas waits after each product, and says so, when it meets something in their way or lacks registers."""
    found = said(COMPILE, str(I), str(J), *key_term.split())
    assert int(re.search(r"shared memory left: (-?\d+)", found)[1]) >= 0
    assert "serialized" not in found, found
    assert int(re.search(r"(\d+) bytes spill stores", found)[1]) <= 200, found
    # Four partitions are four copies of it: docs/benchmarks/log.md, "A forward whose bias stays on the chip".
    assert int(re.search(r"instructions: (\d+)", found)[1]) < 4000, found
