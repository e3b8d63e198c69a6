"""Which forward runs: the one for Hopper where it may, the portable one elsewhere and when the other fails."""

import logging
from dataclasses import replace
from unittest import mock

import pytest
import torch

from trifast_inductor.testing import assert_within_budget, eager, random_inputs, results

from .conftest import skip_off_hopper

pytest.importorskip("triton")
from trifast_inductor.kernels.triangle_attention import backward, forward, reference
from trifast_inductor.kernels.triangle_attention.hopper import choice, dbias_choice

if choice.gluon_refusal() is not None:
    pytest.skip(choice.gluon_refusal(), allow_module_level=True)
from trifast_inductor.kernels.triangle_attention.hopper import dbias as dbias_on_hopper
from trifast_inductor.kernels.triangle_attention.hopper import forward as on_hopper


def long_inputs(device="cpu", **options):
    """Just what the Hopper kernel takes."""
    given = {"R": 48, "I": 384, "J": 384, "H": 4, "D": 32, "dtype": torch.bfloat16, **options}
    return random_inputs(B=1, device=device, **given)


def refusal(x):
    op = x.op
    return choice.refusal(*op[:4], *op[5:])


class OnOneHopper:
    """Tensors of the CPU, looked at as if they lay on a Hopper GPU."""

    def __init__(self, tensor):
        self._tensor = tensor

    device = torch.device("cuda", 0)

    def __getattr__(self, name):
        return getattr(self._tensor, name)


@pytest.fixture
def a_hopper(monkeypatch):
    monkeypatch.setattr(choice, "is_hopper", lambda device: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def refusal(x):
        q, k, v, bias, _, key_mask, *numbers = x.op
        return choice.refusal(OnOneHopper(q), k, v, bias, key_mask, *numbers)

    return refusal


REFUSED = {
    "float32": ({"dtype": torch.float32}, "16-bit"),
    "head size": ({"D": 24}, "D=24"),
    "short": ({"I": 255, "J": 255}, "255 keys"),
    "few rows": ({"R": 2}, "blocks of queries"),
    "no bias": ({"has_bias": False}, "no bias"),
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_what_it_does_not_serve(a_hopper, options, reason):
    assert reason in a_hopper(long_inputs(**options))


@pytest.mark.parametrize(
    ("I", "J", "reason"),
    [(384, 384, None), (512, 530, None), (224, 224, None), (512, 192, "192 keys"), (190, 193, "logits")],
)
def test_lengths_of_the_sum_over_rows(a_hopper, monkeypatch, I, J, reason):
    """From two tiles of 128 keys on, and enough to do."""
    monkeypatch.setattr(choice, "gluon_refusal", lambda: None)
    x = long_inputs(I=I, J=J, R=192)
    why = dbias_choice.refusal(x.grad_out, OnOneHopper(x.q), x.k, x.v, x.bias, x.key_mask, *x.op[6:])
    assert (why is None) == (reason is None)
    assert reason is None or reason in why


def test_other_reasons_to_refuse(a_hopper, monkeypatch):
    x = long_inputs(key_term="mask")
    assert a_hopper(x) is None
    assert "rounded" in a_hopper(replace(x, bias=x.bias.float()))
    assert "not positive" in a_hopper(replace(x, scale=0.0))
    assert "some probability" in a_hopper(replace(x, key_term_first=True, fill=-1e9))
    assert "16 bytes" in a_hopper(replace(x, q=x.q.transpose(3, 4).contiguous().transpose(3, 4)))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreter" in a_hopper(x)


def test_other_devices_get_the_portable_kernel():
    assert refusal(long_inputs()) == "the device is no Hopper"


def test_a_kernel_that_fails_is_said_once_and_replaced(device, monkeypatch, caplog):
    monkeypatch.setattr(choice, "_broken", None)
    x = random_inputs(R=3, I=17, J=20, D=16, device=device, key_term="mask")
    expected = forward.portable(*x.op)
    forward._plans.clear()
    monkeypatch.setattr(choice, "refusal", lambda *_: None)
    fails = mock.Mock(side_effect=RuntimeError("no such layout"))
    monkeypatch.setattr(on_hopper, "Plan", fails)
    with caplog.at_level(logging.WARNING):
        results = [forward.launch(*x.op) for _ in range(2)]
    monkeypatch.setattr(on_hopper, "Plan", lambda *_: mock.Mock(side_effect=torch.OutOfMemoryError))
    monkeypatch.setattr(choice, "_broken", None)
    forward._plans.clear()
    with pytest.raises(torch.OutOfMemoryError):
        forward.launch(*x.op)
    forward._plans.clear()
    assert fails.call_count == 1
    assert [record.getMessage() for record in caplog.records] == [
        "Triton could not run the kernel for Hopper: no such layout; the portable kernel runs instead, which is slower"
    ]
    for result in results:
        assert all(map(torch.equal, result, expected))


@pytest.fixture
def hopper_gpu():
    skip_off_hopper()


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper_gpu")
@pytest.mark.parametrize("key_term", ["none", "additive", "mask"])
@pytest.mark.parametrize("D", [16, 32, 64])
def test_long_sequences_take_it(key_term, D):
    x = long_inputs("cuda", key_term=key_term, D=D)
    assert refusal(x) is None
    call = on_hopper.Plan.__call__
    with mock.patch.object(on_hopper.Plan, "__call__", autospec=True, side_effect=call) as launched:
        out, row_max, row_sum = forward.launch(*x.op)
    assert launched.call_count == 1
    assert choice.gluon_refusal() is None
    exact = reference.forward(*x.to(torch.float64).op)
    assert_within_budget(out, eager(*x.op), exact[0], name="out")
    log_sum = row_max.double() + row_sum.double().log()
    assert (log_sum - exact[1] - exact[2].log()).abs().max() < 0.05


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper_gpu")
@pytest.mark.parametrize("key_term", ["none", "additive", "mask"])
@pytest.mark.parametrize("D", [16, 32, 64])
def test_gradients_of_long_sequences(monkeypatch, key_term, D):
    """Forward, dq, dk and dv, and dbias each by the kernel that is there for such lengths."""
    monkeypatch.setattr(dbias_choice, "_FEWEST_LOGITS", 1)
    x = long_inputs("cuda", R=32, I=500, J=512, key_term=key_term, D=D)
    in_eager, exact = results(eager, x), results(eager, x.to(torch.float64))
    saved = forward.launch(*x.op)
    call = dbias_on_hopper.Plan.__call__
    with mock.patch.object(dbias_on_hopper.Plan, "__call__", autospec=True, side_effect=call) as launched:
        gradients = [backward.launch(x.grad_out, *x.op[:6], *saved, *x.op[6:], True) for _ in range(2)]
    assert launched.call_count == 2
    assert choice.gluon_refusal() is None
    for name, actual, again in zip(("dq", "dk", "dv", "dbias"), *gradients, strict=True):
        assert torch.equal(actual, again), name
        assert_within_budget(actual, in_eager[name], exact[name], name=name)
