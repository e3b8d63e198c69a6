"""What the Hopper forward reads instead of the bias and of a clean key term: two passes of N² and R·J work.

The bias is divided by the scale and stored tile by tile in the order in which a warpgroup's accumulators lie in
registers, so that each thread loads 16 bytes and the first product starts from them: no layout conversion, no
addition, no test for the end of the keys (a key past the end has a bias of -inf).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _bias_tiles(
    bias_ptr,
    tiles_ptr,
    stride_b: tl.int64,
    stride_h: tl.int64,
    stride_i: tl.int64,
    stride_j: tl.int64,
    H,
    I,
    J,
    tiles_i,
    tiles_j,
    inverse_scale,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    tile = tl.program_id(0)
    bh = tile // (tiles_j * tiles_i)
    i = tile // tiles_j % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tile % tiles_j * BLOCK_J + tl.arange(0, BLOCK_J)
    in_range = (i < I)[:, None] & (j < J)[None, :]
    bias_ptr += (bh // H).to(tl.int64) * stride_b + (bh % H).to(tl.int64) * stride_h
    ptrs = bias_ptr + i.to(tl.int64)[:, None] * stride_i + j.to(tl.int64)[None, :] * stride_j
    bias = tl.load(ptrs, mask=in_range, other=0.0).to(tl.float32)
    x = bias * inverse_scale
    # A finite bias stays finite: a row of the lowest float is uniform, a row of -inf is not.
    dtype: tl.constexpr = bias_ptr.dtype.element_ty
    largest: tl.constexpr = 3.3e38 if dtype == tl.bfloat16 else 65504.0
    x = tl.where(tl.abs(bias) < float("inf"), tl.minimum(tl.maximum(x, -largest), largest), bias)
    x = tl.where((j < J)[None, :], x, float("-inf")).to(dtype).to(tl.uint16, bitcast=True).to(tl.int32)
    # A warp holds 16 rows, a lane two of them, 8 apart, and pairs of columns; words join columns 8 apart.
    x = x.reshape([BLOCK_I // 16, 2, 8, BLOCK_J // 16, 2, 4, 2]).permute([3, 0, 2, 5, 1, 6, 4])
    WORDS: tl.constexpr = BLOCK_I * BLOCK_J // 2
    high, low = x.reshape([WORDS, 2]).split()
    tl.store(tiles_ptr + tile.to(tl.int64) * WORDS + tl.arange(0, WORDS), (high << 16) | low)


@triton.jit
def _key_flags(
    key_ptr,
    flags_ptr,  # [B, R, tiles_j]
    stride_b: tl.int64,
    stride_r: tl.int64,
    stride_j: tl.int64,
    R,
    J,
    tiles_j,
    BLOCK_J: tl.constexpr,
):
    tile = tl.program_id(0)
    br = tile // tiles_j
    j = tile % tiles_j * BLOCK_J + tl.arange(0, BLOCK_J)
    key_ptr += (br // R).to(tl.int64) * stride_b + (br % R).to(tl.int64) * stride_r
    key = tl.load(key_ptr + j.to(tl.int64) * stride_j, mask=j < J, other=0)
    tl.store(flags_ptr + tile, tl.max((key != 0).to(tl.int32), 0))


def tiles(bias: Tensor, scale: float, tiles_i: int, tiles_j: int, BLOCK_I: int, BLOCK_J: int) -> Tensor:
    """A 16-bit bias over the scale, in int32 words of two; with two tiles more, since the kernel reads ahead."""
    B, H, I, J = bias.shape
    count = B * H * tiles_i * tiles_j
    words = torch.empty((count + 2) * BLOCK_I * BLOCK_J // 2, dtype=torch.int32, device=bias.device)
    _bias_tiles[(count,)](bias, words, *bias.stride(), H, I, J, tiles_i, tiles_j, 1 / scale, BLOCK_I, BLOCK_J)
    return words


def key_flags(key: Tensor, tiles_j: int, BLOCK_J: int) -> Tensor:
    """1 where some key of a tile is masked; one flag more than there are, as above."""
    B, R, J = key.shape
    flags = torch.empty(B * R * tiles_j + 1, dtype=torch.int32, device=key.device)
    _key_flags[(B * R * tiles_j,)](key, flags, *key.stride(), R, J, tiles_j, BLOCK_J)
    return flags
