"""The Hopper kernel for dq, dk and dv against the definition; what it compiles to is looked at without a GPU."""

import re
from collections.abc import Iterator

import pytest
import torch

from trifast_inductor.testing import Inputs, random_inputs

pytest.importorskip("triton")
from trifast_inductor.kernels.triangle_attention.hopper import choice, dqkv_choice

if choice.gluon_refusal() is not None:
    pytest.skip(choice.gluon_refusal(), allow_module_level=True)
from tests.kernels.conftest import skip_off_hopper
from tests.kernels.gluon_compile import said
from tests.kernels.test_backward import assert_gradients_within_budget, gradients
from tests.kernels.test_lean_backward import CASES, take_any_size
from trifast_inductor.kernels.triangle_attention import backward
from trifast_inductor.kernels.triangle_attention.hopper import dqkv
from trifast_inductor.kernels.triangle_attention.lean import launch as lean


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Any size goes to the kernel."""
    skip_off_hopper()
    take_any_size(monkeypatch)
    monkeypatch.setattr(choice, "_FEWEST_ITEMS", 1)
    backward._plans.clear()
    yield "cuda"
    backward._plans.clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a launch."""
    seen: list[int] = []
    call = dqkv.Plan.__call__
    monkeypatch.setattr(dqkv.Plan, "__call__", lambda *given: (seen.append(1), call(*given))[1])
    return seen


def refusal(x: Inputs) -> str | None:
    given = (x.grad_out, x.q, x.k, x.v, x.bias, x.key_mask, x.scale, x.fill, x.key_term_first)
    return dqkv_choice.refusal(*given)


@pytest.mark.gpu
@pytest.mark.parametrize("of", CASES)
def test_special_rows_and_tiles(hopper, launches, of):
    """The cases of the lean kernels, which do again what this one cannot."""
    x = CASES[of](hopper)
    assert_gradients_within_budget(x)
    assert launches == [1] * (refusal(x) is None and lean.refusal(x.grad_out, *x.op[:6], x.fill) is None)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "D"),
    [(torch.bfloat16, 16), (torch.bfloat16, 32), (torch.bfloat16, 64), (torch.float16, 32), (torch.float16, 64)],
    ids=str,
)
@pytest.mark.parametrize("key_term", ["none", "additive", "mask", "-inf mask"])
def test_agrees_with_reference(hopper, launches, dtype, D, key_term):
    x = random_inputs(B=2, R=3, I=200, J=333, D=D, dtype=dtype, device=hopper, key_term=key_term)
    assert_gradients_within_budget(x)
    assert launches == [1]


@pytest.mark.gpu
@pytest.mark.parametrize("I", [1, 64, 129, 300])
@pytest.mark.parametrize("J", [1, 64, 65, 128, 300])
@pytest.mark.parametrize("D", [32, 64])
def test_any_length(hopper, launches, D, I, J):
    """One block of keys, two, an odd number; more tiles of queries than stages, and fewer."""
    assert_gradients_within_budget(random_inputs(R=3, I=I, J=J, D=D, dtype=torch.bfloat16, device=hopper))
    assert launches == [1]


@pytest.mark.gpu
@pytest.mark.parametrize("D", [32, 64])
def test_more_heads_than_programs(hopper, D):
    """Two runs agree to the bit, and every program takes several."""
    x = random_inputs(R=100, I=130, J=200, H=4, D=D, dtype=torch.bfloat16, device=hopper, key_term="additive")
    x.key_bias[:, 3:60:7] = -1e9
    assert_gradients_within_budget(x)
    first, second = gradients(x), gradients(x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_other_calls_get_the_lean_kernels():
    x = random_inputs(I=256, J=256, dtype=torch.bfloat16)
    assert refusal(x) == "the device is no Hopper"
    assert refusal(random_inputs(I=191, J=256, dtype=torch.bfloat16)) == "191 queries by 256 keys are fewer than 192"
    assert refusal(random_inputs(I=128, J=128, D=64, dtype=torch.bfloat16)) == "the device is no Hopper"
    assert (
        refusal(random_inputs(I=128, J=127, D=64, dtype=torch.bfloat16)) == "128 queries by 127 keys are fewer than 128"
    )
    assert refusal(random_inputs(I=256, J=256, D=24, dtype=torch.bfloat16)) == "D=24 is not in (16, 32, 64)"


COMPILE = """
import sys
from tests.kernels.gluon_compile import desc, report
from trifast_inductor.kernels.triangle_attention.hopper import dqkv, dqkv_choice

kernel = dqkv._triangle_attention_bwd_dqkv_hopper
D = int(sys.argv[1])
constants = dict(D=D, KEY_TERM=sys.argv[2], **vars(dqkv_choice.shape_for(D)))
types = {f"{name}_desc": desc("bf16", [1, 1, 64, 1, D]) for name in ("q", "do", "k", "v")}
types["words_desc"] = desc("i32", [64, 32])
types |= {f"{name}_ptr": "*bf16" for name in ("key", "dq", "dk", "dv")}
types |= {"listed_ptr": "*i32", "terms_ptr": "*fp32", "sums_ptr": "*fp32", "scale": "fp32"}
report(kernel, types, constants)
"""


@pytest.mark.parametrize("D", [32, 64])
@pytest.mark.parametrize("key_term", ["none", "add"])
def test_products_stay_asynchronous(D, key_term):
    """ptxas waits after each product, and says so, when it meets something in their way or lacks registers."""
    found = said(COMPILE, str(D), key_term)
    assert int(re.search(r"shared memory left: (-?\d+)", found)[1]) >= 0
    assert "serialized" not in found, found
    # A few, outside the loops that make products; at D=64 the loop that sums dq loads some of its addresses.
    assert int(re.search(r"(\d+) bytes spill stores", found)[1]) <= {32: 32, 64: 80}[D]
