"""dbias = Σ_r ds: a program owns a tile of `[i, j]` and walks the rows of its group.

Nothing of a row is read twice by one program, so what a query adds is loaded a row ahead by hand: the compiler
copies ahead only what products read.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from trifast_inductor.kernels.triangle_attention.lean.keys import load_terms
from trifast_inductor.kernels.triangle_attention.lean.operands import load, short_probabilities
from trifast_inductor.kernels.triangle_attention.lean.words import SIDE, SQUARE, unpack
from trifast_inductor.kernels.triangle_attention.logits import LOG2E, dot, load_key_term, logits_tile, probabilities


@triton.jit
def _triangle_attention_bwd_dbias_lean(
    q_ptr,
    k_ptr,
    v_ptr,
    words_ptr,  # of the bias, [i, j]
    key_ptr,
    key_terms_ptr,
    spans_ptr,
    do_ptr,
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
    terms_ptr,  # [B, R, H, I, 2] contiguous: L and δ
    huge_ptr,  # [B, R, H, flags] contiguous
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
    J_terms,
    rows,  # of r, to a group
    flags,  # of `huge_ptr`, to a head: one for each block of queries
    scale,
    fill,
    D: tl.constexpr,
    KEY_TERM: tl.constexpr,
    KEY_TERM_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    tl.static_assert(BLOCK_I == SIDE and BLOCK_J == SIDE)
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
    words_ptr += ((b * H + h) * blocks_i + block_i) * tl.cdiv(J, SIDE) * SQUARE + block_j * WORDS
    bias = unpack(tl.load(words_ptr + tl.arange(0, WORDS)), dtype, BLOCK_J)
    row = b * R + first_row
    queries = (row * H + h) * I + first_i
    terms_start = terms_ptr
    terms_ptr += 2 * queries

    # How many rows come before the first that the short form does not suit, and whether any reaches these keys.
    whole = (first_i + BLOCK_I <= I) & (first_j + BLOCK_J <= J)
    short = rows
    reached = 0
    for n in range(0, rows, 32):
        some = n + tl.arange(0, 32)
        unsuited = tl.load(huge_ptr + ((row + some) * H + h) * flags + block_i, mask=some < rows, other=0)
        if KEY_TERM != "none":
            end = tl.load(spans_ptr + 2 * (row + some), mask=some < rows, other=0)
            unsuited += tl.load(spans_ptr + 2 * (row + some) + 1, mask=some < rows, other=0)
            reached = tl.maximum(reached, tl.max(((end > first_j) | (unsuited != 0)).to(tl.int32), 0))
        else:
            reached = 1
        short = tl.minimum(short, tl.min(tl.where(unsuited != 0, some, rows), 0))
    short = tl.where(whole & (reached != 0), short, 0)
    rows = tl.where(reached != 0, rows, 0)

    factor = tl.cast(scale, tl.float32) * LOG2E
    dbias = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    # Where the second loop starts, found apart: pointers that outlive a loop cost it additions.
    q_after = q_ptr + short * stride_qr
    k_after = k_ptr + short * stride_kr
    v_after = v_ptr + short * stride_vr
    do_after = do_ptr + short * stride_dor
    if KEY_TERM != "none":
        key_ptr += b * stride_key_b + (first_row + short) * stride_key_r + first_j * stride_key_j
        key_terms_ptr += row * J_terms + first_j
    # One row ahead of their use: the compiler copies only what products read.
    logsum = tl.load(terms_ptr + 2 * i, mask=i_in_range, other=0.0)
    delta = tl.load(terms_ptr + 2 * i + 1, mask=i_in_range, other=0.0)
    for n in range(short):
        q = load(q_ptr, i, stride_qi, None, D, True)
        k = load(k_ptr, j, stride_kj, None, D, True)
        v = load(v_ptr, j, stride_vj, None, D, True)
        do = load(do_ptr, i, stride_doi, None, D, True)
        short_key = j
        if KEY_TERM != "none":
            short_key = load_terms(key_terms_ptr + n * J_terms)
        qk = dot(q, tl.trans(k), None, PRECISION)
        dp = dot(do, tl.trans(v), None, PRECISION)
        after = terms_ptr + tl.where(n + 1 < short, 2 * H * I, 0)
        next_logsum = tl.load(after + 2 * i)
        next_delta = tl.load(after + 2 * i + 1)
        p = short_probabilities(qk, factor, bias, logsum[:, None], short_key[None, :], True, KEY_TERM)
        dbias += p * (dp - delta[:, None])
        logsum = next_logsum
        delta = next_delta
        q_ptr += stride_qr
        k_ptr += stride_kr
        v_ptr += stride_vr
        do_ptr += stride_dor
        terms_ptr += 2 * H * I

    for n in tl.range(short, rows, num_stages=1):
        q = load(q_after, i, stride_qi, i_in_range, D, False)
        k = load(k_after, j, stride_kj, j_in_range, D, False)
        v = load(v_after, j, stride_vj, j_in_range, D, False)
        do = load(do_after, i, stride_doi, i_in_range, D, False)
        query = queries + n * (H * I).to(tl.int64) + i
        row_max = tl.load(row_max_ptr + query, mask=i_in_range, other=0.0)
        log2_sum = tl.log2(tl.load(row_sum_ptr + query, mask=i_in_range, other=1.0))
        delta = tl.load(terms_start + 2 * query + 1, mask=i_in_range, other=0.0)
        key = load_key_term(key_ptr, j, j_in_range, stride_key_j, KEY_TERM)
        qk = dot(q, tl.trans(k), None, PRECISION)
        dp = dot(do, tl.trans(v), None, PRECISION)
        # Keys past the end are not stored: no need to make them -inf.
        x = logits_tile(qk, bias, key[None, :], None, scale, fill, True, KEY_TERM, KEY_TERM_FIRST, True)
        ds = probabilities(x, row_max[:, None], log2_sum[:, None]) * (dp - delta[:, None])
        if KEY_TERM == "select" and not KEY_TERM_FIRST:
            ds = tl.where(key[None, :], 0.0, ds)
        dbias += ds
        q_after += stride_qr
        k_after += stride_kr
        v_after += stride_vr
        do_after += stride_dor
        if KEY_TERM != "none":
            key_ptr += stride_key_r

    place = (head * I + first_i) * J + first_j + ((i * J)[:, None] + j[None, :])
    tl.store(dbias_ptr + place, dbias.to(dbias_ptr.dtype.element_ty), mask=i_in_range[:, None] & j_in_range[None, :])
