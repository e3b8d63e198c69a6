"""dq = scale·Σ_j ds·k: a program owns a block of queries, walks the keys, and leaves its terms for the others."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from trifast_inductor.kernels.triangle_attention.lean.keys import load_terms
from trifast_inductor.kernels.triangle_attention.lean.operands import (
    flag_of,
    head_of,
    leave_terms,
    load,
    short_probabilities,
    store,
)
from trifast_inductor.kernels.triangle_attention.lean.words import SIDE, SQUARE, unpack
from trifast_inductor.kernels.triangle_attention.logits import LOG2E, dot, load_key_term, logits_tile, probabilities
from trifast_inductor.kernels.triangle_attention.order import program_place


@triton.jit
def dq_of_block(
    b,
    r,
    h,
    block,
    operands,
    words_ptr,  # of the bias, [i, j]
    prepared,
    saved,
    left,
    dq_ptr,  # [B, R, I, H, D] contiguous
    sizes,
    numbers,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEY_TERM: tl.constexpr,
    KEY_TERM_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """dq of one block of queries; what it leaves of them, the kernels that follow read."""
    tl.static_assert(BLOCK_I == SIDE and BLOCK_J == SIDE)
    of_q, of_k, of_v, of_key, of_do = operands
    key_ptr, stride_key_b, stride_key_r, stride_key_j = of_key
    key_terms_ptr, spans_ptr = prepared
    R, H, I, J, J_terms = sizes
    scale, fill = numbers
    WORDS: tl.constexpr = BLOCK_I * BLOCK_J // 2
    # Rows that are wholly left out, as padding has, take the second loop throughout. Without key terms it is seldom
    # more than one tile, and copies ahead would only cost registers.
    SLOW_STAGES: tl.constexpr = 1 if KEY_TERM == "none" else 2
    dtype: tl.constexpr = dq_ptr.dtype.element_ty
    blocks = tl.cdiv(I, BLOCK_I)
    first = (block * BLOCK_I).to(tl.int64)
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    i_in_range = i < I - first
    row = b * R + r

    q_ptr, stride_qi = head_of(of_q, b, r, h)
    q_ptr += first * stride_qi
    k_ptr, stride_kj = head_of(of_k, b, r, h)
    v_ptr, stride_vj = head_of(of_v, b, r, h)
    do_ptr, stride_doi = head_of(of_do, b, r, h)
    do_ptr += first * stride_doi
    if HAS_BIAS:
        words_ptr += ((b * H + h) * blocks + block) * tl.cdiv(J, SIDE) * SQUARE
    out_offset = ((row * I + first) * H + h) * D

    q = load(q_ptr, i, stride_qi, i_in_range, D, False)
    do = load(do_ptr, i, stride_doi, i_in_range, D, False)
    out_ptr, row_max_ptr, row_sum_ptr = saved
    out = load(out_ptr + out_offset, i, H * D, i_in_range, D, False)
    terms_ptr, huge_ptr = left
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    row_max, log2_sum, logsum, is_usual, is_uniform = leave_terms(
        (row_max_ptr, row_sum_ptr), terms_ptr, delta, (row * H + h) * I + first, i, i_in_range, J
    )
    huge = flag_of(is_usual, is_uniform)
    tl.store(huge_ptr + (row * H + h) * blocks + block, huge)
    end = J
    if KEY_TERM != "none":
        key_ptr += b * stride_key_b + r * stride_key_r
        key_terms_ptr += row * J_terms
        end = tl.where(huge != 0, J, tl.load(spans_ptr + 2 * row))
        huge += tl.load(spans_ptr + 2 * row + 1)
    # Whole tiles that are walked in the short form.
    short = tl.where(huge != 0, 0, tl.minimum(tl.cdiv(end, BLOCK_J), J // BLOCK_J) * BLOCK_J)

    factor = tl.cast(scale, tl.float32) * LOG2E
    dq = tl.zeros([BLOCK_I, D], tl.float32)
    # Where the second loop starts, found apart: pointers that outlive a loop cost it additions.
    k_after = k_ptr + short * tl.cast(stride_kj, tl.int64)
    v_after = v_ptr + short * tl.cast(stride_vj, tl.int64)
    words_after = words_ptr
    if HAS_BIAS:
        words_after += short // BLOCK_J * WORDS
    if KEY_TERM != "none":
        key_ptr += short * tl.cast(stride_key_j, tl.int64)
    for _ in range(0, short, BLOCK_J):
        k = load(k_ptr, j, stride_kj, None, D, True)
        v = load(v_ptr, j, stride_vj, None, D, True)
        qk = dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_I, BLOCK_J]
        dp = dot(do, tl.trans(v), None, PRECISION)
        bias = 0.0
        if HAS_BIAS:
            bias = unpack(tl.load(words_ptr + tl.arange(0, WORDS)), dtype, BLOCK_J)
            words_ptr += WORDS
        key = logsum
        if KEY_TERM != "none":
            key = load_terms(key_terms_ptr)[None, :]
            key_terms_ptr += BLOCK_J
        p = short_probabilities(qk, factor, bias, logsum[:, None], key, HAS_BIAS, KEY_TERM)
        ds = p * (dp - delta[:, None])
        dq = dot(ds.to(dtype), k, dq, PRECISION)
        k_ptr += BLOCK_J * tl.cast(stride_kj, tl.int64)
        v_ptr += BLOCK_J * tl.cast(stride_vj, tl.int64)

    for start in tl.range(short, end, BLOCK_J, num_stages=SLOW_STAGES):
        in_range = j < J - start
        k = load(k_after, j, stride_kj, in_range, D, False)
        v = load(v_after, j, stride_vj, in_range, D, False)
        qk = dot(q, tl.trans(k), None, PRECISION)
        dp = dot(do, tl.trans(v), None, PRECISION)
        key = load_key_term(key_ptr, j, in_range, stride_key_j, KEY_TERM)
        bias = 0.0
        if HAS_BIAS:
            bias = unpack(tl.load(words_after + tl.arange(0, WORDS)), dtype, BLOCK_J)
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

    store(dq_ptr + out_offset, dq * scale, i, H * D, i_in_range, D)


@triton.jit
def _triangle_attention_bwd_dq_lean(
    q_ptr,
    k_ptr,
    v_ptr,
    words_ptr,  # of the bias, [i, j]
    key_ptr,
    key_terms_ptr,
    spans_ptr,
    do_ptr,
    out_ptr,  # [B, R, I, H, D] contiguous
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
    terms_ptr,  # [B, R, H, I, 2] contiguous: L and δ
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
    J_terms,
    scale,
    fill,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEY_TERM: tl.constexpr,
    KEY_TERM_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    operands = (
        (q_ptr, stride_qb, stride_qr, stride_qi, stride_qh),
        (k_ptr, stride_kb, stride_kr, stride_kj, stride_kh),
        (v_ptr, stride_vb, stride_vr, stride_vj, stride_vh),
        (key_ptr, stride_key_b, stride_key_r, stride_key_j),
        (do_ptr, stride_dob, stride_dor, stride_doi, stride_doh),
    )
    b, r, h, block = program_place(tl.program_id(0), tl.cdiv(I, BLOCK_I), R, H)
    dq_of_block(
        b,
        r,
        h,
        block,
        operands,
        words_ptr,
        (key_terms_ptr, spans_ptr),
        (out_ptr, row_max_ptr, row_sum_ptr),
        (terms_ptr, huge_ptr),
        dq_ptr,
        (R, H, I, J, J_terms),
        (scale, fill),
        D,
        HAS_BIAS,
        KEY_TERM,
        KEY_TERM_FIRST,
        PRECISION,
        BLOCK_I,
        BLOCK_J,
    )
