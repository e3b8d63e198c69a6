"""Triangle attention in plain torch, a few rows at a time: the default for CPU tensors and for float64.

    x = scale·q·kᵀ + bias (⊕ key term);  p = softmax(x);  out = p·v
    dv = pᵀ·g;  ds = p ∘ (g·vᵀ - Σ_j p ∘ g·vᵀ);  dq = scale·ds·k;  dk = scale·dsᵀ·q;  dbias = Σ_r ds

The logits of one chunk of (batch, row, head) live in a buffer that stays in cache and is used again for the next
chunk, so the N³ logits never exist. Shapes and the key term are described in `op.py`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 20


def _chunks(q: Tensor, keys: int, dtype: torch.dtype) -> tuple[int, list[tuple[slice, slice, slice]]]:
    """Slices of (batch, row, head) whose logits fit `CHUNK_BYTES`, and the most heads × rows that one holds."""
    b, r, i, h, _ = q.shape
    room = CHUNK_BYTES // (i * keys * dtype.itemsize)
    steps = []
    most = 1
    for size in (h, r, b):
        step = max(1, min(size, room))
        room //= step
        most *= step
        steps.append(step)
    step_h, step_r, step_b = steps
    return most, [
        (slice(b0, min(b0 + step_b, b)), slice(r0, min(r0 + step_r, r)), slice(h0, min(h0 + step_h, h)))
        for b0 in range(0, b, step_b)
        for r0 in range(0, r, step_r)
        for h0 in range(0, h, step_h)
    ]


def _matrices(x: Tensor, chunk: tuple[slice, slice, slice], dtype: torch.dtype) -> Tensor:
    """`[b·r·h, N, D]` in `dtype`, of `[B, R, N, H, D]`."""
    bs, rs, hs = chunk
    heads_first = x[bs, rs, :, hs].transpose(2, 3)
    return heads_first.to(dtype, memory_format=torch.contiguous_format).flatten(0, 2)
