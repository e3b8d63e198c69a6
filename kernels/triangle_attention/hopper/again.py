"""The blocks for which a fixed shift was no good, computed once more with a running maximum.

`forward.py` leaves a row sum of NaN in such a row: its later logits lie too far above those of its first tile, all
its keys are masked, or there is a NaN or an infinity among its inputs. Everything is read as the portable kernel
reads it, so what comes out is what that one would give.

A block whose keys all have one term, beside which any logit of it is lost in rounding, needs no logits: its output is
the mean of v. So it is in a row of padding that is filled with -1e9.

Mostly there is nothing to do, and where there is, it lies together (the rows of the padding). So there are as many
programs as the GPU holds at once, each of which looks through every n-th block: neighbours go to different ones.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments
from trifast_inductor.kernels.triangle_attention.hopper.choice import multiprocessors
from trifast_inductor.kernels.triangle_attention.hopper.forward_passes import Prepared, size_of
from trifast_inductor.kernels.triangle_attention.launching import Launch
from trifast_inductor.kernels.triangle_attention.logits import (
    dot,
    load_key_term,
    load_rows,
    logits_tile,
    offset,
    running_probabilities,
    store_rows,
    within,
)
from trifast_inductor.kernels.triangle_attention.tiling import CappedTile

# A number smaller than this times another is lost when it is added to that one in float32, rounded to nearest.
ROUNDED_AWAY = tl.constexpr(2.0**-25)


@triton.jit
def _unsound(row_sum_ptr, block, blocks, last, I, BLOCK_I: tl.constexpr):
    """A bit for each of 32 blocks: whether one of its row sums is NaN."""
    i = (block % blocks * BLOCK_I)[:, None] + tl.arange(0, BLOCK_I)[None, :]
    in_range = (block < last)[:, None] & (i < I)
    sums = tl.load(row_sum_ptr + (block // blocks).to(tl.int64)[:, None] * I + i, mask=in_range, other=0.0)
    bit = tl.max((sums != sums).to(tl.int32), 1) << tl.arange(0, 32)
    return tl.sum(bit, 0)


@triton.jit
def _only_value(key_ptr, stride_j, J, fill, KEY_TERM: tl.constexpr, BLOCK_J: tl.constexpr):
    """What all keys of a row have added to their logits, or get instead: NaN where it is not one number."""
    lowest = float("inf")
    highest = float("-inf")
    for start in range(0, J, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        key = load_key_term(key_ptr, j, j < J, stride_j, KEY_TERM)
        if KEY_TERM == "select":
            key = tl.where(key, tl.cast(fill, tl.float32), float("nan"))
        is_number = key == key
        lowest = tl.minimum(lowest, tl.min(tl.where(j < J, tl.where(is_number, key, float("-inf")), float("inf")), 0))
        highest = tl.maximum(highest, tl.max(tl.where(j < J, tl.where(is_number, key, float("inf")), float("-inf")), 0))
    return tl.where((lowest == highest) & (tl.abs(lowest) < float("inf")), lowest, float("nan"))


@triton.jit
def _beside_a_term(
    q,
    k_ptr,
    v_ptr,
    sizes_ptr,
    stride_kj,
    stride_kd,
    stride_vj,
    stride_vd,
    J,
    tiles_j,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What no logit of the block is larger than by size, the term not counted, and the mean of v.

    The former is max|q|·max|k|·scale + max|bias|. Nothing is reduced over a tile before the end: that takes barriers.
    """
    n = tl.arange(0, BLOCK)
    largest_k = tl.zeros([BLOCK], tl.float32)
    sums_v = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    # Nothing is multiplied, so that copies ahead are not made unless they are asked for.
    for start in tl.range(0, J, BLOCK, num_stages=3):
        in_range = n < J - start
        k = load_rows(k_ptr, n, in_range, stride_kj, stride_kd, D, BLOCK_D, ALIGNED).to(tl.float32)
        v = load_rows(v_ptr, n, in_range, stride_vj, stride_vd, D, BLOCK_D, ALIGNED)
        largest_k = tl.maximum(largest_k, size_of(tl.sum(k * k, 1)))
        sums_v += v.to(tl.float32)
        k_ptr += BLOCK * stride_kj
        v_ptr += BLOCK * stride_vj
    largest_bias = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles_j, BLOCK):
        tile = start + n
        largest_bias = tl.maximum(largest_bias, tl.load(sizes_ptr + tile, mask=tile < tiles_j, other=0.0))
    q = q.to(tl.float32)
    most_q = tl.sqrt(tl.max(size_of(tl.sum(q * q, 1)), 0))
    most_k = tl.sqrt(tl.max(largest_k, 0))
    most = most_q * most_k * tl.abs(tl.cast(scale, tl.float32)) + tl.max(largest_bias, 0)
    return most * 1.001, tl.sum(sums_v, 0) / J


