"""What a backward prepares first, in one launch of plain Triton: words of the bias, and terms of the queries.

L and δ are left as `lean/operands.py` leaves them, with what is unusual about them, for the other kernels, too; and as
`dbias.py` takes them, tile by tile.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments, memory
from trifast_inductor.kernels.triangle_attention.hopper.dbias_passes import flags_of_queries, leave_tile_of_queries
from trifast_inductor.kernels.triangle_attention.launching import Launch
from trifast_inductor.kernels.triangle_attention.lean.operands import flag_of, leave_terms, load
from trifast_inductor.kernels.triangle_attention.lean.words import Made, Room, leave_square
from trifast_inductor.kernels.triangle_attention.tiling import Tile

_TILE = Tile(BLOCK_I=64, BLOCK_J=16, num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=["straight"])
def _triangle_attention_bwd_query_terms(
    bias_ptr,
    words_ptr,  # of `lean/words.py`
    loud_ptr,
    do_ptr,
    out_ptr,  # [B, R, I, H, D] contiguous
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
    terms_ptr,  # [B, R, H, I, 2] contiguous: L and δ
    huge_ptr,  # [B, R, H, blocks of queries] contiguous
    tiles_ptr,  # [B, R, H, blocks, 4, 32]: shift and δ, in the order in which the threads of `dbias.py` take them
    flags_ptr,  # [B, H, blocks, R], of `dbias_passes.flags_of_queries`
    stride_bias_b: tl.int64,
    stride_bias_h: tl.int64,
    stride_bias_i: tl.int64,
    stride_bias_j: tl.int64,
    stride_dob: tl.int64,
    stride_dor: tl.int64,
    stride_doi,
    stride_doh: tl.int64,
    R,
    H,
    I,
    J,
    straight,  # squares of words; as many more are turned
    D: tl.constexpr,
    TILED: tl.constexpr,  # for `dbias.py`, whose tiles are of two blocks
    BLOCK_I: tl.constexpr,
    HEADS: tl.constexpr,  # of a program
):
    if tl.program_id(0) < 2 * straight:
        leave_square(
            tl.program_id(0),
            bias_ptr,
            words_ptr,
            loud_ptr,
            stride_bias_b,
            stride_bias_h,
            stride_bias_i,
            stride_bias_j,
            H,
            I,
            J,
            straight,
        )
    else:
        # The heads of a query lie side by side in memory, so a program takes several.
        groups = tl.cdiv(H, HEADS)
        of_queries = tl.cdiv(I, BLOCK_I)
        blocks = of_queries + of_queries % 2 if TILED else of_queries
        pid = tl.program_id(0) - 2 * straight
        block = pid // groups % blocks
        row = (pid // (groups * blocks)).to(tl.int64)
        b = row // R
        r = row % R
        head = pid % groups * HEADS
        some = tl.arange(0, BLOCK_I * HEADS)
        h = some % HEADS
        i = some // HEADS
        in_range = (i < I - block * BLOCK_I) & (h < H - head)
        first = (block * BLOCK_I).to(tl.int64)
        do_ptr += b * stride_dob + r * stride_dor + first * stride_doi + head * stride_doh
        d = tl.arange(0, D)
        offsets = (i * stride_doi).to(tl.int64) + h * stride_doh
        do_ptrs = tl.multiple_of(do_ptr + offsets[:, None] + d[None, :], (1, 16))
        do = tl.load(do_ptrs, mask=in_range[:, None], other=0.0).to(tl.float32)
        out = load(out_ptr + ((row * I + first) * H + head) * D, i * H + h, D, in_range, D, False)
        delta = _by_head(tl.sum(out.to(tl.float32) * do, 1), BLOCK_I, HEADS)
        # Past a NaN, which δ shows.
        largest = _by_head(tl.max(tl.abs(do), 1), BLOCK_I, HEADS)

        # What is kept of a head's queries lies side by side.
        h = tl.arange(0, HEADS)
        i = tl.arange(0, BLOCK_I)
        in_head = h < H - head
        in_range = in_head[:, None] & (i < I - block * BLOCK_I)[None, :]
        query = (row * H + head) * I + first
        row_max, log2_sum, logsum, is_usual, is_uniform = leave_terms(
            (row_max_ptr, row_sum_ptr), terms_ptr, delta, query, h[:, None] * I + i[None, :], in_range, J
        )
        flag = flag_of(is_usual, is_uniform)
        of_block = h < tl.where(block < of_queries, H - head, 0)
        tl.store(huge_ptr + (row * H + head + h) * of_queries + block, flag, mask=of_block)
        if TILED:
            leave_tile_of_queries(tiles_ptr, row_max, logsum, delta, row * H + head + h, block, i, in_head, blocks)
            has_gradient = (largest > 0.0) | (delta != 0.0)
            flag = flags_of_queries(row_max, log2_sum, has_gradient, is_uniform, in_range)
            tl.store(flags_ptr + ((b * H + head + h) * blocks + block) * R + r, flag, mask=in_head)


@triton.jit
def _by_head(x, BLOCK_I: tl.constexpr, HEADS: tl.constexpr):
    """`[HEADS, BLOCK_I]` of a number for each head of each query."""
    return tl.trans(tl.reshape(x, [BLOCK_I, HEADS]))


class QueryTerms:
    """Leaves words and terms of calls of one shape and layout."""

    def __init__(self, grad_out: Tensor, bias: Tensor, *, tiled: bool) -> None:
        B, R, I, H, D = grad_out.shape
        self._words = Room(bias)
        blocks = 2 * triton.cdiv(I, 128) if tiled else triton.cdiv(I, 64)
        HEADS = min(4, triton.next_power_of_2(H))
        self._shapes = ((B * R * H * blocks * 4, 32), (B, H, blocks, R)) if tiled else None
        given = {
            **arguments.strides("bias_", bias, "bhij"),
            **arguments.strides("do", grad_out, "brihd"),
            "R": R,
            "H": H,
            "I": I,
            "J": bias.shape[3],
            "straight": self._words.straight,
            "D": D,
            "TILED": tiled,
            "HEADS": HEADS,
        }
        programs = self._words.squares + B * R * blocks * triton.cdiv(H, HEADS)
        self._make = Launch(_triangle_attention_bwd_query_terms, programs, given, _TILE)

    def __call__(
        self,
        bias: Tensor,
        grad_out: Tensor,
        out: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
        left: tuple[Tensor, Tensor],
        empty: memory.Empty = memory.empty,
    ) -> tuple[Made, Tensor | None, Tensor | None]:
        """`left` takes L and δ, and what is huge; tiles `[B·R·H·blocks·4, 32]`, flags for `dbias.py` from `empty`."""
        tiles = flags = None
        if self._shapes is not None:
            tiles = empty(self._shapes[0], torch.float32, out)
            flags = empty(self._shapes[1], torch.int32, out)
        both, loud = self._words(out)
        self._make(bias, both, loud, grad_out, out, row_max, row_sum, *left, tiles, flags)
        return Made(both[0], both[1], loud), tiles, flags
