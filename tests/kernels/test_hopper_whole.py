"""All gradients in one pass on Hopper against the definition; what it compiles to is looked at without a GPU."""

import re
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch

from trifast_inductor.testing import KEY_TERMS, Inputs, random_inputs

pytest.importorskip("triton")
from trifast_inductor.kernels.triangle_attention.hopper import choice, whole_choice

if choice.gluon_refusal() is not None:
    pytest.skip(choice.gluon_refusal(), allow_module_level=True)
from tests.kernels.conftest import skip_off_hopper
from tests.kernels.gluon_compile import said
from tests.kernels.test_backward import assert_gradients_within_budget, gradients
from tests.kernels.test_hopper_choice import OnOneHopper
from tests.kernels.test_lean_backward import left_out
from trifast_inductor.kernels.triangle_attention import backward
from trifast_inductor.kernels.triangle_attention.hopper import whole_plan


@pytest.fixture
def hopper() -> Iterator[str]:
    skip_off_hopper()
    backward._plans.clear()
    yield "cuda"
    backward._plans.clear()


def inputs(device: str = "cpu", **options: object) -> Inputs:
    given = {"B": 2, "R": 5, "I": 100, "J": 100, "H": 2, "D": 32, "dtype": torch.bfloat16, "device": device, **options}
    return random_inputs(**given)


def assert_taken() -> None:
    assert all(isinstance(plan.elsewhere, whole_plan.Plan) for plan in backward._plans.values())


@pytest.mark.gpu
@pytest.mark.parametrize("key_term_first", [False, True])
@pytest.mark.parametrize("key_term", KEY_TERMS)
@pytest.mark.parametrize(("dtype", "D"), [(torch.bfloat16, 16), (torch.bfloat16, 32), (torch.float16, 32)], ids=str)
def test_agrees_with_reference(hopper, dtype, D, key_term, key_term_first):
    for I, J in ((128, 128), (150, 187)):
        x = inputs(hopper, I=I, J=J, D=D, dtype=dtype, key_term=key_term, key_term_first=key_term_first)
        assert_gradients_within_budget(x)
    assert_taken()


@pytest.mark.gpu
@pytest.mark.parametrize("I", [65, 100, 128, 129, 192])
@pytest.mark.parametrize("J", [1, 64, 65, 90, 128, 130, 192])
def test_any_length(hopper, I, J):
    """One to three tiles of keys, two or three of queries; the last of them whole, or nearly empty."""
    assert_gradients_within_budget(inputs(hopper, I=I, J=J, key_term="mask"))
    assert_taken()


@pytest.mark.gpu
@pytest.mark.parametrize("key_term", ["additive", "mask", "-inf mask"])
def test_rows_without_a_key(hopper, key_term):
    for J in (128, 130):
        x = inputs(hopper, I=140, J=J, key_term=key_term)
        assert_gradients_within_budget(left_out(x, slice(None, None, 2), 0))
    assert_taken()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 11])
def test_any_number_of_rows_to_a_program(hopper, monkeypatch, rows):
    """Fewer rows than there is room for, as many, more, an odd number; the last program has fewer."""
    monkeypatch.setattr(whole_choice, "rows_of_a_program", lambda *_: rows)
    for I, J in ((128, 128), (192, 192), (128, 64)):
        x = inputs(hopper, R=11, I=I, J=J, key_term="additive")
        assert_gradients_within_budget(x)
        assert all(map(torch.equal, gradients(x), gradients(x)))
    assert_taken()


def as_in_a_model(x: Inputs) -> Inputs:
    """Operands that are parts of one projection, a bias whose heads lie innermost, a mask of one number."""
    q, k, v = torch.stack((x.q, x.k, x.v), 4).unbind(4)
    bias = x.bias.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return replace(x, q=q, k=k, v=v, bias=bias, key_mask=x.key_mask[:, :1, :1].expand_as(x.key_mask))


@pytest.mark.gpu
def test_strides_of_a_model(hopper):
    x = inputs(hopper, R=9, I=96, J=96, key_term="mask")
    assert_gradients_within_budget(as_in_a_model(x))
    repeated = replace(x, bias=x.bias[:1].expand_as(x.bias))
    assert_gradients_within_budget(repeated)


@pytest.mark.gpu
def test_without_dbias_the_same_gradients(hopper):
    x = inputs(hopper)
    *others, dbias = gradients(x, needs_dbias=False)
    assert dbias.shape == (0,)
    assert all(map(torch.equal, others, gradients(x)[:3]))
    assert_taken()


@pytest.mark.gpu
def test_where_it_cannot_run_others_do(hopper, monkeypatch, caplog):
    monkeypatch.setattr(choice, "_broken", None)
    monkeypatch.setattr(whole_plan.Plan, "_launch", mock.Mock(side_effect=RuntimeError("no such layout")))
    assert_gradients_within_budget(inputs(hopper))
    assert "no such layout" in caplog.text


