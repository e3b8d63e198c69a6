"""The blocks for which a fixed shift was no good, computed once more with a running maximum.

`forward.py` leaves a row sum of NaN in such a row: its later logits lie too far above those of its first tile, all
its keys are masked, or there is a NaN or an infinity among its inputs. Everything is read as the portable kernel
reads it, so what comes out is what that one would give.

Queries whose keys all have one term, beside which any logit of theirs is lost in rounding, need no logits: their output
is the mean of v. So it is in a row of padding that is filled with -1e9. Four blocks of a head find it together.

Mostly there is nothing to do, and where there is, it lies together (the rows of the padding). So there are as many
programs as the GPU holds at once, each of which looks through every n-th group of blocks: neighbours go to different
ones.
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
    head_of,
    load_key_term,
    load_rows,
    logits_tile,
    offset,
    running_probabilities,
    store_rows,
    within,
)
from trifast_inductor.kernels.triangle_attention.order import head_place
from trifast_inductor.kernels.triangle_attention.tiling import CappedTile

# A number smaller than this times another is lost when it is added to that one in float32, rounded to nearest.
ROUNDED_AWAY = tl.constexpr(2.0**-25)


@triton.jit
def _unsound(row_sum_ptr, first, step, groups, last, I, GROUP: tl.constexpr, BLOCK_I: tl.constexpr):
    """A bit for each of 32 blocks, those of groups `first`, `first + step` and on: whether a row sum of it is NaN."""
    n = tl.arange(0, 32)
    group = first + n // GROUP * step
    i = ((group % groups * GROUP + n % GROUP) * BLOCK_I)[:, None] + tl.arange(0, BLOCK_I)[None, :]
    in_range = (group < last)[:, None] & (i < I)
    sums = tl.load(row_sum_ptr + (group // groups).to(tl.int64)[:, None] * I + i, mask=in_range, other=0.0)
    bit = tl.max((sums != sums).to(tl.int32), 1) << n
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
    operands, sizes_ptr, b, r, h, first_i, queries, J, sizes, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What no logit of so many queries is larger than by size, the term not counted, and the mean of v.

    The former is max|q|·max|k|·scale + max|bias|. Nothing is reduced over a tile before the end: that takes barriers.
    """
    q_ptr, stride_qi, stride_qd = head_of(operands[0], b, r, h)
    q_ptr += first_i * stride_qi
    k_ptr, stride_kj, stride_kd = head_of(operands[1], b, r, h)
    v_ptr, stride_vj, stride_vd = head_of(operands[2], b, r, h)
    n = tl.arange(0, BLOCK)
    largest_q = tl.zeros([BLOCK], tl.float32)
    largest_k = tl.zeros([BLOCK], tl.float32)
    sums_v = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    # Nothing is multiplied, so that copies ahead are not made unless they are asked for.
    for start in tl.range(0, tl.maximum(queries, J), BLOCK, num_stages=3):
        q = load_rows(q_ptr, n, n < queries - start, stride_qi, stride_qd, D, BLOCK_D, ALIGNED).to(tl.float32)
        k = load_rows(k_ptr, n, n < J - start, stride_kj, stride_kd, D, BLOCK_D, ALIGNED).to(tl.float32)
        v = load_rows(v_ptr, n, n < J - start, stride_vj, stride_vd, D, BLOCK_D, ALIGNED)
        largest_q = tl.maximum(largest_q, size_of(tl.sum(q * q, 1)))
        largest_k = tl.maximum(largest_k, size_of(tl.sum(k * k, 1)))
        sums_v += v.to(tl.float32)
        q_ptr += BLOCK * stride_qi
        k_ptr += BLOCK * stride_kj
        v_ptr += BLOCK * stride_vj
    largest_bias = tl.zeros([BLOCK], tl.float32)
    for start in range(0, sizes, BLOCK):
        tile = start + n
        largest_bias = tl.maximum(largest_bias, tl.load(sizes_ptr + tile, mask=tile < sizes, other=0.0))
    most_q = tl.sqrt(tl.max(largest_q, 0))
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
    GROUP: tl.constexpr,  # blocks of a head that are looked at together
    TILE_I: tl.constexpr,  # queries of a tile
):
    programs = tl.num_programs(0)
    groups = tl.cdiv(I, GROUP * BLOCK_I)
    last = B * R * H * groups
    operands = (
        (q_ptr, stride_qb, stride_qr, stride_qi, stride_qh, stride_qd),
        (k_ptr, stride_kb, stride_kr, stride_kj, stride_kh, stride_kd),
        (v_ptr, stride_vb, stride_vr, stride_vj, stride_vh, stride_vd),
    )
    of_bias = (bias_ptr, stride_bias_b, stride_bias_h, stride_bias_i, stride_bias_j)
    of_key = (key_ptr, stride_key_b, stride_key_r, stride_key_j)
    results = (out_ptr, row_max_ptr, row_sum_ptr)
    for first in tl.range(tl.program_id(0), last, 32 // GROUP * programs, disable_licm=True):
        unsound = _unsound(row_sum_ptr, first, programs, groups, last, I, GROUP, BLOCK_I)
        # Asked once, for mostly there is nothing: no instruction of what follows is fetched then.
        if unsound != 0:
            if KEY_TERM != "none":
                unsound = _without_logits(
                    unsound, first, groups, operands, of_key, (sizes_ptr, tiles_i, tiles_j), results,
                    (R, H, I, J), scale, fill, D, BLOCK_D, KEY_TERM, ALIGNED, BLOCK_I, GROUP, TILE_I,
                )  # fmt: skip
            for n in tl.range(32, disable_licm=True):
                if (unsound >> n) & 1 != 0:
                    group = first + n // GROUP * programs
                    b, r, h = head_place(group // groups, R, H)
                    i = (group % groups * GROUP + n % GROUP) * BLOCK_I + tl.arange(0, BLOCK_I)
                    out, row_max, row_sum = _walked(
                        operands, of_bias, of_key, b, r, h, i, i < I, J, scale, fill,
                        D, BLOCK_D, KEY_TERM, KEY_TERM_FIRST, PRECISION, ALIGNED, BLOCK_I, BLOCK_J, EVEN_J,
                    )  # fmt: skip
                    _store(results, out, row_max, row_sum, b, r, h, i, R, H, I, D, BLOCK_D)


@triton.jit
def _without_logits(
    unsound, first, groups, operands, of_key, of_sizes, results, sizes, scale, fill,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEY_TERM: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_I: tl.constexpr, GROUP: tl.constexpr, TILE_I: tl.constexpr,
):  # fmt: skip
    """Stores the groups of blocks whose logits are lost beside one term of all keys; the bits of all others."""
    key_ptr, stride_key_b, stride_key_r, stride_key_j = of_key
    sizes_ptr, tiles_i, tiles_j = of_sizes
    R, H, I, J = sizes
    for n in tl.range(32 // GROUP, disable_licm=True):
        of_group = (unsound >> n * GROUP) & ((1 << GROUP) - 1)
        if of_group != 0:
            group = first + n * tl.num_programs(0)
            b, r, h = head_place(group // groups, R, H)
            first_i = group % groups * GROUP * BLOCK_I
            row_key_ptr = key_ptr + b * stride_key_b + r * stride_key_r
            value = _only_value(row_key_ptr, stride_key_j, J, fill, KEY_TERM, 512)
            if value == value:
                queries = tl.minimum(I - first_i, GROUP * BLOCK_I)
                tile = first_i // TILE_I
                tiles = tl.cdiv(first_i + queries, TILE_I) - tile
                group_sizes_ptr = sizes_ptr + ((b * H + h) * tiles_i + tile) * tiles_j
                most, mean = _beside_a_term(
                    operands, group_sizes_ptr, b, r, h, first_i, queries, J, tiles * tiles_j, scale,
                    D, BLOCK_D, ALIGNED, BLOCK=1024 // BLOCK_D,
                )  # fmt: skip
                if most < tl.abs(value) * ROUNDED_AWAY:
                    unsound &= ~(of_group << n * GROUP)
                    row_max = tl.zeros([BLOCK_I], tl.float32) + value
                    row_sum = tl.zeros([BLOCK_I], tl.float32) + tl.cast(J, tl.float32)
                    out = tl.zeros([BLOCK_I, BLOCK_D], tl.float32) + mean[None, :]
                    for m in tl.range(GROUP, disable_licm=True):
                        if (of_group >> m) & 1 != 0:
                            i = first_i + m * BLOCK_I + tl.arange(0, BLOCK_I)
                            _store(results, out, row_max, row_sum, b, r, h, i, R, H, I, D, BLOCK_D)
    return unsound


@triton.jit
def _store(results, out, row_max, row_sum, b, r, h, i, R, H, I, D: tl.constexpr, BLOCK_D: tl.constexpr):
    out_ptr, row_max_ptr, row_sum_ptr = results
    store_rows(out_ptr + ((b * R + r) * I * H + h) * D, out, i, i < I, H * D, D, BLOCK_D)
    statistics = ((b * R + r) * H + h) * I + i
    tl.store(row_max_ptr + statistics, row_max, mask=i < I)
    tl.store(row_sum_ptr + statistics, row_sum, mask=i < I)


@triton.jit
def _walked(
    operands, of_bias, of_key, b, r, h, i, i_in_range, J, scale, fill,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEY_TERM: tl.constexpr, KEY_TERM_FIRST: tl.constexpr,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, EVEN_J: tl.constexpr,
):  # fmt: skip
    """Output, row maximum and row sum of queries i, with a running maximum."""
    q_ptr, stride_qi, stride_qd = head_of(operands[0], b, r, h)
    k_ptr, stride_kj, stride_kd = head_of(operands[1], b, r, h)
    v_ptr, stride_vj, stride_vd = head_of(operands[2], b, r, h)
    bias_ptr, stride_bias_b, stride_bias_h, stride_bias_i, stride_bias_j = of_bias
    bias_ptr += b * stride_bias_b + h * stride_bias_h
    key_ptr, stride_key_b, stride_key_r, stride_key_j = of_key
    if KEY_TERM != "none":
        key_ptr += b * stride_key_b + r * stride_key_r
    j = tl.arange(0, BLOCK_J)
    bias_offsets = offset(i, stride_bias_i)[:, None] + offset(j, stride_bias_j)[None, :]
    q = load_rows(q_ptr, i, i_in_range, stride_qi, stride_qd, D, BLOCK_D, ALIGNED)
    row_max = tl.full([BLOCK_I], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_I], tl.float32)
    acc = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    for start in range(0, J, BLOCK_J):
        in_range = within(j, J - start, EVEN_J)
        k = load_rows(k_ptr, j, in_range, stride_kj, stride_kd, D, BLOCK_D, ALIGNED)
        qk = dot(q, tl.trans(k), None, PRECISION)
        key = load_key_term(key_ptr, j, in_range, stride_key_j, KEY_TERM)
        bias = tl.load(bias_ptr + bias_offsets, mask=i_in_range[:, None] & in_range[None, :], other=0.0)
        x = logits_tile(qk, bias, key[None, :], in_range[None, :], scale, fill, True, KEY_TERM, KEY_TERM_FIRST, EVEN_J)
        p, rescale, row_max = running_probabilities(x, row_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        v = load_rows(v_ptr, j, in_range, stride_vj, stride_vd, D, BLOCK_D, ALIGNED)
        acc = dot(p.to(v.dtype), v, acc * rescale[:, None], PRECISION)
        k_ptr += BLOCK_J * stride_kj
        v_ptr += BLOCK_J * stride_vj
        bias_ptr += BLOCK_J * tl.cast(stride_bias_j, tl.int64)
        if KEY_TERM != "none":
            key_ptr += BLOCK_J * tl.cast(stride_key_j, tl.int64)
    return acc / row_sum[:, None], row_max, row_sum


# Small, for balance: there are few blocks for each program. sm_90, triton 3.6, D=32: 112 registers and 19 instructions
# a score; 64 x 64 has 15.2, but 209 registers, so half as many programs.
_TILE = CappedTile(BLOCK_I=64, BLOCK_J=32, num_warps=4, num_stages=3, maxnreg=128)
_GROUP = 4  # blocks


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
            "GROUP": _GROUP,
            "TILE_I": TILE_I,
            "ALIGNED": arguments.rows_are_aligned(q, k, v),
        }
        programs = min(B * R * H * triton.cdiv(I, _GROUP * _TILE.BLOCK_I), _programs(q.get_device()))
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
