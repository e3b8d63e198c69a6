"""What stands around the sum over rows of `dbias.py`, in plain Triton: what others make for it, and a pass after it.

    shift = row_max·log2(e) + log2(row_sum)          p = exp(bias)·exp2(scale·log2(e)·⟨q, k⟩ + key term - shift)

All of it is exact only while row_max is a number of some size and the bias not a large one, so

- a query whose maximum lies beyond `FAR`, as that of a row without a key left does, is given a shift of +inf: it adds
  nothing to the sums, which pass over a row where that goes for a whole tile, and the last pass walks it unless it has
  no gradient;
- the last pass multiplies by exp(bias), adds the parts in order, and walks those queries in the order of `logits.py`,
  or, where all of a tile weigh all keys alike, adds (⟨grad_out, v⟩ - δ) / J;
  and all of them in a tile with a bias beyond `LARGEST`, whose sums it does not use.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments, memory
from trifast_inductor.kernels.triangle_attention.launching import Launch
from trifast_inductor.kernels.triangle_attention.logits import (
    LOG2E,
    dot,
    load_key_term,
    load_rows,
    logits_tile,
    offset,
    probabilities,
)
from trifast_inductor.kernels.triangle_attention.tiling import CappedTile

# At 4096 a shift is rounded by 2.4e-4, an eighth of what a probability in bfloat16 is.
FAR = tl.constexpr(4096.0)
# exp(44) is 2^63.5: beside it, sums of 2^64 and probabilities of 2^-62 are within float32.
LARGEST = tl.constexpr(44.0)
WALKED = tl.constexpr(1)
ALL_UNIFORM = tl.constexpr(2)
ALL_FAR = tl.constexpr(4)  # not summed


@triton.jit
def is_far(row_max):
    # Of NaN too.
    return (tl.abs(row_max) <= FAR) == 0


@triton.jit
def leave_tile_of_queries(tiles_ptr, row_max, logsum, delta, head, block, i, in_head, blocks):
    """Shift and δ of queries i of a block of 64 of these heads, in the order in which threads take them.

    Args:
        tiles_ptr: `[heads, blocks, 4, 32]`.
    """
    shift = tl.where(is_far(row_max), float("inf"), logsum)
    # Warp, lane // 4, (shift, δ), (i, i + 8).
    place = i // 16 * 32 + i % 8 * 4 + i // 8 % 2
    ptrs = tiles_ptr + ((head * blocks + block) * 128)[:, None] + place[None, :]
    tl.store(ptrs, shift, mask=in_head[:, None])
    tl.store(ptrs + 2, delta, mask=in_head[:, None])


@triton.jit
def flags_of_queries(row_max, log2_sum, has_gradient, is_uniform, in_range):
    """Of each head's queries: `WALKED` if the last pass has one to walk, `ALL_UNIFORM`, `ALL_FAR`.

    All keys of a uniform query are at its maximum: 1/J each, no logit is needed.
    """
    far = is_far(row_max)
    # Without a gradient, as a row of padding mostly is, a query adds nothing; unless its probabilities are NaN.
    is_number = (tl.abs(row_max) < float("inf")) & (tl.abs(log2_sum) < float("inf"))
    walked = (far & in_range & (has_gradient | (is_number == 0))).to(tl.int32)
    uniform = ((far & is_uniform) | (in_range == 0)).to(tl.int32)
    all_far = (far | (in_range == 0)).to(tl.int32)
    return tl.max(walked, 1) * WALKED + tl.min(uniform, 1) * ALL_UNIFORM + tl.min(all_far, 1) * ALL_FAR


@triton.jit
def leave_tiles_of_keys(
    program,
    key_ptr,
    tiles_ptr,  # [B, R, tiles_j, 8, 32]: the key term over the scale, in the order in which threads take it
    bits_ptr,  # [B, tiles_j, words]: whether a row has any in this tile
    stride_b,
    stride_r,
    stride_j,
    R,
    J,
    scale,
    KEY_TERM: tl.constexpr,
):
    """Of 128 keys, in 32 rows."""
    words = tl.cdiv(R, 32)
    tiles_j = tl.cdiv(J, 128)
    word = program % words
    tile_j = program // words % tiles_j
    b = (program // (words * tiles_j)).to(tl.int64)
    row = word * 32 + tl.arange(0, 32)
    j = tile_j * 128 + tl.arange(0, 128)
    in_range = (row < R)[:, None] & (j < J)[None, :]
    ptrs = key_ptr + b * stride_b + row.to(tl.int64)[:, None] * stride_r + j.to(tl.int64)[None, :] * stride_j
    key = tl.load(ptrs, mask=in_range, other=0)
    bit = tl.max((key != 0).to(tl.int32), 1) << tl.arange(0, 32)
    tl.store(bits_ptr + program, tl.sum(bit, 0))
    # What selects is no addend: the least of it and the logit is taken.
    selected = tl.where(key != 0, float("-inf"), float("inf"))
    term = key.to(tl.float32) / scale if KEY_TERM == "add" else selected
    # [half, 8, lane % 4, pair] -> [half, lane % 4, 8, pair]; as much again is not used.
    term = term.reshape([32, 2, 8, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([32, 128])
    place = ((b * R + row) * tiles_j + tile_j) * 256
    tl.store(tiles_ptr + place[:, None] + tl.arange(0, 128)[None, :], term, mask=(row < R)[:, None])


@triton.jit
def list_rows(
    tile,
    flags_ptr,  # [B, H, tiles_i, 2, R], of `flags_of_queries`
    summed_ptr,  # [B, H, tiles_i, R + 1]: how many to sum, and which
    rows_ptr,  # [B, H, tiles_i, R + 2]: how many to walk, how many uniform; the former, and from the end the latter
    R,
    SEEN: tl.constexpr,  # rows looked at together
):
    """Of a tile of 128 queries: the rows to sum, and what the last pass walks and where it is uniform, in order."""
    flags_ptr += tile.to(tl.int64) * 2 * R
    summed_ptr += tile.to(tl.int64) * (R + 1)
    rows_ptr += tile.to(tl.int64) * (R + 2)
    summed = 0
    walked = 0
    uniform = 0
    for start in range(0, R, SEEN):
        row = start + tl.arange(0, SEEN)
        first = tl.load(flags_ptr + row, mask=row < R, other=0)
        second = tl.load(flags_ptr + R + row, mask=row < R, other=0)
        of_all = first & second
        is_summed = (((of_all & ALL_FAR) == 0) & (row < R)).to(tl.int32)
        is_uniform = (first | second) & WALKED & (of_all // ALL_UNIFORM)
        is_walked = ((first | second) & WALKED) - is_uniform
        tl.store(summed_ptr + summed + tl.cumsum(is_summed, 0), row, mask=is_summed != 0)
        tl.store(rows_ptr + 1 + walked + tl.cumsum(is_walked, 0), row, mask=is_walked != 0)
        tl.store(rows_ptr + R + 2 - uniform - tl.cumsum(is_uniform, 0), row, mask=is_uniform != 0)
        summed += tl.sum(is_summed, 0)
        walked += tl.sum(is_walked, 0)
        uniform += tl.sum(is_uniform, 0)
    tl.store(summed_ptr, summed)
    tl.store(rows_ptr, walked)
    tl.store(rows_ptr + 1, uniform)


# J tells whether rows of the parts lie on 16 bytes.
@triton.jit(do_not_specialize=["B", "R", "H", "I", "parts", "tiles_i"])
def _triangle_attention_bwd_dbias_finish(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    key_ptr,
    do_ptr,
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
    terms_ptr,  # [B, R, H, I, 2] contiguous
    rows_ptr,  # [B, H, tiles_i, R + 2], of the list above
    parts_ptr,  # [parts, B, H, I, J] contiguous
    dbias_ptr,  # [B, H, I, J] contiguous
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
    stride_dob: tl.int64,
    stride_dor: tl.int64,
    stride_doi: tl.int64,
    stride_doh: tl.int64,
    stride_dod,
    B,
    R,
    H,
    I,
    J,
    parts,
    tiles_i,
    scale,
    fill,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEY_TERM: tl.constexpr,
    KEY_TERM_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIFORM_ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks_i = tl.cdiv(I, BLOCK_I)
    blocks_j = tl.cdiv(J, BLOCK_J)
    head = (pid // (blocks_i * blocks_j)).to(tl.int64)  # of [B, H]
    h = head % H
    b = head // H
    first_i = pid // blocks_j % blocks_i * BLOCK_I
    i = first_i + tl.arange(0, BLOCK_I)
    j = pid % blocks_j * BLOCK_J + tl.arange(0, BLOCK_J)
    i_in_range = i < I
    j_in_range = j < J
    in_range = i_in_range[:, None] & j_in_range[None, :]
    bias_ptr += b * stride_bias_b + h * stride_bias_h
    bias_ptrs = bias_ptr + offset(i, stride_bias_i)[:, None] + offset(j, stride_bias_j)[None, :]
    bias = tl.load(bias_ptrs, mask=in_range, other=0.0).to(tl.float32)
    # Of NaN too.
    is_factor = tl.min(tl.min((tl.abs(bias) <= LARGEST).to(tl.int32), 1), 0) != 0

    place = (head * I + i.to(tl.int64)[:, None]) * J + j[None, :]
    total = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    if is_factor:
        for _ in range(parts):
            total += tl.load(parts_ptr + place, mask=in_range, other=0.0)
            parts_ptr += B * H * tl.cast(I, tl.int64) * J
        total *= tl.exp2(bias * LOG2E)

    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    do_ptr += b * stride_dob + h * stride_doh
    if KEY_TERM != "none":
        key_ptr += b * stride_key_b
    rows_ptr += (head * tiles_i + first_i // 128) * (R + 2)
    for n in range(tl.load(rows_ptr) if is_factor else R):
        r = tl.load(rows_ptr + 2 + n, mask=is_factor, other=n).to(tl.int64)
        statistics = (b * R + r) * H + h
        q = load_rows(q_ptr + r * stride_qr, i, i_in_range, stride_qi, stride_qd, D, BLOCK_D, ALIGNED)
        k = load_rows(k_ptr + r * stride_kr, j, j_in_range, stride_kj, stride_kd, D, BLOCK_D, ALIGNED)
        qk = dot(q, tl.trans(k), None, PRECISION)
        row_key_ptr = key_ptr + r * stride_key_r if KEY_TERM != "none" else key_ptr
        key = load_key_term(row_key_ptr, j, j_in_range, stride_key_j, KEY_TERM)
        x = logits_tile(qk, bias, key[None, :], None, scale, fill, True, KEY_TERM, KEY_TERM_FIRST, EVEN_J=True)
        query = statistics * I + i
        row_max = tl.load(row_max_ptr + query, mask=i_in_range, other=0.0)
        log2_sum = tl.log2(tl.load(row_sum_ptr + query, mask=i_in_range, other=1.0))
        delta = tl.load(terms_ptr + 2 * query + 1, mask=i_in_range, other=0.0)
        p = probabilities(x, row_max[:, None], log2_sum[:, None])
        do = load_rows(do_ptr + r * stride_dor, i, i_in_range, stride_doi, stride_dod, D, BLOCK_D, ALIGNED)
        v = load_rows(v_ptr + r * stride_vr, j, j_in_range, stride_vj, stride_vd, D, BLOCK_D, ALIGNED)
        dp = dot(do, tl.trans(v), None, PRECISION)
        ds = p * (dp - delta[:, None])
        if KEY_TERM == "select" and not KEY_TERM_FIRST:
            ds = tl.where(key[None, :], 0.0, ds)
        total += tl.where((is_far(row_max) | (is_factor == 0))[:, None], ds, 0.0)

    uniform = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    deltas = tl.zeros([BLOCK_I], tl.float32)
    count = tl.load(rows_ptr + 1) if is_factor else 0
    # Several rows at a time, whose copies are under way together: what is multiplied is little.
    for first in tl.range(0, count, UNIFORM_ROWS, num_stages=2):
        for m in tl.static_range(UNIFORM_ROWS):
            is_row = first + m < count
            r = tl.load(rows_ptr + R + 1 - first - m, mask=is_row, other=0).to(tl.int64)
            i_of_row = i < tl.where(is_row, I, 0)
            j_of_row = j < tl.where(is_row, J, 0)
            do = load_rows(do_ptr + r * stride_dor, i, i_of_row, stride_doi, stride_dod, D, BLOCK_D, ALIGNED)
            v = load_rows(v_ptr + r * stride_vr, j, j_of_row, stride_vj, stride_vd, D, BLOCK_D, ALIGNED)
            delta = tl.load(terms_ptr + 2 * (((b * R + r) * H + h) * I + i) + 1, mask=i_of_row, other=0.0)
            if KEY_TERM == "select" and not KEY_TERM_FIRST:
                key = load_key_term(key_ptr + r * stride_key_r, j, j_in_range, stride_key_j, KEY_TERM)
                ds = dot(do, tl.trans(v), None, PRECISION) - delta[:, None]
                uniform += tl.where(key[None, :], 0.0, ds)
            else:
                uniform = dot(do, tl.trans(v), uniform, PRECISION)
                deltas += delta
    total += (uniform - deltas[:, None]) / J
    tl.store(dbias_ptr + place, total.to(dbias_ptr.dtype.element_ty), mask=in_range)


class Finish:
    """Makes dbias from sums over groups of rows, `parts` of them; `given` is of `arguments.shared`."""

    # Small: there is mostly nothing to walk, and where there is, programs are many. Three share a multiprocessor.
    _TILE = CappedTile(BLOCK_I=32, BLOCK_J=64, num_warps=4, num_stages=3, maxnreg=168)

    def __init__(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, parts: int, given: dict[str, Any]
    ) -> None:
        B, H, I, J = bias.shape
        tiles_i = triton.cdiv(I, 128)
        values = {
            **given,
            **arguments.strides("do", grad_out, "brihd"),
            "B": B,
            "parts": parts,
            "tiles_i": tiles_i,
            "ALIGNED": arguments.rows_are_aligned(q, k, v, grad_out),
            "UNIFORM_ROWS": (2 if given["KEY_TERM"] == "select" else 4) // (1 if q.shape[-1] <= 32 else 2),
        }
        programs = B * H * triton.cdiv(I, self._TILE.BLOCK_I) * triton.cdiv(J, self._TILE.BLOCK_J)
        self._run = Launch(_triangle_attention_bwd_dbias_finish, programs, values, self._TILE)

    def __call__(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor,
        key: Tensor | None,
        row_max: Tensor,
        row_sum: Tensor,
        terms: Tensor,
        walked: Tensor,
        parts: Tensor,
    ) -> Tensor:
        dbias = memory.empty(bias.shape, bias.dtype, bias)
        self._run(q, k, v, bias, key, grad_out, row_max, row_sum, terms, walked, parts, dbias)
        return dbias
