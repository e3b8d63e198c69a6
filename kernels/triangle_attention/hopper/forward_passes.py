"""What stands before the Hopper forward: one launch, whose programs do one of three things, of N² and R·J work.

**Words of the bias.** The bias is scaled and stored tile by tile in the order in which a warpgroup's accumulators lie
in registers, so that each thread loads 16 bytes of what its logits start from or have added: no layout conversion, no
test for the end of the keys (a key past the end has a bias that no row survives). Of the two bfloat16 in a word one is
the word itself, read as float32.

**Key terms** become float32 in the unit of the product, padded to whole stages. A row with no key left, as behind the
last residue, is told of and has row sums of NaN, for `forward.py` to pass over and `again.py` to do.

**Rows of the bias** are for `again.py`, where the bias cannot be read as it lies (`triangle_attention/bias.py`).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments, memory
from trifast_inductor.kernels.triangle_attention.bias import ROW, copy_row, programs_to_copy, shape_of_copy
from trifast_inductor.kernels.triangle_attention.hopper import choice
from trifast_inductor.kernels.triangle_attention.launching import Launch
from trifast_inductor.kernels.triangle_attention.tiling import Tile

LEFT_OUT = tl.constexpr(choice.LEFT_OUT)
STAGES_AT_ONCE = tl.constexpr(8)


@triton.jit
def size_of(x):
    """|x|, infinite for a NaN."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def _words_of_tile(
    bias_ptr, words_ptr, sizes_ptr, strides, H, I, J, tiles_i, tiles_j, factor, tile,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    bh = tile // (tiles_j * tiles_i)
    i = tile // tiles_j % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tile % tiles_j * BLOCK_J + tl.arange(0, BLOCK_J)
    in_range = (i < I)[:, None] & (j < J)[None, :]
    bias_ptr += (bh // H).to(tl.int64) * strides[0] + (bh % H).to(tl.int64) * strides[1]
    ptrs = bias_ptr + i.to(tl.int64)[:, None] * strides[2] + j.to(tl.int64)[None, :] * strides[3]
    bias = tl.load(ptrs, mask=in_range, other=0.0).to(tl.float32)
    tl.store(sizes_ptr + tile, tl.max(tl.max(size_of(bias), 1), 0))
    x = bias * factor
    dtype: tl.constexpr = bias_ptr.dtype.element_ty
    # Where a bias is out of range, so is its logit, and the row's sum or shift shows it.
    if dtype == tl.bfloat16:
        # All finite, since a high half is read together with the low half below it.
        x = tl.where(x == x, tl.minimum(tl.maximum(x, -3.3e38), 3.3e38), x)
        x = tl.where((j < J)[None, :], x, -3.3e38)
    else:
        x = tl.where((j < J)[None, :], x, float("-inf"))
    # A warp holds 16 rows, a lane two of them, 8 apart, and pairs of columns; words join columns 8 apart.
    x = x.reshape([BLOCK_I // 16, 2, 8, BLOCK_J // 16, 2, 4, 2]).permute([3, 0, 2, 5, 1, 6, 4])
    WORDS: tl.constexpr = BLOCK_I * BLOCK_J // 2
    high, low = x.reshape([WORDS, 2]).split()
    if dtype == tl.bfloat16:
        high, low = high.to(tl.uint32, bitcast=True), low.to(tl.uint32, bitcast=True)
        # The NaN with all bits set, as a multiplication leaves it, would be rounded to zero.
        size = tl.minimum(low & 0x7FFFFFFF, 0x7FC00000)
        low = (low & 0x80000000 | size + 0x8000) >> 16
        # The whole word is the float32 nearest to the value among those that end in these bits: as near as bfloat16.
        size = tl.minimum(high & 0x7FFFFFFF, 0x7FC00000)
        high = high & 0x80000000 | (tl.maximum(size + 0x8000, low) - low) & 0xFFFF0000
    else:
        low = low.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
        high = high.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    word = (high | low).to(tl.int32, bitcast=True)
    tl.store(words_ptr + tile.to(tl.int64) * WORDS + tl.arange(0, WORDS), word)


@triton.jit
def _terms_of_row(
    key_ptr, terms_ptr, flags_ptr, left_out_ptr, row_sum_ptr, strides, R, H, I, J, stages, factor, row,
    SELECT: tl.constexpr, STAGE_J: tl.constexpr,
):  # fmt: skip
    of_stage = tl.arange(0, STAGE_J)[None, :]
    key_ptr += (row // R).to(tl.int64) * strides[0] + (row % R).to(tl.int64) * strides[1]
    some_left = tl.zeros([STAGES_AT_ONCE], tl.int32)
    for first in range(0, stages, STAGES_AT_ONCE):
        stage = first + tl.arange(0, STAGES_AT_ONCE)
        j = stage[:, None] * STAGE_J + of_stage
        key = tl.load(key_ptr + j.to(tl.int64) * strides[2], mask=j < J, other=0)
        terms = tl.where(key != 0, float("-inf"), 0.0) if SELECT else key.to(tl.float32) * factor
        is_left = key == 0 if SELECT else ~(key.to(tl.float32) < LEFT_OUT)
        some_left = tl.maximum(some_left, tl.max((is_left & (j < J)).to(tl.int32), 1))
        at = row.to(tl.int64) * stages + stage
        tl.store(terms_ptr + at[:, None] * STAGE_J + of_stage, terms, mask=(stage < stages)[:, None])
        tl.store(flags_ptr + at, tl.max((key != 0).to(tl.int32), 1), mask=stage < stages)
    left_out = 1 - tl.max(some_left, 0)
    tl.store(left_out_ptr + row, left_out)
    if left_out != 0:
        row_sum_ptr += row.to(tl.int64) * H * I
        for first in range(0, H * I, 512):
            n = first + tl.arange(0, 512)
            tl.store(row_sum_ptr + n, tl.full([512], float("nan"), tl.float32), mask=n < H * I)


@triton.jit
def _triangle_attention_fwd_prepare(
    bias_ptr,
    key_ptr,
    words_ptr,  # [B·H·tiles_i·tiles_j·BLOCK_I, BLOCK_J/2]
    sizes_ptr,  # [B, H, tiles_i, tiles_j]: the largest of each by size, infinite where there is a NaN
    terms_ptr,  # [B, R, stages, STAGE_J]
    flags_ptr,  # [B, R, stages]
    left_out_ptr,  # [B, R]
    row_sum_ptr,  # [B, R, H, I] contiguous
    rows_ptr,  # [B, H, I, J_bias] contiguous
    stride_bias_b: tl.int64,
    stride_bias_h: tl.int64,
    stride_bias_i: tl.int64,
    stride_bias_j: tl.int64,
    stride_key_b: tl.int64,
    stride_key_r: tl.int64,
    stride_key_j: tl.int64,
    R,
    H,
    I,
    J,
    J_bias,
    tiles,  # programs that make words
    rows_of_all,  # programs that make key terms
    tiles_i,
    tiles_j,
    stages,
    factor,
    HAS_KEY_TERM: tl.constexpr,
    SELECT: tl.constexpr,
    WITH_ROWS: tl.constexpr,
    STAGE_J: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    pid = tl.program_id(0)
    of_bias = (stride_bias_b, stride_bias_h, stride_bias_i, stride_bias_j)
    if pid < tiles:
        _words_of_tile(
            bias_ptr, words_ptr, sizes_ptr, of_bias, H, I, J, tiles_i, tiles_j, factor, pid, BLOCK_I, BLOCK_J
        )  # fmt: skip
    elif HAS_KEY_TERM and pid < tiles + rows_of_all:
        of_key = (stride_key_b, stride_key_r, stride_key_j)
        _terms_of_row(
            key_ptr, terms_ptr, flags_ptr, left_out_ptr, row_sum_ptr, of_key, R, H, I, J, stages, factor, pid - tiles,
            SELECT, STAGE_J,
        )  # fmt: skip
    elif WITH_ROWS:
        copy_row(bias_ptr, rows_ptr, of_bias, H, I, J, J_bias, pid - tiles - rows_of_all, ROW)


class Prepared(NamedTuple):
    """Words of the bias over the scale, `[tiles·BLOCK_I, BLOCK_J/2]`, in int32, as they are copied.

    The largest bias of each tile by size, not scaled: `[B, H, tiles_i, tiles_j]`. Key terms over the scale, flat, in
    float32, 1 where some key of a stage has one, and 1 for each row `[B, R]` in which no key is left; None without one.
    And the bias in aligned rows.
    """

    words: Tensor
    sizes: Tensor
    terms: Tensor | None
    flags: Tensor | None
    left_out: Tensor | None
    rows: Tensor


class Prepare:
    """Makes it of a 16-bit bias `[B, H, I, J]` and a key term or mask `[B, R, J]`, of one shape and layout.

    A fill of the mask, which lies so low that no row survives it, becomes minus infinity.
    """

    def __init__(
        self, bias: Tensor, key: Tensor | None, scale: float, tiles: tuple[int, int], shape: tuple[int, int, int]
    ) -> None:
        """
        Args:
            tiles: of the bias, along queries and keys.
            shape: BLOCK_I and BLOCK_J of a tile; STAGE_J, keys of a stage.
        """
        B, H, I, J = bias.shape
        BLOCK_I, BLOCK_J, STAGE_J = shape
        count = B * H * tiles[0] * tiles[1]
        stages = tiles[1] * BLOCK_J // STAGE_J
        rows_of_all = 0 if key is None else B * key.shape[1]
        self._words, self._sizes = (count * BLOCK_I, BLOCK_J // 2), (B, H, *tiles)
        # There is a flag more than there are stages, since the kernel reads ahead.
        self._terms, self._flags = (rows_of_all * stages * STAGE_J,), (rows_of_all * stages + 1,)
        self._left_out = (rows_of_all,)
        self._rows = shape_of_copy(bias)
        programs = count + rows_of_all
        if self._rows is not None:
            programs += programs_to_copy(self._rows)
        given = {
            **arguments.strides("bias_", bias, "bhij"),
            **arguments.strides("key_", key, "brj"),
            "R": 1 if key is None else key.shape[1],
            "H": H,
            "I": I,
            "J": J,
            "J_bias": J if self._rows is None else self._rows[3],
            "tiles": count,
            "rows_of_all": rows_of_all,
            "tiles_i": tiles[0],
            "tiles_j": tiles[1],
            "stages": stages,
            "factor": 1 / scale,
            "HAS_KEY_TERM": key is not None,
            "SELECT": key is not None and not key.is_floating_point(),
            "WITH_ROWS": self._rows is not None,
            "STAGE_J": STAGE_J,
        }
        tile = Tile(BLOCK_I, BLOCK_J, num_warps=4, num_stages=1)
        self._make = Launch(_triangle_attention_fwd_prepare, programs, given, tile)

    def rows(self, bias: Tensor) -> Tensor:
        """The bias itself, or memory for its copy."""
        return bias if self._rows is None else memory.empty(self._rows, bias.dtype, bias)

    def __call__(self, bias: Tensor, key: Tensor | None, row_sum: Tensor) -> Prepared:
        """
        Args:
            row_sum: `[B, R, H, I]`, contiguous; written where no key of a row is left.
        """
        words = memory.empty(self._words, torch.int32, bias)
        sizes = memory.empty(self._sizes, torch.float32, bias)
        terms = flags = left_out = None
        if key is not None:
            terms = memory.empty(self._terms, torch.float32, bias)
            flags = memory.empty(self._flags, torch.int32, bias)
            left_out = memory.empty(self._left_out, torch.int32, bias)
        rows = self.rows(bias)
        copy = None if self._rows is None else rows
        self._make(bias, key, words, sizes, terms, flags, left_out, None if key is None else row_sum, copy)
        return Prepared(words, sizes, terms, flags, left_out, rows)
