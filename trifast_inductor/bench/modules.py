"""Whole modules in eager torch: triangle attention as OpenFold has it, and a block in the manner of the Pairformer.

Sources: Jumper et al. 2021, Supplementary Algorithms 11 to 14; Abramson et al. 2024, Supplementary Algorithm 17.
Nothing here knows of this package: the compiler has to find the attention by itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

Core = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
INF = 1e9


def eager_core(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """q, k, v `[B, R, H, N, D]`, bias `[B, 1, H, N, N]`, mask `[B, R, N]`, 1 where a key counts."""
    logits = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    logits += bias
    logits += (INF * (mask - 1))[:, :, None, None, :]
    return torch.matmul(torch.softmax(logits, -1), v)


def cuequivariance_core() -> Core:
    """The same by calling cuEquivariance; imported here, where no compiler is looking on."""
    importlib.import_module("cuequivariance_ops_torch")
    call = importlib.import_module("cuequivariance_torch").triangle_attention

    def core(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return call(q, k, v, bias, mask[:, :, None, None, :] > 0)

    return core


class TriangleAttention(nn.Module):
    """Gated attention along one axis of the pair representation `[B, N, N, C]`, biased by the other."""

    def __init__(self, C: int, H: int, D: int, *, ending: bool = False, core: Core = eager_core) -> None:
        super().__init__()
        self.H, self.ending, self.core = H, ending, core
        self.norm = nn.LayerNorm(C)
        self.q, self.k, self.v = (nn.Linear(C, H * D, bias=False) for _ in range(3))
        self.bias = nn.Linear(C, H, bias=False)
        self.gate = nn.Linear(C, H * D)
        self.out = nn.Linear(H * D, C)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        if self.ending:
            z, mask = z.transpose(1, 2), mask.transpose(1, 2)
        z = self.norm(z)
        q, k, v = (f(z).unflatten(-1, (self.H, -1)).transpose(2, 3) for f in (self.q, self.k, self.v))
        bias = self.bias(z).permute(0, 3, 1, 2)[:, None]
        attended = self.core(q, k, v, bias, mask).transpose(2, 3).flatten(-2)
        update = self.out(torch.sigmoid(self.gate(z)) * attended)
        return update.transpose(1, 2) if self.ending else update


class TriangleMultiplication(nn.Module):
    """Algorithms 11 (outgoing) and 12 (incoming)."""

    def __init__(self, C: int, *, incoming: bool = False) -> None:
        super().__init__()
        self.equation = "bkic,bkjc->bijc" if incoming else "bikc,bjkc->bijc"
        self.norm, self.norm_out = nn.LayerNorm(C), nn.LayerNorm(C)
        self.sides, self.gates = nn.Linear(C, 2 * C), nn.Linear(C, 2 * C)
        self.gate, self.out = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        z = self.norm(z)
        a, b = (mask[..., None] * torch.sigmoid(self.gates(z)) * self.sides(z)).chunk(2, -1)
        return torch.sigmoid(self.gate(z)) * self.out(self.norm_out(torch.einsum(self.equation, a, b)))


class SingleAttention(nn.Module):
    """Attention over residues with a bias from the pair representation; no rows."""

    def __init__(self, C: int, C_pair: int, H: int) -> None:
        super().__init__()
        self.H = H
        self.norm, self.norm_pair = nn.LayerNorm(C), nn.LayerNorm(C_pair)
        self.qkv, self.gate, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C), nn.Linear(C, C)
        self.bias = nn.Linear(C_pair, H, bias=False)

    def forward(self, s: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        s = self.norm(s)
        q, k, v = (x.unflatten(-1, (self.H, -1)).transpose(1, 2) for x in self.qkv(s).chunk(3, -1))
        logits = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
        logits = logits + self.bias(self.norm_pair(z)).permute(0, 3, 1, 2)
        logits = logits + (INF * (mask - 1))[:, None, None, :]
        attended = torch.matmul(torch.softmax(logits, -1), v).transpose(1, 2).flatten(-2)
        return self.out(torch.sigmoid(self.gate(s)) * attended)


class Transition(nn.Module):
    """SwiGLU, four times as wide inside."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.wide, self.out = nn.Linear(C, 8 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.wide(self.norm(x)).chunk(2, -1)
        return self.out(nn.functional.silu(a) * b)


class PairformerBlock(nn.Module):
    """Pair stack and single representation, without dropout."""

    def __init__(self, C: int, H: int, D: int, core: Core = eager_core, C_single: int = 384) -> None:
        super().__init__()
        self.outgoing, self.incoming = TriangleMultiplication(C), TriangleMultiplication(C, incoming=True)
        self.starting = TriangleAttention(C, H, D, core=core)
        self.ending = TriangleAttention(C, H, D, ending=True, core=core)
        self.transition, self.transition_single = Transition(C), Transition(C_single)
        self.single = SingleAttention(C_single, C, H=16)

    def forward(self, s: Tensor, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        z = z + self.outgoing(z, mask)
        z = z + self.incoming(z, mask)
        z = z + self.starting(z, mask)
        z = z + self.ending(z, mask)
        z = z + self.transition(z)
        s = s + self.single(s, z, mask[:, 0])
        return s + self.transition_single(s), z


class Residual(nn.Module):
    """The attention module alone, with its residual connection, called as the block is."""

    def __init__(self, C: int, H: int, D: int, core: Core = eager_core) -> None:
        super().__init__()
        self.attention = TriangleAttention(C, H, D, core=core)

    def forward(self, s: Tensor, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return s, z + self.attention(z, mask)


MODELS: dict[str, Callable[..., nn.Module]] = {"triangle attention": Residual, "pairformer block": PairformerBlock}