def refusal(x: Inputs) -> str | None:
    q, k, v, bias, key_bias, key_mask, *_ = x.op
    return whole_choice.refusal(x.grad_out, OnOneHopper(q), k, v, bias, key_bias, key_mask)


def test_what_it_does_not_serve(monkeypatch):
    monkeypatch.setattr(choice, "is_hopper", lambda device: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = inputs(key_term="additive")
    assert refusal(x) is None
    assert refusal(inputs(I=65, J=1)) is None
    assert "64 queries by 128 keys" in refusal(inputs(I=64, J=128))
    assert "193 queries" in refusal(inputs(I=193))
    assert "193 keys" in refusal(inputs(J=193))
    assert "D=24" in refusal(inputs(D=24))
    assert "D=64" in refusal(inputs(D=64))
    assert "no bias" in refusal(inputs(has_bias=False))
    assert "gradient of the output is torch.float32" in refusal(replace(x, grad_out=x.grad_out.float()))
    assert "16 bytes" in refusal(replace(x, v=x.v.transpose(3, 4).contiguous().transpose(3, 4)))
    # A bias that is copied anyway may lie as it likes.
    assert refusal(replace(x, bias=x.bias[:1].expand_as(x.bias))) is None
    assert refusal(inputs(I=128, J=128, key_term="additive")) is None
    assert refusal(replace(x, bias=x.bias.mT.contiguous().mT)) is None
    even = inputs(I=128, J=192)
    assert "repeats" in refusal(replace(even, bias=even.bias[:1].expand_as(even.bias)))
    longest = inputs(I=192, J=192, key_term="additive")
    assert refusal(longest) is None
    assert "no room" in refusal(replace(longest, key_bias=longest.key_bias.float()))
    assert refusal(replace(x, key_bias=x.key_bias.float())) is None


def test_elsewhere_it_is_not_planned():
    x = inputs()
    assert whole_choice.refusal(x.grad_out, *x.op[:6]) == "the device is no Hopper"


@pytest.mark.parametrize(("R", "heads", "rows"), [(128, 4, 4), (192, 4, 6), (192, 32, 48), (1, 1, 1), (100, 4, 4)])
def test_programs_end_together(R, heads, rows):
    """On an H200: one wave, all programs alike."""
    assert whole_choice.rows_of_a_program(R, heads, 132) == rows


def test_warps_own_keys_from_65_to_128():
    assert [whole_choice.is_by_key(I, J) for I, J in ((65, 65), (128, 100), (128, 64), (129, 128), (64, 65))] == [
        *(True, True),
        *(False, False, False),
    ]


COMPILE = """
import sys
from tests.kernels.gluon_compile import desc, report
from trifast_inductor.kernels.triangle_attention.hopper import whole, whole_by_key

TI, TJ, key_term, key, D = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])
constants = dict(D=D, KEY_TERM=key_term, KEY_TERM_FIRST=False, NEEDS_DBIAS=True, EVEN_J=False)
types = {f"{name}_desc": desc("bf16", [1, 1, 64, 1, D]) for name in ("q", "do", "out", "k", "v", "dq", "dk", "dv")}
types |= {f"{name}_ptr": "*fp32" for name in ("row_max", "row_sum", "parts")} | {"scale": "fp32", "fill": "fp32"}
types |= {"bias_desc": desc("bf16", [1, 1, 64, 64]), "bias_ptr": "*bf16", "key_ptr": key}
if TI == TJ == 2:
    types |= {f"{name}_desc": desc("bf16", [1, 1, 128, 1, D]) for name in ("k", "v", "dk", "dv")}
    report(whole_by_key._triangle_attention_bwd_whole_by_key_hopper, types, constants, num_warps=8)
else:
    report(whole._triangle_attention_bwd_whole_hopper, types, constants | dict(TI=TI, TJ=TJ), num_warps=8)
"""


@pytest.mark.parametrize(
    ("tiles", "key_term", "D", "spilled"),
    [
        ((2, 2), "none", 32, 30),
        ((2, 2), "add *fp32", 32, 30),
        ((2, 2), "select *u8", 32, 60),
        ((2, 2), "select *u8", 16, 60),
        ((2, 3), "add *bf16", 32, 300),
        ((3, 3), "add *bf16", 32, 1000),
        ((3, 3), "select *u8", 32, 1000),
    ],
    ids=str,
)
def test_products_stay_asynchronous(tiles, key_term, D, spilled):
    """ptxas waits after each product, and says so, when it meets something in their way or lacks registers."""
    which, key = (*key_term.split(), "*bf16")[:2]
    found = said(COMPILE, *map(str, tiles), which, key, str(D))
    assert int(re.search(r"shared memory left: (-?\d+)", found)[1]) >= 0
    assert "serialized" not in found, found
    assert int(re.search(r"(\d+) bytes spill stores", found)[1]) <= spilled, found
    if tiles == (2, 2):
        # Not twice what the warps that own keys do: docs/benchmarks/log-backward.md, step 21.
        assert int(re.search(r"instructions: (\d+)", found)[1]) < 3500, found
