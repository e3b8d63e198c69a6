"""What the passes before dbias leave for it."""

import torch
from torch import Tensor

from trifast_inductor.kernels.triangle_attention.hopper.lists import Lists, OfDbias
from trifast_inductor.kernels.triangle_attention.hopper.query_terms import QueryTerms

from .dbias_cases import Given


def terms_of(g: Given) -> tuple[Tensor, Tensor]:
    """Tiles of shift and δ, and flags of blocks of 64 queries `[B, H, blocks, R]`."""
    B, R, I, H, _ = g.x.q.shape
    terms, huge = torch.empty_like(g.terms), torch.empty((B, R, H, -(-I // 64)), dtype=torch.int32, device=g.x.q.device)
    bias = g.x.bias.to(g.x.q.dtype)  # whose words are not used here
    make = QueryTerms(g.x.grad_out, bias, tiled=True)
    _, tiles, flags = make(bias, g.x.grad_out, g.out.contiguous(), g.row_max, g.row_sum, (terms, huge))
    torch.testing.assert_close(terms, g.terms, rtol=1e-5, atol=1e-5, equal_nan=True)
    return tiles, flags


def prepared(g: Given) -> tuple[Tensor, OfDbias]:
    """What the kernel is given besides its operands: tiles of shift and δ; lists, and key terms in tiles."""
    row_tiles, flags = terms_of(g)
    return row_tiles, listed(flags, g.x.k.shape[2], g.key, g.x.scale)


def listed(flags: Tensor, J: int = 1, key: Tensor | None = None, scale: float = 1.0) -> OfDbias:
    B, H, blocks, R = flags.shape
    huge = torch.zeros((B * R * H * blocks,), dtype=torch.int32, device=flags.device)
    spans = torch.zeros((B, R, 2), dtype=torch.int32, device=flags.device)
    listed = Lists(B, R, H, 64 * blocks, J, key, scale, tiled=True)(huge, spans, flags, key)
    assert listed.of_dbias is not None
    return listed.of_dbias
