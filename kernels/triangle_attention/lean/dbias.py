"""dbias = Σ_r ds: a program owns a tile of `[i, j]` and walks the rows of its group.

Nothing of a row is read twice by one program, so what a query adds is loaded a row ahead by hand: the compiler
copies ahead only what products read.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from trifast_inductor.kernels.triangle_attention.lean.operands import load
from trifast_inductor.kernels.triangle_attention.lean.words import unpack
from trifast_inductor.kernels.triangle_attention.logits import LOG2E, dot, load_key_term, logits_tile, probabilities


@triton.jit
def _triangle_attention_bwd_dbias_lean(
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
    bias = unpack(tl.load(words_ptr + tile * WORDS + tl.arange(0, WORDS)), dtype, BLOCK_I, BLOCK_J, WARPS)
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
        q = load(q_ptr, i, stride_qi, None, D, True)
        k = load(k_ptr, j, stride_kj, None, D, True)
        v = load(v_ptr, j, stride_vj, None, D, True)
        do = load(do_ptr, i, stride_doi, None, D, True)
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
        q = load(q_start, i, stride_qi, i_in_range, D, False)
        k = load(k_start, j, stride_kj, j_in_range, D, False)
        v = load(v_start, j, stride_vj, j_in_range, D, False)
        do = load(do_start, i, stride_doi, i_in_range, D, False)
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
