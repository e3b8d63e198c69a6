"""What the Hopper forward reads instead of the bias and the key term: two passes of N² and R·J work.

The bias is scaled and stored tile by tile in the order in which a warpgroup's accumulators lie in registers, so that
each thread loads 16 bytes of what its logits start from or have added: no layout conversion, no test for the end of
the keys (a key past the end has a bias that no row survives). Of the two bfloat16 in a word one is the word itself,
read as float32. Key terms become float32 in the unit of the product, padded to whole stages.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments, memory
from trifast_inductor.kernels.triangle_attention.launching import Launch
from trifast_inductor.kernels.triangle_attention.tiling import Tile

_TILE = Tile(BLOCK_I=1, BLOCK_J=1, num_warps=4, num_stages=1)


@triton.jit
def size_of(x):
    """|x|, infinite for a NaN."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def _bias_tiles(
    bias_ptr,
    tiles_ptr,
    sizes_ptr,  # [B, H, tiles_i, tiles_j]: the largest of each by size, infinite where there is a NaN
    stride_b: tl.int64,
    stride_h: tl.int64,
    stride_i: tl.int64,
    stride_j: tl.int64,
    H,
    I,
    J,
    tiles_i,
    tiles_j,
    factor,
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
    tl.store(tiles_ptr + tile.to(tl.int64) * WORDS + tl.arange(0, WORDS), word)


@triton.jit
def _key_terms(
    key_ptr,
    terms_ptr,  # [B, R, stages, STAGE_J]
    flags_ptr,  # [B, R, stages]
    stride_b: tl.int64,
    stride_r: tl.int64,
    stride_j: tl.int64,
    R,
    J,
    stages,
    inverse_scale,
    SELECT: tl.constexpr,
    STAGE_J: tl.constexpr,
):
    stage = tl.program_id(0)
    br = stage // stages
    of_stage = tl.arange(0, STAGE_J)
    j = stage % stages * STAGE_J + of_stage
    key_ptr += (br // R).to(tl.int64) * stride_b + (br % R).to(tl.int64) * stride_r
    key = tl.load(key_ptr + j.to(tl.int64) * stride_j, mask=j < J, other=0)
    terms = tl.where(key != 0, float("-inf"), 0.0) if SELECT else key.to(tl.float32) * inverse_scale
    tl.store(terms_ptr + stage.to(tl.int64) * STAGE_J + of_stage, terms)
    tl.store(flags_ptr + stage, tl.max((key != 0).to(tl.int32), 0))


class Tiles:
    """Makes, of a 16-bit bias times a factor, int32 words of two: `[tiles·BLOCK_I, BLOCK_J/2]`, as it is copied.

    And the largest bias of each tile by size, without the factor: `[B, H, tiles_i, tiles_j]`.
    """

    def __init__(self, bias: Tensor, factor: float, tiles_i: int, tiles_j: int, BLOCK_I: int, BLOCK_J: int) -> None:
        B, H, I, J = bias.shape
        count = B * H * tiles_i * tiles_j
        self._shape, self._sizes_shape = (count * BLOCK_I, BLOCK_J // 2), (B, H, tiles_i, tiles_j)
        sizes = {"H": H, "I": I, "J": J, "tiles_i": tiles_i, "tiles_j": tiles_j, "factor": factor}
        given = {**arguments.strides("", bias, "bhij"), **sizes}
        self._make = Launch(_bias_tiles, count, given, Tile(BLOCK_I, BLOCK_J, num_warps=4, num_stages=1))

    def __call__(self, bias: Tensor) -> tuple[Tensor, Tensor]:
        words = memory.empty(self._shape, torch.int32, bias)
        sizes = memory.empty(self._sizes_shape, torch.float32, bias)
        self._make(bias, words, sizes)
        return words, sizes


class KeyTerms:
    """Makes, of a key term or mask `[B, R, J]`, float32 over the scale, flat; and 1 where some key of a stage has one.

    A fill, which lies so low that no row survives it, becomes minus infinity. There is a flag more than there are
    stages, since the kernel reads ahead.
    """

    def __init__(self, key: Tensor, scale: float, stages: int, STAGE_J: int) -> None:
        B, R, J = key.shape
        programs = B * R * stages
        self._terms, self._flags = (programs * STAGE_J,), (programs + 1,)
        given = {
            **arguments.strides("", key, "brj"),
            "R": R,
            "J": J,
            "stages": stages,
            "inverse_scale": 1 / scale,
            "SELECT": not key.is_floating_point(),
            "STAGE_J": STAGE_J,
        }
        self._make = Launch(_key_terms, programs, given, _TILE)

    def __call__(self, key: Tensor) -> tuple[Tensor, Tensor]:
        terms = memory.empty(self._terms, torch.float32, key)
        flags = memory.empty(self._flags, torch.int32, key)
        self._make(key, terms, flags)
        return terms, flags
