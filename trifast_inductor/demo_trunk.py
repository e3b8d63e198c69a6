"""A trunk for the demo where transformers is not installed: plain eager torch, sizes and call of ESMFold's.

Jumper et al. 2021, Supplementary Algorithms 11 to 15, and Abramson et al. 2024, Algorithms 17 and 24: triangle
multiplication and attention, both nodes each, transitions, and sequence attention with pair bias. As eager models have
it, every attention makes its logits, adds mask and bias in place, and keeps its probabilities for the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

HEADS, HEAD_SIZE = 4, 32
_MASKED = 1e9  # what OpenFold and its descendants subtract from the logits of padding


class StandInTrunk(nn.Module):
    """Blocks over a sequence `[B, N, 1024]` and a pair representation `[B, N, N, 128]`."""

    def __init__(self, blocks: int, sequence: int = 1024, pair: int = 128) -> None:
        super().__init__()
        self.relative = nn.Embedding(65, pair)
        self.blocks = nn.ModuleList(_Block(sequence, pair) for _ in range(blocks))

    def forward(
        self, s: Tensor, z: Tensor, _residues: Tensor, index: Tensor, mask: Tensor, _: int
    ) -> dict[str, Tensor]:
        """Named and ordered as the published trunk has it; it reads residues through `s` alone."""
        z = z + self.relative((index[:, :, None] - index[:, None, :]).clamp(-32, 32) + 32)
        for block in self.blocks:
            s, z = block(s, z, mask)
        return {"s_s": s, "s_z": z}


class _Block(nn.Module):
    def __init__(self, sequence: int, pair: int) -> None:
        super().__init__()
        self.multiplications = nn.ModuleList(_TriangleMultiplication(pair, outgoing) for outgoing in (True, False))
        self.starting, self.ending = _TriangleAttention(pair), _TriangleAttention(pair)
        self.pair_transition, self.sequence_transition = _transition(pair), _transition(sequence)
        self.sequence_norm, self.pair_norm = nn.LayerNorm(sequence), nn.LayerNorm(pair)
        self.sequence_attention = _GatedAttention(sequence)
        self.bias = nn.Linear(pair, HEADS, bias=False)

    def forward(self, s: Tensor, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        pair_mask = mask[:, :, None] * mask[:, None, :]
        for multiplication in self.multiplications:
            z = z + multiplication(z, pair_mask)
        z = z + self.starting(z, pair_mask)
        z = z + self.ending(z.transpose(1, 2), pair_mask.transpose(1, 2)).transpose(1, 2)
        z = z + self.pair_transition(z)
        bias = self.bias(self.pair_norm(z)).permute(0, 3, 1, 2)
        s = s + self.sequence_attention(self.sequence_norm(s), bias, _MASKED * (mask - 1)[:, None, None])
        return s + self.sequence_transition(s), z


class _GatedAttention(nn.Module):
    """Attention over the last axis but one, any axes in front, with addends to the logits."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(c, HEADS * HEAD_SIZE, bias=False) for _ in range(3))
        self.gate, self.out = nn.Linear(c, HEADS * HEAD_SIZE), nn.Linear(HEADS * HEAD_SIZE, c)

    def forward(self, x: Tensor, bias: Tensor, mask_bias: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, HEAD_SIZE)).transpose(-2, -3) for p in (self.q, self.k, self.v))
        logits = torch.matmul(q * HEAD_SIZE**-0.5, k.transpose(-1, -2))
        logits += mask_bias
        logits += bias
        out = torch.matmul(torch.softmax(logits, -1), v).transpose(-2, -3).flatten(-2)
        return self.out(torch.sigmoid(self.gate(x)) * out)


class _TriangleAttention(nn.Module):
    """Around the starting node; the ending node is the same on a transposed pair representation."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm, self.bias, self.attention = nn.LayerNorm(c), nn.Linear(c, HEADS, bias=False), _GatedAttention(c)

    def forward(self, z: Tensor, pair_mask: Tensor) -> Tensor:
        x = self.norm(z)
        bias = self.bias(x).permute(0, 3, 1, 2)[:, None]  # [B, 1, H, N, N]: one for all rows
        return self.attention(x, bias, _MASKED * (pair_mask - 1)[:, :, None, None])


class _TriangleMultiplication(nn.Module):
    def __init__(self, c: int, outgoing: bool) -> None:
        super().__init__()
        self.equation = "bikc,bjkc->bijc" if outgoing else "bkic,bkjc->bijc"
        self.norm, self.out_norm = nn.LayerNorm(c), nn.LayerNorm(c)
        self.edges, self.edge_gates, self.gate, self.out = (nn.Linear(c, n * c) for n in (2, 2, 1, 1))

    def forward(self, z: Tensor, pair_mask: Tensor) -> Tensor:
        x = self.norm(z)
        a, b = (pair_mask[..., None] * torch.sigmoid(self.edge_gates(x)) * self.edges(x)).chunk(2, -1)
        product = self.out(self.out_norm(torch.einsum(self.equation, a, b)))
        return torch.sigmoid(self.gate(x)) * product


def _transition(c: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(c), nn.Linear(c, 4 * c), nn.ReLU(), nn.Linear(4 * c, c))
