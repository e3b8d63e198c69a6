"""The bias in the order in which threads hold a tile of logits: 16-byte loads, and nothing moves between threads.

A tile is read R times, its order is made once. Both orders are kept, `[i, j]` for dbias and dq and `[j, i]` for dk and
dv, in as much memory as the bias takes twice.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments
from trifast_inductor.kernels.triangle_attention.launching import Launch
from trifast_inductor.kernels.triangle_attention.tiling import Tile

_TILE = Tile(BLOCK_I=1, BLOCK_J=1, num_warps=4, num_stages=1)


@triton.jit
def _triangle_attention_bias_words(
    bias_ptr,
    words_ptr,
    stride_b: tl.int64,
    stride_h: tl.int64,
    stride_i: tl.int64,
    stride_j: tl.int64,
    H,
    I,
    J,
    straight,  # so many tiles are [i, j]; those that follow are [j, i]
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Pairs of 16-bit elements, ordered as WARPS warps hold an accumulator of `wgmma` (PTX ISA, m64nNk16)."""
    WORDS: tl.constexpr = ROWS * COLUMNS // 2
    tile = tl.program_id(0)
    words_ptr += tile.to(tl.int64) * WORDS
    turned = tile >= straight
    tile = tl.where(turned, tile - straight, tile)
    rows = tl.where(turned, J, I)
    columns = tl.where(turned, I, J)
    tiles = tl.cdiv(columns, COLUMNS)
    bh = tile // (tiles * tl.cdiv(rows, ROWS))
    first_row = tile // tiles % tl.cdiv(rows, ROWS) * ROWS
    first_column = tile % tiles * COLUMNS
    # Bits of a word's place, lowest first: row 8, column 8, columns 2 and 4, rows 1 2 4, rows from 16 on, the rest.
    word = tl.arange(0, WORDS)[:, None]
    block = word // (128 * WARPS)
    row = (
        first_row + (block // (COLUMNS // 16) * WARPS + (word >> 7 & WARPS - 1)) * 16 + (word & 1) * 8 + (word >> 4 & 7)
    )
    column = first_column + block % (COLUMNS // 16) * 16 + (word >> 1 & 1) * 8 + (word >> 2 & 3) * 2
    column = column + tl.arange(0, 2)[None, :]
    bias_ptr += (bh // H).to(tl.int64) * stride_b + (bh % H).to(tl.int64) * stride_h
    row_step = tl.where(turned, stride_j, stride_i)
    column_step = tl.where(turned, stride_i, stride_j)
    offsets = row.to(tl.int64) * row_step + column.to(tl.int64) * column_step
    pair = tl.load(bias_ptr + offsets, mask=(row < rows) & (column < columns), other=0.0)
    low, high = tl.split(pair.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)
    tl.store(words_ptr + tl.arange(0, WORDS), (high << 16) | low)


@triton.jit
def unpack(words, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """`[ROWS, COLUMNS]` in float32 of the words that `_triangle_attention_bias_words` stored."""
    if dtype == tl.bfloat16:
        high = (words & -65536).to(tl.float32, bitcast=True)
        low = (words << 16).to(tl.float32, bitcast=True)
    else:
        high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        low = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    x = tl.reshape(tl.join(low, high), [ROWS // (16 * WARPS), COLUMNS // 16, WARPS, 8, 4, 2, 2, 2])
    return tl.reshape(tl.permute(x, [0, 2, 6, 3, 1, 5, 4, 7]), [ROWS, COLUMNS])


class Words:
    """Makes both orders of a bias of one shape and layout."""

    def __init__(self, bias: Tensor | None, by_i: Tile, by_j: Tile) -> None:
        self._makers: list[Launch] = []
        if bias is None:
            return
        B, H, I, J = bias.shape
        counts = [B * H * triton.cdiv(I, tile.BLOCK_I) * triton.cdiv(J, tile.BLOCK_J) for tile in (by_i, by_j)]
        shapes = [(by_i.BLOCK_I, by_i.BLOCK_J, by_i.num_warps), (by_j.BLOCK_J, by_j.BLOCK_I, by_j.num_warps)]
        self._sizes = [count * shape[0] * shape[1] // 2 for count, shape in zip(counts, shapes, strict=True)]
        given = {**arguments.strides("", bias, "bhij"), "H": H, "I": I, "J": J}
        one_launch = [(sum(counts), counts[0], shapes[0])]
        two_launches = [(counts[0], counts[0], shapes[0]), (counts[1], 0, shapes[1])]
        for programs, straight, (rows, columns, warps) in one_launch if shapes[0] == shapes[1] else two_launches:
            order = {"straight": straight, "ROWS": rows, "COLUMNS": columns, "WARPS": warps}
            self._makers.append(Launch(_triangle_attention_bias_words, programs, {**given, **order}, _TILE))

    def __call__(self, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """`[i, j]` and `[j, i]`."""
        if bias is None:
            return None, None
        words = torch.empty(sum(self._sizes), dtype=torch.int32, device=bias.device)
        by_i, by_j = words.split(self._sizes)
        # One launch fills both, or each its own.
        for make, part in zip(self._makers, (by_i, by_j), strict=False):
            make(bias, part)
        return by_i, by_j