@triton.jit
def _triangle_attention_fwd_again(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    key_ptr,
    sizes_ptr,  # [B, H, tiles_i, tiles_j]: no bias of a tile is larger by size
    out_ptr,  # [B, R, I, H, D] contiguous
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
    stride_qb: tl.int64,
    stride_qr: tl.int64,
    stride_qi: tl.int64,
    stride_qh: tl.int64,
    stride_qd,
    stride_kb: tl.int64,
    stride_kr: tl.int64,
    stride_kj: tl.int64,
    stride_kh: tl.int64,
    stride_kd,
    stride_vb: tl.int64,
    stride_vr: tl.int64,
    stride_vj: tl.int64,
    stride_vh: tl.int64,
    stride_vd,
    stride_bias_b: tl.int64,
    stride_bias_h: tl.int64,
    stride_bias_i: tl.int64,
    stride_bias_j,
    stride_key_b: tl.int64,
    stride_key_r: tl.int64,
    stride_key_j,
    B,
    R,
    H,
    I,
    J,
    tiles_i,
    tiles_j,
    scale,
    fill,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEY_TERM: tl.constexpr,
    KEY_TERM_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    EVEN_J: tl.constexpr,
    TILE_I: tl.constexpr,  # queries of a tile
):
    programs = tl.num_programs(0)
    blocks = tl.cdiv(I, BLOCK_I)
    last = B * R * H * blocks
    for first in tl.range(tl.program_id(0), last, 32 * programs, disable_licm=True):
        unsound = _unsound(row_sum_ptr, first + tl.arange(0, 32) * programs, blocks, last, I, BLOCK_I)
        for n in tl.range(32, disable_licm=True):
            if (unsound >> n) & 1 != 0:
                block = first + n * programs
                head = block // blocks
                h = head % H
                r = (head // H % R).to(tl.int64)
                b = (head // (H * R)).to(tl.int64)
                i = block % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
                j = tl.arange(0, BLOCK_J)
                i_in_range = i < I
                of_q = q_ptr + b * stride_qb + r * stride_qr + h * stride_qh
                of_k = k_ptr + b * stride_kb + r * stride_kr + h * stride_kh
                of_v = v_ptr + b * stride_vb + r * stride_vr + h * stride_vh
                of_bias = bias_ptr + b * stride_bias_b + h * stride_bias_h
                of_key = key_ptr + b * stride_key_b + r * stride_key_r if KEY_TERM != "none" else key_ptr
                bias_offsets = offset(i, stride_bias_i)[:, None] + offset(j, stride_bias_j)[None, :]

                q = load_rows(of_q, i, i_in_range, stride_qi, stride_qd, D, BLOCK_D, ALIGNED)
                is_uniform = False
                value = 0.0
                mean = tl.zeros([BLOCK_D], tl.float32)
                if KEY_TERM != "none":
                    value = _only_value(of_key, stride_key_j, J, fill, KEY_TERM, 512)
                    if value == value:
                        tile = ((b * H + h) * tiles_i + block % blocks * BLOCK_I // TILE_I) * tiles_j
                        most, mean = _beside_a_term(
                            q, of_k, of_v, sizes_ptr + tile, stride_kj, stride_kd, stride_vj, stride_vd,
                            J, tiles_j, scale, D, BLOCK_D, ALIGNED, BLOCK=64,
                        )  # fmt: skip
                        is_uniform = most < tl.abs(value) * ROUNDED_AWAY
                if is_uniform:
                    row_max = tl.zeros([BLOCK_I], tl.float32) + value
                    row_sum = tl.zeros([BLOCK_I], tl.float32) + tl.cast(J, tl.float32)
                    out = tl.zeros([BLOCK_I, BLOCK_D], tl.float32) + mean[None, :]
                else:
                    row_max = tl.full([BLOCK_I], float("-inf"), tl.float32)
                    row_sum = tl.zeros([BLOCK_I], tl.float32)
                    acc = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
                    for start in range(0, J, BLOCK_J):
                        in_range = within(j, J - start, EVEN_J)
                        k = load_rows(of_k, j, in_range, stride_kj, stride_kd, D, BLOCK_D, ALIGNED)
                        qk = dot(q, tl.trans(k), None, PRECISION)
                        key = load_key_term(of_key, j, in_range, stride_key_j, KEY_TERM)
                        bias_in_range = i_in_range[:, None] & in_range[None, :]
                        bias = tl.load(of_bias + bias_offsets, mask=bias_in_range, other=0.0)
                        x = logits_tile(
                            qk, bias, key[None, :], in_range[None, :], scale, fill,
                            True, KEY_TERM, KEY_TERM_FIRST, EVEN_J,
                        )  # fmt: skip
                        p, rescale, row_max = running_probabilities(x, row_max)
                        row_sum = row_sum * rescale + tl.sum(p, 1)
                        v = load_rows(of_v, j, in_range, stride_vj, stride_vd, D, BLOCK_D, ALIGNED)
                        acc = dot(p.to(v.dtype), v, acc * rescale[:, None], PRECISION)
                        of_k += BLOCK_J * stride_kj
                        of_v += BLOCK_J * stride_vj
                        of_bias += BLOCK_J * tl.cast(stride_bias_j, tl.int64)
                        if KEY_TERM != "none":
                            of_key += BLOCK_J * tl.cast(stride_key_j, tl.int64)
                    out = acc / row_sum[:, None]
                of_out = out_ptr + ((b * R + r) * I * H + h) * D
                store_rows(of_out, out, i, i_in_range, H * D, D, BLOCK_D)
                statistics = head.to(tl.int64) * I + i
                tl.store(row_max_ptr + statistics, row_max, mask=i_in_range)
                tl.store(row_sum_ptr + statistics, row_sum, mask=i_in_range)


# Small, for balance: there are few blocks for each program. sm_90, triton 3.6, D=32: 112 registers and 19 instructions
# a score; 64 x 64 has 15.2, but 209 registers, so half as many programs.
_TILE = CappedTile(BLOCK_I=64, BLOCK_J=32, num_warps=4, num_stages=3, maxnreg=128)


def _programs(device: int) -> int:
    """Odd: where the same queries of every head are unsound, they too go to different programs."""
    return _TILE.programs * (multiprocessors(device) if device >= 0 else 1) - 1  # the interpreter has one


class Again:
    """Overwrites blocks of 64 queries of `out`, `row_max` and `row_sum` where one of the row sums is NaN.

    Args:
        rows: the bias, in aligned rows: read two bytes at a time, a block takes five times as long.
        tiles: so many of TILE_I queries, 64 or more, and of keys, are those of which sizes are given.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rows: Tensor,
        key_bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        fill: float,
        key_term_first: bool,
        tiles: tuple[int, int],
        TILE_I: int,
    ) -> None:
        B, R, I, H, _ = q.shape
        given = {
            **arguments.shared(q, k, v, rows, key_bias, key_mask, scale, fill, key_term_first),
            **arguments.evenness(I, k.shape[2], _TILE),
            "B": B,
            "tiles_i": tiles[0],
            "tiles_j": tiles[1],
            "TILE_I": TILE_I,
            "ALIGNED": arguments.rows_are_aligned(q, k, v),
        }
        programs = min(B * R * H * triton.cdiv(I, _TILE.BLOCK_I), _programs(q.get_device()))
        self._run = Launch(_triangle_attention_fwd_again, programs, given, _TILE)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key: Tensor | None,
        prepared: Prepared,
        out: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
    ) -> None:
        self._run(q, k, v, prepared.rows, key, prepared.sizes, out, row_max, row_sum)
