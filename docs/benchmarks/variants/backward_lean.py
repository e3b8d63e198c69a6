"""Backward in three passes as the portable one, with what its inner loops do not need taken out of them.

    p = exp2(scale·log2(e)·⟨q, k⟩ + (log2(e)·bias - L))     L = log2(e)·row_max + log2(row_sum)

Two fused multiply-adds a logit, where a tile is whole, has no key term and no huge logit ("plain"); all other tiles
take the form of `logits.probabilities` ("exact"), in a second loop of the same kernel. What makes it cheap:

- `_words`: the bias in the order of the accumulator's registers, in 16-byte loads; nothing moves between threads.
- `_spans`: per row, up to where no key has a term, and behind which every key is left out: those are not visited.
- L and δ lie side by side and are copied ahead; offsets within a tile have 32 bits.

A query whose |L| passes 2^12 is huge: one fused multiply-add would be off by the rounding of L.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments, tiling
from trifast_inductor.kernels.triangle_attention.logits import (
    LOG2E,
    dot,
    load_key_term,
    logits_tile,
    probabilities,
)
from trifast_inductor.kernels.triangle_attention.order import program_place

HUGE = tl.constexpr(4096.0)
# A key term of this or less is a mask: no logit of a query that is not huge comes back from there.
LEFT_OUT = tl.constexpr(-1e8)


@triton.jit
def _words(
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
def _unpack(words, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """`[ROWS, COLUMNS]` in float32 of the words that `_words` stored."""
    if dtype == tl.bfloat16:
        high = (words & -65536).to(tl.float32, bitcast=True)
        low = (words << 16).to(tl.float32, bitcast=True)
    else:
        high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        low = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    x = tl.reshape(tl.join(low, high), [ROWS // (16 * WARPS), COLUMNS // 16, WARPS, 8, 4, 2, 2, 2])
    return tl.reshape(tl.permute(x, [0, 2, 6, 3, 1, 5, 4, 7]), [ROWS, COLUMNS])


@triton.jit
def _spans(
    key_ptr,
    spans_ptr,  # [B, R, 2]: keys before the first that has a term; keys up to the last that is not left out
    stride_b: tl.int64,
    stride_r: tl.int64,
    stride_j: tl.int64,
    R,
    J,
    fill,
    KEY_TERM: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    row = tl.program_id(0)
    key_ptr += (row // R).to(tl.int64) * stride_b + (row % R).to(tl.int64) * stride_r
    clean = J
    end = 0
    for start in range(0, J, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        key = tl.load(key_ptr + j.to(tl.int64) * stride_j, mask=j < J, other=0)
        if KEY_TERM == "add":
            kept = (key.to(tl.float32) <= LEFT_OUT) == 0  # a NaN is kept
        if KEY_TERM == "select":
            kept = (key == 0) | (fill > LEFT_OUT)
        clean = tl.minimum(clean, tl.min(tl.where((key != 0) & (j < J), j, J), 0))
        end = tl.maximum(end, tl.max(tl.where(kept & (j < J), j + 1, 0), 0))
    tl.store(spans_ptr + 2 * row, clean)
    tl.store(spans_ptr + 2 * row + 1, tl.where(end == 0, J, end))


@triton.jit
def _rows(ptr, row, step, in_range, D: tl.constexpr, WHOLE: tl.constexpr):
    """`[rows, D]` of an operand whose rows start on 16 bytes; 32 bits suffice within a tile."""
    d = tl.arange(0, D)
    ptrs = ptr + ((row * step)[:, None] + d[None, :])
    ptrs = tl.multiple_of(ptrs, (1, 16))
    return tl.load(ptrs) if WHOLE else tl.load(ptrs, mask=in_range[:, None], other=0.0)


@triton.jit
def _store(ptr, tile, row, step, in_range, D: tl.constexpr):
    ptrs = ptr + ((row * step)[:, None] + tl.arange(0, D)[None, :])
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=in_range[:, None])


@triton.jit
def _terms(
    do_ptr,
    out_ptr,
    row_max_ptr,
    row_sum_ptr,
    terms_ptr,
    huge_ptr,
    do,
    i,
    in_range,
    H,
    D: tl.constexpr,
):
    """L and δ of a block of queries, stored for the other kernels, and whether one is huge."""
    out = _rows(out_ptr, i, H * D, in_range, D, False)
    row_max = tl.load(row_max_ptr + i, mask=in_range, other=0.0)
    log2_sum = tl.log2(tl.load(row_sum_ptr + i, mask=in_range, other=1.0))
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    logsum = row_max * LOG2E + log2_sum
    huge = tl.max((tl.abs(logsum) > HUGE).to(tl.int32), 0)
    tl.store(terms_ptr + 2 * i, logsum, mask=in_range)
    tl.store(terms_ptr + 2 * i + 1, delta, mask=in_range)
    tl.store(huge_ptr, huge)
    return row_max, log2_sum, logsum, delta, huge


@triton.jit
def _pair_of_terms(terms_ptr, BLOCK_I: tl.constexpr):
    """L and δ of BLOCK_I queries; in one load, so that they are copied ahead and not by every thread for itself."""
    return tl.split(tl.reshape(tl.load(terms_ptr + tl.arange(0, 2 * BLOCK_I)), [BLOCK_I, 2]))


@triton.jit
def _lean_dq(
    q_ptr,
    k_ptr,
    v_ptr,
    words_ptr,  # tiles [BLOCK_I, BLOCK_J]
    key_ptr,
    spans_ptr,
    do_ptr,
    out_ptr,  # [B, R, I, H, D] contiguous
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
    terms_ptr,  # [B, R, H, I, 2] contiguous: L and δ are left here for the other kernels
    huge_ptr,  # [B, R, H, blocks of queries] contiguous
    dq_ptr,  # [B, R, I, H, D] contiguous
    stride_qb: tl.int64,
    stride_qr: tl.int64,
    stride_qi,
    stride_qh: tl.int64,
    stride_kb: tl.int64,
    stride_kr: tl.int64,
    stride_kj,
    stride_kh: tl.int64,
    stride_vb: tl.int64,
    stride_vr: tl.int64,
    stride_vj,
    stride_vh: tl.int64,
    stride_key_b: tl.int64,
    stride_key_r: tl.int64,
    stride_key_j,
    stride_dob: tl.int64,
    stride_dor: tl.int64,
    stride_doi,
    stride_doh: tl.int64,
    R,
    H,
    I,
    J,
    scale,
    fill,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEY_TERM: tl.constexpr,
    KEY_TERM_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    WARPS: tl.constexpr,
):
    WORDS: tl.constexpr = BLOCK_I * BLOCK_J // 2
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    blocks = tl.cdiv(I, BLOCK_I)
    b, r, h, block = program_place(blocks, R, H)
    first = (block * BLOCK_I).to(tl.int64)
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    i_in_range = i < I - first
    row = b * R + r
    head = row * H + h

    q_ptr += b * stride_qb + r * stride_qr + h * stride_qh + first * stride_qi
    k_ptr += b * stride_kb + r * stride_kr + h * stride_kh
    v_ptr += b * stride_vb + r * stride_vr + h * stride_vh
    do_ptr += b * stride_dob + r * stride_dor + h * stride_doh + first * stride_doi
    if HAS_BIAS:
        words_ptr += ((b * H + h) * blocks + block) * tl.cdiv(J, BLOCK_J) * WORDS
    out_offset = ((row * I + first) * H + h) * D
    queries = head * I + first

    q = _rows(q_ptr, i, stride_qi, i_in_range, D, False)
    do = _rows(do_ptr, i, stride_doi, i_in_range, D, False)
    row_max, log2_sum, logsum, delta, huge = _terms(
        do_ptr,
        out_ptr + out_offset,
        row_max_ptr + queries,
        row_sum_ptr + queries,
        terms_ptr + 2 * queries,
        huge_ptr + head * blocks + block,
        do,
        i,
        i_in_range,
        H,
        D,
    )
    clean = J
    end = J
    if KEY_TERM != "none":
        key_ptr += b * stride_key_b + r * stride_key_r
        clean = tl.load(spans_ptr + 2 * row)
        end = tl.load(spans_ptr + 2 * row + 1)
    clean = tl.where(huge != 0, 0, clean // BLOCK_J * BLOCK_J)
    end = tl.where(huge != 0, J, end)

    factor = tl.cast(scale, tl.float32) * LOG2E
    dq = tl.zeros([BLOCK_I, D], tl.float32)
    # Where the second loop starts, found apart: pointers that outlive a loop cost it additions.
    k_after = k_ptr + clean * tl.cast(stride_kj, tl.int64)
    v_after = v_ptr + clean * tl.cast(stride_vj, tl.int64)
    words_after = words_ptr
    if HAS_BIAS:
        words_after += clean // BLOCK_J * WORDS
    for _ in range(0, clean, BLOCK_J):
        k = _rows(k_ptr, j, stride_kj, None, D, True)
        v = _rows(v_ptr, j, stride_vj, None, D, True)
        qk = dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_I, BLOCK_J]
        dp = dot(do, tl.trans(v), None, PRECISION)
        if HAS_BIAS:
            bias = _unpack(tl.load(words_ptr + tl.arange(0, WORDS)), dtype, BLOCK_I, BLOCK_J, WARPS)
            p = tl.exp2(qk * factor + (bias * LOG2E - logsum[:, None]))
            words_ptr += WORDS
        else:
            p = tl.exp2(qk * factor - logsum[:, None])
        ds = p * (dp - delta[:, None])
        dq = dot(ds.to(dtype), k, dq, PRECISION)
        k_ptr += BLOCK_J * tl.cast(stride_kj, tl.int64)
        v_ptr += BLOCK_J * tl.cast(stride_vj, tl.int64)

    if KEY_TERM != "none":
        key_ptr += clean * tl.cast(stride_key_j, tl.int64)
    for start in range(clean, end, BLOCK_J):
        in_range = j < J - start
        k = _rows(k_after, j, stride_kj, in_range, D, False)
        v = _rows(v_after, j, stride_vj, in_range, D, False)
        qk = dot(q, tl.trans(k), None, PRECISION)
        dp = dot(do, tl.trans(v), None, PRECISION)
        key = load_key_term(key_ptr, j, in_range, stride_key_j, KEY_TERM)
        bias = 0.0
        if HAS_BIAS:
            bias = _unpack(tl.load(words_after + tl.arange(0, WORDS)), dtype, BLOCK_I, BLOCK_J, WARPS)
            words_after += WORDS
        x = logits_tile(
            qk, bias, key[None, :], in_range[None, :], scale, fill, HAS_BIAS, KEY_TERM, KEY_TERM_FIRST, False
        )
        ds = probabilities(x, row_max[:, None], log2_sum[:, None]) * (dp - delta[:, None])
        if KEY_TERM == "select":
            ds = tl.where(key[None, :], 0.0, ds)
        # p is NaN, not 0, past the end of a row whose logits are all -inf.
        ds = tl.where(in_range[None, :], ds, 0.0)
        dq = dot(ds.to(dtype), k, dq, PRECISION)
        k_after += BLOCK_J * tl.cast(stride_kj, tl.int64)
        v_after += BLOCK_J * tl.cast(stride_vj, tl.int64)
        if KEY_TERM != "none":
            key_ptr += BLOCK_J * tl.cast(stride_key_j, tl.int64)

    _store(dq_ptr + out_offset, dq * scale, i, H * D, i_in_range, D)


@triton.jit
def _lean_dkdv(
    q_ptr,
    k_ptr,
    v_ptr,
    words_ptr,  # tiles [BLOCK_J, BLOCK_I]
    key_ptr,
    spans_ptr,
    do_ptr,
    row_max_ptr,
    row_sum_ptr,
    terms_ptr,
    huge_ptr,
    dk_ptr,  # [B, R, J, H, D] contiguous
    dv_ptr,  # [B, R, J, H, D] contiguous
    stride_qb: tl.int64,
    stride_qr: tl.int64,
    stride_qi,
    stride_qh: tl.int64,
    stride_kb: tl.int64,
    stride_kr: tl.int64,
    stride_kj,
    stride_kh: tl.int64,
    stride_vb: tl.int64,
    stride_vr: tl.int64,
    stride_vj,
    stride_vh: tl.int64,
    stride_key_b: tl.int64,
    stride_key_r: tl.int64,
    stride_key_j,
    stride_dob: tl.int64,
    stride_dor: tl.int64,
    stride_doi,
    stride_doh: tl.int64,
    R,
    H,
    I,
    J,
    flags,  # of `huge_ptr`, to a head
    scale,
    fill,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEY_TERM: tl.constexpr,
    KEY_TERM_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    WARPS: tl.constexpr,
):
    WORDS: tl.constexpr = BLOCK_I * BLOCK_J // 2
    # Without a key term the second loop is seldom more than one tile: copies ahead would only cost the first registers.
    SLOW_STAGES: tl.constexpr = 1 if KEY_TERM == "none" else None
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    blocks = tl.cdiv(J, BLOCK_J)
    b, r, h, block = program_place(blocks, R, H)
    first = (block * BLOCK_J).to(tl.int64)
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    j_in_range = j < J - first
    row = b * R + r
    head = row * H + h

    q_ptr += b * stride_qb + r * stride_qr + h * stride_qh
    k_ptr += b * stride_kb + r * stride_kr + h * stride_kh + first * stride_kj
    v_ptr += b * stride_vb + r * stride_vr + h * stride_vh + first * stride_vj
    do_ptr += b * stride_dob + r * stride_dor + h * stride_doh
    if HAS_BIAS:
        words_ptr += ((b * H + h) * blocks + block) * tl.cdiv(I, BLOCK_I) * WORDS
    out_offset = ((row * J + first) * H + h) * D
    terms_ptr += 2 * head * I
    row_max_ptr += head * I
    row_sum_ptr += head * I

    huge = 0
    for n in range(0, flags, 32):
        flag = n + tl.arange(0, 32)
        huge += tl.sum(tl.load(huge_ptr + head * flags + flag, mask=flag < flags, other=0), 0)
    whole = I // BLOCK_I * BLOCK_I
    last = I
    if KEY_TERM != "none":
        key_ptr += b * stride_key_b + r * stride_key_r + first * stride_key_j
        clean = tl.load(spans_ptr + 2 * row)
        end = tl.load(spans_ptr + 2 * row + 1)
        whole = tl.where(first + BLOCK_J <= tl.where(clean == J, J + BLOCK_J, clean), whole, 0)
        last = tl.where((first >= end) & (huge == 0), 0, I)
    whole = tl.where(huge != 0, 0, whole)

    k = _rows(k_ptr, j, stride_kj, j_in_range, D, False)
    v = _rows(v_ptr, j, stride_vj, j_in_range, D, False)
    key = load_key_term(key_ptr, j, j_in_range, stride_key_j, KEY_TERM)
    factor = tl.cast(scale, tl.float32) * LOG2E
    dk = tl.zeros([BLOCK_J, D], tl.float32)
    dv = tl.zeros([BLOCK_J, D], tl.float32)

    q_after = q_ptr + whole * tl.cast(stride_qi, tl.int64)
    do_after = do_ptr + whole * tl.cast(stride_doi, tl.int64)
    terms_after = terms_ptr + 2 * whole
    words_after = words_ptr
    if HAS_BIAS:
        words_after += whole // BLOCK_I * WORDS
    # Tiles are [j, i] here: p and ds are the left operands of their products as they come. Keys past the end are
    # whole rows of them, and are not stored.
    for _ in range(0, whole, BLOCK_I):
        q = _rows(q_ptr, i, stride_qi, None, D, True)
        do = _rows(do_ptr, i, stride_doi, None, D, True)
        logsum, delta = _pair_of_terms(terms_ptr, BLOCK_I)
        kq = dot(k, tl.trans(q), None, PRECISION)  # [BLOCK_J, BLOCK_I]
        dp = dot(v, tl.trans(do), None, PRECISION)
        if HAS_BIAS:
            bias = _unpack(tl.load(words_ptr + tl.arange(0, WORDS)), dtype, BLOCK_J, BLOCK_I, WARPS)
            p = tl.exp2(kq * factor + (bias * LOG2E - logsum[None, :]))
            words_ptr += WORDS
        else:
            p = tl.exp2(kq * factor - logsum[None, :])
        ds = p * (dp - delta[None, :])
        dv = dot(p.to(dtype), do, dv, PRECISION)
        dk = dot(ds.to(dtype), q, dk, PRECISION)
        q_ptr += BLOCK_I * tl.cast(stride_qi, tl.int64)
        do_ptr += BLOCK_I * tl.cast(stride_doi, tl.int64)
        terms_ptr += 2 * BLOCK_I

    for start in tl.range(whole, last, BLOCK_I, num_stages=SLOW_STAGES):
        in_range = i < I - start
        q = _rows(q_after, i, stride_qi, in_range, D, False)
        do = _rows(do_after, i, stride_doi, in_range, D, False)
        # An infinite maximum makes p = 0 for a query past the end, whatever the key term.
        row_max = tl.load(row_max_ptr + start + i, mask=in_range, other=float("inf"))
        log2_sum = tl.log2(tl.load(row_sum_ptr + start + i, mask=in_range, other=1.0))
        delta = tl.load(terms_after + 2 * i + 1, mask=in_range, other=0.0)
        kq = dot(k, tl.trans(q), None, PRECISION)
        dp = dot(v, tl.trans(do), None, PRECISION)
        bias = 0.0
        if HAS_BIAS:
            bias = _unpack(tl.load(words_after + tl.arange(0, WORDS)), dtype, BLOCK_J, BLOCK_I, WARPS)
            words_after += WORDS
        x = logits_tile(kq, bias, key[:, None], None, scale, fill, HAS_BIAS, KEY_TERM, KEY_TERM_FIRST, True)
        p = probabilities(x, row_max[None, :], log2_sum[None, :])
        ds = p * (dp - delta[None, :])
        if KEY_TERM == "select":
            ds = tl.where(key[:, None], 0.0, ds)
        dv = dot(p.to(dtype), do, dv, PRECISION)
        dk = dot(ds.to(dtype), q, dk, PRECISION)
        q_after += BLOCK_I * tl.cast(stride_qi, tl.int64)
        do_after += BLOCK_I * tl.cast(stride_doi, tl.int64)
        terms_after += 2 * BLOCK_I

    _store(dk_ptr + out_offset, dk * scale, j, H * D, j_in_range, D)
    _store(dv_ptr + out_offset, dv, j, H * D, j_in_range, D)


@triton.jit
def _lean_dbias(
    q_ptr,
    k_ptr,
    v_ptr,
    words_ptr,  # tiles [BLOCK_I, BLOCK_J]
    key_ptr,
    spans_ptr,
    do_ptr,
    row_max_ptr,
    row_sum_ptr,
    terms_ptr,
    huge_ptr,
    dbias_ptr,  # [groups, B, H, I, J] contiguous
    stride_qb: tl.int64,
    stride_qr: tl.int64,
    stride_qi,
    stride_qh: tl.int64,
    stride_kb: tl.int64,
    stride_kr: tl.int64,
    stride_kj,
    stride_kh: tl.int64,
    stride_vb: tl.int64,
    stride_vr: tl.int64,
    stride_vj,
    stride_vh: tl.int64,
    stride_key_b: tl.int64,
    stride_key_r: tl.int64,
    stride_key_j,
    stride_dob: tl.int64,
    stride_dor: tl.int64,
    stride_doi,
    stride_doh: tl.int64,
    B,
    R,
    H,
    I,
    J,
    rows,  # of r, to a group
    flagged,  # queries to a flag of `huge_ptr`: a multiple of BLOCK_I
    scale,
    fill,
    D: tl.constexpr,
    KEY_TERM: tl.constexpr,
    KEY_TERM_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    WARPS: tl.constexpr,
):
    WORDS: tl.constexpr = BLOCK_I * BLOCK_J // 2
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    # Keys innermost: neighbours share the queries of a row.
    pid = tl.program_id(0)
    blocks_i = tl.cdiv(I, BLOCK_I)
    blocks_j = tl.cdiv(J, BLOCK_J)
    head = (pid // (blocks_i * blocks_j)).to(tl.int64)  # of [groups, B, H]
    h = head % H
    b = head // H % B
    first_row = head // H // B * rows
    rows = tl.minimum(rows, R - first_row).to(tl.int32)
    block_i = pid // blocks_j % blocks_i
    block_j = pid % blocks_j
    first_i = (block_i * BLOCK_I).to(tl.int64)
    first_j = (block_j * BLOCK_J).to(tl.int64)
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    i_in_range = i < I - first_i
    j_in_range = j < J - first_j

    q_ptr += b * stride_qb + first_row * stride_qr + h * stride_qh + first_i * stride_qi
    k_ptr += b * stride_kb + first_row * stride_kr + h * stride_kh + first_j * stride_kj
    v_ptr += b * stride_vb + first_row * stride_vr + h * stride_vh + first_j * stride_vj
    do_ptr += b * stride_dob + first_row * stride_dor + h * stride_doh + first_i * stride_doi
    tile = ((b * H + h) * blocks_i + block_i) * blocks_j + block_j
    bias = _unpack(tl.load(words_ptr + tile * WORDS + tl.arange(0, WORDS)), dtype, BLOCK_I, BLOCK_J, WARPS)
    row = b * R + first_row
    queries = (row * H + h) * I + first_i
    terms_ptr += 2 * queries

    # Which form all the rows of the group can take, and whether any of them reaches these keys.
    plain = ((first_i + BLOCK_I <= I) & (first_j + BLOCK_J <= J)).to(tl.int32)
    reached = 0
    for n in range(0, rows, 32):
        some = n + tl.arange(0, 32)
        flag = ((row + some) * H + h) * tl.cdiv(I, flagged) + first_i // flagged
        huge = tl.load(huge_ptr + flag, mask=some < rows, other=0)
        plain = tl.minimum(plain, 1 - tl.max(huge, 0))
        if KEY_TERM != "none":
            clean = tl.load(spans_ptr + 2 * (row + some), mask=some < rows, other=J)
            end = tl.load(spans_ptr + 2 * (row + some) + 1, mask=some < rows, other=0)
            plain = tl.minimum(plain, tl.min((clean >= first_j + BLOCK_J).to(tl.int32), 0))
            reached = tl.maximum(reached, tl.max(((end > first_j) | (huge != 0)).to(tl.int32), 0))
        else:
            reached = 1
    plain_rows = tl.where(plain != 0, rows, 0)
    rows = tl.where(reached != 0, rows, 0)

    factor = tl.cast(scale, tl.float32) * LOG2E
    dbias = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    q_start = q_ptr
    k_start = k_ptr
    v_start = v_ptr
    do_start = do_ptr
    terms_start = terms_ptr
    # One row ahead of their use: the compiler copies only what products read.
    logsum = tl.load(terms_ptr + 2 * i, mask=i_in_range, other=0.0)
    delta = tl.load(terms_ptr + 2 * i + 1, mask=i_in_range, other=0.0)
    for n in range(plain_rows):
        q = _rows(q_ptr, i, stride_qi, None, D, True)
        k = _rows(k_ptr, j, stride_kj, None, D, True)
        v = _rows(v_ptr, j, stride_vj, None, D, True)
        do = _rows(do_ptr, i, stride_doi, None, D, True)
        qk = dot(q, tl.trans(k), None, PRECISION)
        dp = dot(do, tl.trans(v), None, PRECISION)
        after = terms_ptr + tl.where(n + 1 < plain_rows, 2 * H * I, 0)
        next_logsum = tl.load(after + 2 * i)
        next_delta = tl.load(after + 2 * i + 1)
        p = tl.exp2(qk * factor + (bias * LOG2E - logsum[:, None]))
        dbias += p * (dp - delta[:, None])
        logsum = next_logsum
        delta = next_delta
        q_ptr += stride_qr
        k_ptr += stride_kr
        v_ptr += stride_vr
        do_ptr += stride_dor
        terms_ptr += 2 * H * I

    row_max_ptr += queries
    row_sum_ptr += queries
    if KEY_TERM != "none":
        key_ptr += b * stride_key_b + first_row * stride_key_r + first_j * stride_key_j
    for _ in range(plain_rows, rows):
        q = _rows(q_start, i, stride_qi, i_in_range, D, False)
        k = _rows(k_start, j, stride_kj, j_in_range, D, False)
        v = _rows(v_start, j, stride_vj, j_in_range, D, False)
        do = _rows(do_start, i, stride_doi, i_in_range, D, False)
        row_max = tl.load(row_max_ptr + i, mask=i_in_range, other=0.0)
        log2_sum = tl.log2(tl.load(row_sum_ptr + i, mask=i_in_range, other=1.0))
        delta = tl.load(terms_start + 2 * i + 1, mask=i_in_range, other=0.0)
        key = load_key_term(key_ptr, j, j_in_range, stride_key_j, KEY_TERM)
        qk = dot(q, tl.trans(k), None, PRECISION)
        dp = dot(do, tl.trans(v), None, PRECISION)
        # Keys past the end are not stored: no need to make them -inf.
        x = logits_tile(qk, bias, key[None, :], None, scale, fill, True, KEY_TERM, KEY_TERM_FIRST, True)
        ds = probabilities(x, row_max[:, None], log2_sum[:, None]) * (dp - delta[:, None])
        if KEY_TERM == "select" and not KEY_TERM_FIRST:
            ds = tl.where(key[None, :], 0.0, ds)
        dbias += ds
        q_start += stride_qr
        k_start += stride_kr
        v_start += stride_vr
        do_start += stride_dor
        terms_start += 2 * H * I
        row_max_ptr += H * I
        row_sum_ptr += H * I
        if KEY_TERM != "none":
            key_ptr += stride_key_r

    place = (head * I + first_i) * J + first_j + ((i * J)[:, None] + j[None, :])
    tl.store(dbias_ptr + place, dbias.to(dbias_ptr.dtype.element_ty), mask=i_in_range[:, None] & j_in_range[None, :])


def refusal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, grad_out: Tensor) -> str | None:
    """Why these kernels cannot take a call, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return "not of 16 bits"
    if q.shape[-1] not in (16, 32, 64):
        return "head size is not 16, 32 or 64"
    if bias is not None and bias.dtype != q.dtype:
        return "bias is of another dtype"
    if not all(map(arguments.rows_are_aligned, (q, k, v, grad_out))):
        return "rows do not start on 16 bytes"
    if any(t.stride(2) >= 2**24 for t in (q, k, v, grad_out)) or (bias is not None and bias.shape[3] >= 2**24):
        return "offsets within a tile pass 32 bits"
    return None


