"""What code that Inductor generates calls."""

import logging

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from tests.afresh import without_cached_graphs
from trifast_inductor.kernels.triangle_attention import inductor, op

FORWARD, BACKWARD = (
    f"torch.ops.trifast_inductor.triangle_attention_{name}.default" for name in ("forward", "backward")
)


def eager(x, bias):
    logits = torch.einsum("rihd,rjhd->rhij", x, x) * 0.25 + bias
    return torch.einsum("rhij,rjhd->rihd", logits.softmax(-1), x)


def trained(device):
    """Output, gradients, and the code that was generated."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 9, 2, 16, generator=generator).to(device).requires_grad_()
    bias = torch.randn(1, 2, 9, 9, generator=generator).to(device).requires_grad_()
    compiled = torch.compile(eager, backend="trifast")

    def step():
        out = compiled(x, bias)
        return out.detach(), *torch.autograd.grad(out.square().sum(), (x, bias))

    with without_cached_graphs():
        results, sources = run_and_get_code(step)
    return results, "\n".join(sources)


def test_on_a_cpu_the_op():
    _, source = trained("cpu")
    assert f"{FORWARD}(" in source
    assert f"{BACKWARD}(" in source


def test_where_it_serves_the_function_itself(monkeypatch):
    """Told of any device, since there the function does the same."""
    expected, _ = trained("cpu")
    monkeypatch.setattr(inductor, "serves", lambda device: True)
    results, source = trained("cpu")
    assert f"{FORWARD}.at_once(" in source
    assert f"{BACKWARD}.at_once(" in source
    for actual, wanted in zip(results, expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.gpu
def test_on_a_gpu_the_function_itself(device):
    _, source = trained(device)
    assert f"{FORWARD}.at_once(" in source
    assert f"{BACKWARD}.at_once(" in source


def test_it_is_what_serves_the_op():
    assert op.triangle_attention_forward.at_once is op._forward
    assert op.triangle_attention_backward.at_once is op._backward


def test_a_torch_that_lowers_otherwise_is_told_of_and_calls_the_op(monkeypatch, caplog):
    def fail(*given, **others):
        raise TypeError("no such argument: type_promotion_kind")

    monkeypatch.setattr(inductor.lowering, "register_lowering", fail)
    inductor.install.cache_clear()
    caplog.set_level(logging.INFO, logger="trifast_inductor")
    try:
        inductor.install()
    finally:
        inductor.install.cache_clear()
    assert "calls of the op go through torch's dispatcher: no such argument" in caplog.text


def test_the_pass_sees_to_it(monkeypatch):
    installed = []
    monkeypatch.setattr(inductor, "install", lambda: installed.append(True))
    trained("cpu")
    assert installed
