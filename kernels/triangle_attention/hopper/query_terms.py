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
from trifast_inductor.kernels.triangle_attention.lean import words
from trifast_inductor.kernels.triangle_attention.lean.operands import flag_of, leave_terms, load
from trifast_inductor.kernels.triangle_attention.lean.words import leave_square
from trifast_inductor.kernels.triangle_attention.tiling import Tile

_TILE = Tile(BLOCK_I=64, BLOCK_J=16, num_warps=8, num_stages=1)


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
        some = tl.arange(0, BLOCK_I * HEADS)
        h = pid % groups * HEADS + some % HEADS
        i = some // HEADS
        in_range = (i < I - block * BLOCK_I) & (h < H)
        first = (block * BLOCK_I).to(tl.int64)
        do_ptr += b * stride_dob + r * stride_dor + first * stride_doi
        d = tl.arange(0, D)
        offsets = (i * stride_doi).to(tl.int64) + h * stride_doh
        do_ptrs = tl.multiple_of(do_ptr + offsets[:, None] + d[None, :], (1, 16))
        do = tl.load(do_ptrs, mask=in_range[:, None], other=0.0)
        out = load(out_ptr + (row * I + first) * H * D, i * H + h, D, in_range, D, False)
        row_max, log2_sum, logsum, delta, is_usual, is_uniform = leave_terms(
            (row_max_ptr, row_sum_ptr), terms_ptr, out, do, row, h, first, i, in_range, (H, I, J)
        )
        of_head = pid % groups * HEADS + tl.arange(0, HEADS)
        flag = flag_of(tl.reshape(is_usual, [BLOCK_I, HEADS]), tl.reshape(is_uniform, [BLOCK_I, HEADS]))
        tl.store(
            huge_ptr + (row * H + of_head) * of_queries + block, flag, mask=of_head < tl.where(block < of_queries, H, 0)
        )
        if TILED:
            leave_tile_of_queries(tiles_ptr, row_max, logsum, delta, row * H + h, block, i, h < H, blocks)
            flag = flags_of_queries(row_max, log2_sum, delta, is_uniform, do, in_range, BLOCK_I, HEADS)
            tl.store(flags_ptr + ((b * H + of_head) * blocks + block) * R + r, flag, mask=of_head < H)


class QueryTerms:
    """Leaves words and terms of calls of one shape and layout."""

    def __init__(self, grad_out: Tensor, bias: Tensor, *, tiled: bool) -> None:
        B, R, I, H, D = grad_out.shape
        self._words = words.Room(bias)
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
    ) -> tuple[words.Made, Tensor | None, Tensor | None]:
        """`left` takes L and δ, and what is huge; tiles `[B·R·H·blocks·4, 32]`, flags for `dbias.py` from `empty`."""
        tiles = flags = None
        if self._shapes is not None:
            tiles = empty(self._shapes[0], torch.float32, out)
            flags = empty(self._shapes[1], torch.int32, out)
        both, loud = self._words(out)
        self._make(bias, both, loud, grad_out, out, row_max, row_sum, *left, tiles, flags)
        return words.Made(both[0], both[1], loud), tiles, flags