class Tile(NamedTuple):
    """Of one kernel; `maxnreg` None leaves the registers to the compiler."""

    BLOCK_I: int
    BLOCK_J: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        return {name: value for name, value in self._asdict().items() if value is not None} | {"WARPS": self.num_warps}


class Choice(NamedTuple):
    dq: Tile = Tile(64, 64, 4, 2, 128)
    dkdv: Tile = Tile(64, 64, 4, 2, 168)
    dbias: Tile = Tile(64, 64, 4, 2, 168)


CHOICE = Choice()


def bias_words(bias: Tensor | None, by_i: Tile, by_j: Tile) -> tuple[Tensor | None, Tensor | None]:
    """Tiles `[i, j]` and `[j, i]`; one launch where both are of one shape."""
    if bias is None:
        return None, None
    B, H, I, J = bias.shape
    counts = [B * H * triton.cdiv(I, tile.BLOCK_I) * triton.cdiv(J, tile.BLOCK_J) for tile in (by_i, by_j)]
    shapes = [(by_i.BLOCK_I, by_i.BLOCK_J, by_i.num_warps), (by_j.BLOCK_J, by_j.BLOCK_I, by_j.num_warps)]
    sizes = [count * shape[0] * shape[1] // 2 for count, shape in zip(counts, shapes, strict=True)]
    words = torch.empty(sum(sizes), dtype=torch.int32, device=bias.device)
    first, second = words.split(sizes)
    given = (*bias.stride(), H, I, J)
    if shapes[0] == shapes[1]:
        _words[(sum(counts),)](bias, words, *given, counts[0], *shapes[0])
    else:
        _words[(counts[0],)](bias, first, *given, counts[0], *shapes[0])
        _words[(counts[1],)](bias, second, *given, 0, *shapes[1])
    return first, second


def key_spans(key: Tensor | None, fill: float, selects: bool) -> Tensor | None:
    if key is None:
        return None
    B, R, J = key.shape
    spans = torch.empty((B, R, 2), dtype=torch.int32, device=key.device)
    _spans[(B * R,)](
        key, spans, *key.stride(), R, J, fill, "select" if selects else "add", min(1024, triton.next_power_of_2(J))
    )
    return spans


@triton.jit
def _sum(parts_ptr, sum_ptr, count: tl.int64, groups, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(groups):
        total += tl.load(parts_ptr + place, mask=place < count, other=0.0)
        parts_ptr += count
    tl.store(sum_ptr + place, total.to(sum_ptr.dtype.element_ty), mask=place < count)


def strides(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, grad_out: Tensor) -> tuple[int, ...]:
    """In the order of the kernels' parameters; columns lie side by side."""
    keys = (0, 0, 0) if key is None else key.stride()
    return (*q.stride()[:4], *k.stride()[:4], *v.stride()[:4], *keys, *grad_out.stride()[:4])


def launch_dbias(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor | None,
    key: Tensor | None,
    spans: Tensor | None,
    grad_out: Tensor,
    saved: tuple[Tensor, ...],
    steps: tuple[int, ...],
    scale: float,
    fill: float,
    constants: tuple[Any, ...],
    tile: Tile,
    flagged: int,
) -> Tensor:
    B, R, I, H, _ = q.shape
    J = k.shape[2]
    dbias = torch.empty((B, H, I, J), dtype=q.dtype, device=q.device)
    programs = B * H * triton.cdiv(I, tile.BLOCK_I) * triton.cdiv(J, tile.BLOCK_J)
    grouped = triton.cdiv(R, tiling.dbias_groups(R, programs))
    groups = triton.cdiv(R, grouped)
    parts = dbias
    if groups > 1:
        parts = torch.empty((groups, *dbias.shape), dtype=torch.float32, device=q.device)
    _lean_dbias[(groups * programs,)](
        q, k, v, words, key, spans, grad_out, *saved, parts, *steps, B, R, H, I, J, grouped, flagged, scale, fill,
        constants[0], *constants[2:], **tile.options,
    )  # fmt: skip
    if groups > 1:
        count = dbias.numel()
        _sum[(triton.cdiv(count, 1024),)](parts, dbias, count, groups, 1024)
    return dbias


def launch(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    scale: float,
    fill: float,
    key_term_first: bool,
    needs_dbias: bool,
    choice: Choice = CHOICE,
    only: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `backward.launch`, for calls that `refusal` lets through and with at least one element."""
    B, R, I, H, D = q.shape
    J = k.shape[2]
    key = key_bias if key_mask is None else key_mask
    term = "none" if key is None else "add" if key_mask is None else "select"
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=q.dtype, device=q.device)
    dv = torch.empty_like(dk)
    terms = torch.empty((B, R, H, I, 2), dtype=torch.float32, device=q.device)
    flags = triton.cdiv(I, choice.dq.BLOCK_I)
    huge = torch.empty((B, R, H, flags), dtype=torch.int32, device=q.device)

    by_i, by_j = bias_words(bias, choice.dq, choice.dkdv)
    spans = key_spans(key, fill, key_mask is not None)
    steps = strides(q, k, v, key, grad_out)
    constants = (D, bias is not None, term, key_term_first, arguments.dot_precision(q.dtype, D))
    if only in (None, "dq"):
        _lean_dq[(B * R * H * flags,)](
            q, k, v, by_i, key, spans, grad_out, out, row_max, row_sum, terms, huge, dq, *steps, R, H, I, J, scale,
            fill, *constants, **choice.dq.options,
        )  # fmt: skip
    saved = (row_max, row_sum, terms, huge)
    if only in (None, "dkdv"):
        _lean_dkdv[(B * R * H * triton.cdiv(J, choice.dkdv.BLOCK_J),)](
            q, k, v, by_j, key, spans, grad_out, *saved, dk, dv, *steps, R, H, I, J, flags, scale, fill, *constants,
            **choice.dkdv.options,
        )  # fmt: skip
    dbias = torch.empty((0,), dtype=q.dtype, device=q.device)
    if bias is not None and needs_dbias and only in (None, "dbias"):
        tile = choice.dbias
        if tile[:3] != choice.dq[:3]:
            by_i, _ = bias_words(bias, tile, tile)
        dbias = launch_dbias(
            q, k, v, by_i, key, spans, grad_out, saved, steps, scale, fill, constants, tile, choice.dq.BLOCK_I
        )  # fmt: skip
    return dq, dk, dv, dbias
