"""The bias in the order in which threads hold a tile of logits: 16-byte loads, and nothing moves between threads.

A tile is read R times, its order is made once. Both orders are kept, `[i, j]` for dq and dbias and `[j, i]` for dk and
dv, in as much memory as the bias takes twice. Strips of 64 rows, 16 columns after 16: a tile is as many columns of a
strip as it likes.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments, memory
from trifast_inductor.kernels.triangle_attention.launching import Launch
from trifast_inductor.kernels.triangle_attention.tiling import Tile

_TILE = Tile(BLOCK_I=1, BLOCK_J=1, num_warps=4, num_stages=1)
SIDE = tl.constexpr(64)  # rows of a strip, which four warps share; its columns are rounded up to as many
SQUARE = tl.constexpr(2048)  # words of 64 rows by 64 columns
# A bias above which key terms are not added the short way: what they leave out might come back.
LOUD = tl.constexpr(4096.0)


@triton.jit
def leave_square(
    square,
    bias_ptr,
    words_ptr,  # [straight + turned squares, SQUARE]
    loud_ptr,  # [B, H, blocks of i, blocks of j]
    stride_b,
    stride_h,
    stride_i,
    stride_j,
    H,
    I,
    J,
    straight,  # so many squares are [i, j]; those that follow are [j, i]
):
    """Pairs of 16-bit elements, ordered as four warps hold an accumulator of `wgmma` (PTX ISA, m64nNk16)."""
    words_ptr += square.to(tl.int64) * SQUARE
    turned = square >= straight
    square = tl.where(turned, square - straight, square)
    rows = tl.where(turned, J, I)
    columns = tl.where(turned, I, J)
    across = tl.cdiv(columns, SIDE)
    bh = square // (across * tl.cdiv(rows, SIDE))
    # Bits of a word's place, lowest first: row 8, column 8, columns 2 and 4, rows 1 2 4, rows 16 32, columns from 16.
    word = tl.arange(0, SQUARE)[:, None]
    row = square // across % tl.cdiv(rows, SIDE) * SIDE + (word >> 7 & 3) * 16 + (word & 1) * 8 + (word >> 4 & 7)
    column = square % across * SIDE + (word >> 9) * 16 + (word >> 1 & 1) * 8 + (word >> 2 & 3) * 2
    column = column + tl.arange(0, 2)[None, :]
    bias_ptr += (bh // H).to(tl.int64) * stride_b + (bh % H).to(tl.int64) * stride_h
    row_step = tl.where(turned, stride_j, stride_i)
    column_step = tl.where(turned, stride_i, stride_j)
    offsets = row.to(tl.int64) * row_step + column.to(tl.int64) * column_step
    pair = tl.load(bias_ptr + offsets, mask=(row < rows) & (column < columns), other=0.0)
    low, high = tl.split(pair.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)
    tl.store(words_ptr + tl.arange(0, SQUARE), (high << 16) | low)
    quiet = tl.min(tl.min((pair.to(tl.float32) <= LOUD).to(tl.int32), 1), 0)  # a NaN is not
    tl.store(loud_ptr + square, 1 - quiet, mask=turned == 0)


@triton.jit
def _triangle_attention_bias_words(
    bias_ptr,
    words_ptr,
    loud_ptr,
    stride_b: tl.int64,
    stride_h: tl.int64,
    stride_i: tl.int64,
    stride_j: tl.int64,
    H,
    I,
    J,
    straight,
):
    square = tl.program_id(0)
    leave_square(square, bias_ptr, words_ptr, loud_ptr, stride_b, stride_h, stride_i, stride_j, H, I, J, straight)


@triton.jit
def unpack(words, dtype: tl.constexpr, COLUMNS: tl.constexpr):
    """`[64, COLUMNS]` in float32 of the words that `leave_square` stored."""
    if dtype == tl.bfloat16:
        high = (words & -65536).to(tl.float32, bitcast=True)
        low = (words << 16).to(tl.float32, bitcast=True)
    else:
        high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        low = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    x = tl.reshape(tl.join(low, high), [COLUMNS // 16, 4, 8, 4, 2, 2, 2])
    return tl.reshape(tl.permute(x, [1, 5, 2, 0, 4, 3, 6]), [64, COLUMNS])


class Made(NamedTuple):
    """`[i, j]`, `[j, i]`, and which squares hold anything loud."""

    straight: Tensor | None = None
    turned: Tensor | None = None
    loud: Tensor | None = None


class Room:
    """For both orders of a bias of one shape: where `squares` programs leave them."""

    def __init__(self, bias: Tensor) -> None:
        B, H, I, J = bias.shape
        self._loud_shape = (B, H, triton.cdiv(I, SIDE.value), triton.cdiv(J, SIDE.value))
        self.straight = B * H * self._loud_shape[2] * self._loud_shape[3]
        self.squares = 2 * self.straight

    def __call__(self, like: Tensor) -> tuple[Tensor, Tensor]:
        words = memory.empty((2, self.straight * SQUARE.value), torch.int32, like)
        return words, memory.empty(self._loud_shape, torch.int32, like)


class Words:
    """Makes both orders of a bias of one shape and layout, in a launch of their own."""

    def __init__(self, bias: Tensor | None) -> None:
        self._room: Room | None = None
        if bias is None:
            return
        self._room = Room(bias)
        _, H, I, J = bias.shape
        given = {**arguments.strides("", bias, "bhij"), "H": H, "I": I, "J": J, "straight": self._room.straight}
        self._make = Launch(_triangle_attention_bias_words, self._room.squares, given, _TILE)

    def __call__(self, bias: Tensor | None) -> Made:
        if bias is None or self._room is None:
            return Made()
        words, loud = self._room(bias)
        self._make(bias, words, loud)
        return Made(words[0], words[1], loud)
