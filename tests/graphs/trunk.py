"""A small trunk and its training: two Pairformer-like blocks that learn to tell distances between points."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

C, H, D = 16, 2, 8


class TriangleAttention(nn.Module):
    """Around the starting or the ending node, as OpenFold and its descendants spell it."""

    def __init__(self, ending: bool) -> None:
        super().__init__()
        self.ending = ending
        self.norm = nn.LayerNorm(C)
        self.qkv, self.bias = nn.Linear(C, 3 * H * D, bias=False), nn.Linear(C, H, bias=False)
        self.gate, self.out = nn.Linear(C, H * D), nn.Linear(H * D, C)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        if self.ending:
            z, mask = z.transpose(1, 2), mask.transpose(1, 2)
        x = self.norm(z)
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).permute(3, 0, 1, 4, 2, 5)
        a = torch.matmul(q * D**-0.5, k.transpose(-1, -2))
        a = a + (1e9 * (mask - 1))[:, :, None, None, :]
        a = a + self.bias(x).permute(0, 3, 1, 2)[:, None]
        o = torch.matmul(a.softmax(-1), v).transpose(2, 3).flatten(-2)
        o = self.out(torch.sigmoid(self.gate(x)) * o)
        return o.transpose(1, 2) if self.ending else o


class TriangleMultiplication(nn.Module):
    """Outgoing edges."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.both, self.out = nn.LayerNorm(C), nn.Linear(C, 2 * C), nn.Linear(C, C)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        a, b = (self.both(self.norm(z)) * mask[..., None]).chunk(2, -1)
        return self.out(torch.einsum("bikc,bjkc->bijc", a, b) / z.shape[1])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.multiplication = TriangleMultiplication()
        self.starting, self.ending = TriangleAttention(False), TriangleAttention(True)
        self.transition = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 2 * C), nn.ReLU(), nn.Linear(2 * C, C))

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        z = z + self.multiplication(z, mask)
        z = z + self.starting(z, mask)
        z = z + self.ending(z, mask)
        return z + self.transition(z)


class Trunk(nn.Module):
    """[B, N, N, 3] features and a mask to the distance of each pair."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(3, C), nn.ModuleList([Block(), Block()]), nn.Linear(C, 1)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        z = self.embed(features)
        for block in self.blocks:
            z = block(z, mask)
        return self.head(z).squeeze(-1)


def batch(step: int, N: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random points; seen are distances of neighbours along the chain and some noise, asked for are all."""
    generator = torch.Generator().manual_seed(step)
    points = torch.randn(2, N, 3, generator=generator).cumsum(1) / 2
    distances = (points[:, :, None] - points[:, None]).norm(dim=-1)
    near = (torch.arange(N)[:, None] - torch.arange(N)).abs() <= 2
    noise = torch.randn(2, N, N, generator=generator)
    features = torch.stack([distances * near, near.expand_as(distances).float(), noise], -1)
    kept = torch.ones(2, N)
    kept[1, N - N // 4 :] = 0
    mask = kept[:, :, None] * kept[:, None, :]
    return features.to(device), mask.to(device), distances.to(device)


def losses(
    steps: int,
    *,
    backend: str | Callable[..., object] | None = None,
    N: int = 24,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[float]:
    """Of a training; each block is compiled, so that one graph serves both.

    Args:
        backend: torch.compile's; None for eager.
        dtype: of weights and arithmetic; float64 stands for exact.
    """
    torch.manual_seed(seed)
    trunk = Trunk().to(device, dtype)
    if backend is not None:
        for block in trunk.blocks:
            block.compile(backend=backend, dynamic=False)
    optimiser = torch.optim.Adam(trunk.parameters(), lr=3e-3)
    found = []
    for step in range(steps):
        features, mask, distances = (t.to(dtype) for t in batch(step + 10_000 * seed, N, device))
        loss = ((trunk(features, mask) - distances).square() * mask).sum() / mask.sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    return found


def apart(curve: list[float], other: list[float]) -> float:
    """The largest relative difference of two curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(curve, other, strict=True))
