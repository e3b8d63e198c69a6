"""One small block around a core that a test may wrap, and eager beside `backend="trifast"`."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from trifast_inductor.testing import assert_within_budget

C, H, D = 8, 2, 4


def core(q: Tensor, k: Tensor, v: Tensor, mask_bias: Tensor, pair_bias: Tensor) -> Tensor:
    """q, k, v: `[B, N, H, N, D]`."""
    a = torch.matmul(q, k.transpose(-1, -2))
    a += mask_bias
    a += pair_bias
    return torch.matmul(torch.softmax(a, -1), v)


def core_with_softmax_in_float32(q: Tensor, k: Tensor, v: Tensor, mask_bias: Tensor, pair_bias: Tensor) -> Tensor:
    """The same with autocast switched off for the softmax alone, as OpenFold does under bfloat16."""
    a = torch.matmul(q, k.transpose(-1, -2))
    a += mask_bias
    a += pair_bias
    with torch.autocast(device_type=a.device.type, enabled=False):
        a = torch.softmax(a, -1)
    return torch.matmul(a, v)


class Block(nn.Module):
    """Triangle attention around a starting node, with a residual."""

    def __init__(self, core: Callable[..., Tensor] = core) -> None:
        super().__init__()
        self.core = core
        self.qkv = nn.Linear(C, 3 * H * D)
        self.bias = nn.Linear(C, H)
        self.out = nn.Linear(H * D, C)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).transpose(2, 4).unbind(3)
        mask_bias = (1e9 * (mask - 1))[:, :, None, None, :]
        pair_bias = self.bias(x).permute(0, 3, 1, 2)[:, None]
        o = self.core(D**-0.5 * q, k, v, mask_bias, pair_bias)
        return x + self.out(o.transpose(2, 3).flatten(-2))


class Around(nn.Module):
    """A block inside something else: `wrap(block, x, mask)`."""

    def __init__(self, wrap: Callable[[nn.Module, Tensor, Tensor], Tensor], block: nn.Module | None = None) -> None:
        super().__init__()
        self.block = block if block is not None else Block()
        self.wrap = wrap

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.wrap(self.block, x, mask)


def inputs(N: int = 6, B: int = 1, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """x and a mask in which the last third of the sequence is padding."""
    kept = torch.ones(B, N)
    kept[:, N - N // 3 :] = 0
    return torch.randn(B, N, N, C).to(device), (kept[:, :, None] * kept[:, None, :]).to(device)


def results(model: Callable[..., Tensor], x: Tensor, mask: Tensor) -> list[Tensor]:
    """The output and, where gradients are on and wanted, those of the input and of every parameter."""
    leaf = x.clone().requires_grad_(torch.is_grad_enabled())
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    for parameter in parameters:
        parameter.grad = None
    out = model(leaf, mask)
    if out.requires_grad:
        out.float().square().sum().backward()
    grads = [t.grad for t in (leaf, *parameters) if t.grad is not None]
    return [t.detach() for t in (out, *grads)]


def assert_agrees(
    model: nn.Module,
    *,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    rewritten: int = 1,
    compiled: Callable[..., Tensor] | None = None,
    **options: Any,
) -> None:
    """Outputs and gradients within the budget that eager's own rounding sets, and every site rewritten.

    Args:
        context: entered around each run, as a user's training loop would.
        compiled: what to run; the model compiled with `options` when None.
    """
    run = torch.compile(model, backend="trifast", **options) if compiled is None else compiled
    x, mask = inputs(device=str(next(model.parameters()).device))
    exact = results(model.double(), x.double(), mask.double())
    model.float()
    with context():
        eager = results(model, x, mask)
        actual = results(run, x, mask)
    assert len(actual) == len(eager)
    for index, (a, b, c) in enumerate(zip(actual, eager, exact, strict=False)):
        # A mean square cannot be held to eager's luck in one dot product of two or three terms.
        assert_within_budget(a, b, c, name=f"result {index}", times=4.0, floor=1e-6)
    assert counters["trifast"] == {"rewritten": rewritten}
