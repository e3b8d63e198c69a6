"""What is timed: a shape, and random inputs for it in the strides of a friend or of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUTS = ("friendly", "model")
MASKS = ("padding", "random", "none")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MODEL_AXES = "brihd"  # a projection [B, N, N, H·D], its last axis split into heads

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Case:
    """One line of the grid; the letters are those of `docs/design.md`, rows, queries and keys all N."""

    N: int
    D: int
    H: int
    B: int
    dtype: torch.dtype
    mask: str
    layout: str

    @property
    def input_bytes(self) -> int:
        """What one set of inputs takes: q, k, v and grad_out, a gate in a model, the bias, the mask."""
        large = 5 if self.layout == "model" else 4
        per_pair = (large * self.H * self.D + self.H) * self.dtype.itemsize + 1
        return self.B * self.N * self.N * per_pair


@dataclass(frozen=True)
class InputSet:
    """Arguments of one call. `leaves` are what gradients are taken for: q, k, v, bias, and a model's gate."""

    leaves: tuple[Tensor, ...]
    mask: Tensor | None  # bool [B, N, N], True where a key is left out
    grad_out: Tensor

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        return (*self.leaves[:4], self.mask, *self.leaves[4:])


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def draw(case: Case, axes: str, device: torch.device, seed: int) -> InputSet:
    """Standard normal inputs, the same values for every peer, whatever the order of its axes.

    friendly: q, k, v dense in the peer's own order of axes, bias dense `[B, H, N, N]`.
    model: q, k, v and the gate `[B, N, N, H·D]`, bias `[B, N, N, H]`, as projections leave them.
    """
    B, N, H, D = case.B, case.N, case.H, case.D
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(case.dtype)

    large = [normal(B, N, N, H * D) for _ in range(4)]
    bias = normal(B, N, N, H)
    mask = None
    if case.mask == "padding":
        # The last tenth of the residues is none: as a crop or a batch of several lengths is filled up.
        mask = (torch.arange(N, device=device) >= max(1, round(0.9 * N))).expand(B, N, N).contiguous()
    elif case.mask == "random":
        # A tenth of the keys of each row, never all of them: nobody can pass over whole tiles.
        mask = torch.rand((B, N, N), generator=generator, device=device) < 0.1
        mask[..., 0] = False
    if case.layout == "model":
        *projections, grad_out = large
        leaves = [*projections, bias, normal(B, N, N, H * D)]
    else:
        *projections, grad_out = (heads(x, H, axes).contiguous() for x in large)
        leaves = [*projections, bias.permute(0, 3, 1, 2).contiguous()]
    return InputSet(tuple(x.requires_grad_() for x in leaves), mask, grad_out)


def heads(projection: Tensor, H: int, axes: str) -> Tensor:
    """`[B, N, N, H·D]` as a view in the given order of axes."""
    return _reorder(projection.unflatten(-1, (H, -1)), MODEL_AXES, axes)


def as_called(attend: Attend, case: Case, axes: str) -> Callable[..., Tensor]:
    """The function that is timed: the peer alone, or between projections and a gate as a model has it."""
    if case.layout == "friendly":
        return attend

    def gated(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, gate: Tensor) -> Tensor:
        q, k, v = (heads(x, case.H, axes) for x in (q, k, v))
        out = attend(q, k, v, bias.permute(0, 3, 1, 2), mask)
        return torch.sigmoid(gate) * _reorder(out, axes, MODEL_AXES).flatten(-2)

    return gated


def _reorder(x: Tensor, present: str, wanted: str) -> Tensor:
    return x.permute([present.index(axis) for axis in wanted])
