"""dk = scale·Σ_i ds·q and dv = Σ_i p·grad_out: a program owns a block of keys and walks the queries."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from trifast_inductor.kernels.triangle_attention.lean.keys import place
from trifast_inductor.kernels.triangle_attention.lean.operands import (
    head_of,
    load,
    load_pairs,
    short_probabilities,
    store,
)
from trifast_inductor.kernels.triangle_attention.lean.words import SIDE, SQUARE, unpack
from trifast_inductor.kernels.triangle_attention.logits import LOG2E, dot, load_key_term, logits_tile, probabilities
from trifast_inductor.kernels.triangle_attention.order import program_place


@triton.jit
def dkdv_of_block(
    b,
    r,
    h,
    block,
    operands,
    words_ptr,  # of the bias, [j, i]
    prepared,
    saved,
    left,
    dk_ptr,  # [B, R, J, H, D] contiguous
    dv_ptr,  # [B, R, J, H, D] contiguous
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
    """dk and dv of one block of keys."""
    tl.static_assert(BLOCK_J == SIDE)
    of_q, of_k, of_v, of_key, of_do = operands
    key_ptr, stride_key_b, stride_key_r, stride_key_j = of_key
    key_terms_ptr, spans_ptr = prepared
    row_max_ptr, row_sum_ptr = saved
    terms_ptr, huge_ptr = left
    R, H, I, J, J_terms, flags = sizes
    scale, fill = numbers
    WORDS: tl.constexpr = BLOCK_I * BLOCK_J // 2
    # Rows that are wholly left out, as padding has, take the second loop throughout. Without key terms it is seldom
    # more than one tile, and copies ahead would only cost registers.
    SLOW_STAGES: tl.constexpr = 1 if KEY_TERM == "none" else 2
    dtype: tl.constexpr = dk_ptr.dtype.element_ty
    blocks = tl.cdiv(J, BLOCK_J)
    first = (block * BLOCK_J).to(tl.int64)
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    j_in_range = j < J - first
    row = b * R + r
    head = row * H + h

    q_ptr, stride_qi = head_of(of_q, b, r, h)
    k_ptr, stride_kj = head_of(of_k, b, r, h)
    k_ptr += first * stride_kj
    v_ptr, stride_vj = head_of(of_v, b, r, h)
    v_ptr += first * stride_vj
    do_ptr, stride_doi = head_of(of_do, b, r, h)
    if HAS_BIAS:
        words_ptr += ((b * H + h) * blocks + block) * tl.cdiv(I, SIDE) * SQUARE
    out_offset = ((row * J + first) * H + h) * D
    terms_ptr += 2 * head * I
    row_max_ptr += head * I
    row_sum_ptr += head * I

    huge = 0
    for n in range(0, flags, 32):
        flag = n + tl.arange(0, 32)
        huge += tl.sum(tl.load(huge_ptr + head * flags + flag, mask=flag < flags, other=0), 0)
    last = I
    short_key = 0.0
    if KEY_TERM != "none":
        key_ptr += b * stride_key_b + r * stride_key_r + first * stride_key_j
        short_key = tl.load(key_terms_ptr + row * J_terms + first + place(j), mask=j_in_range, other=0.0)[:, None]
        last = tl.where((first >= tl.load(spans_ptr + 2 * row)) & (huge == 0), 0, I)
        huge += tl.load(spans_ptr + 2 * row + 1)
    # Queries that are walked in the short form.
    short = tl.where(huge != 0, 0, last // BLOCK_I * BLOCK_I)

    k = load(k_ptr, j, stride_kj, j_in_range, D, False)
    v = load(v_ptr, j, stride_vj, j_in_range, D, False)
    factor = tl.cast(scale, tl.float32) * LOG2E
    dk = tl.zeros([BLOCK_J, D], tl.float32)
    dv = tl.zeros([BLOCK_J, D], tl.float32)

    q_after = q_ptr + short * tl.cast(stride_qi, tl.int64)
    do_after = do_ptr + short * tl.cast(stride_doi, tl.int64)
    terms_after = terms_ptr + 2 * short
    words_after = words_ptr
    if HAS_BIAS:
        words_after += short // BLOCK_I * WORDS
    # Keys that are left out cost nothing: theirs are whole rows of these tiles, emptied after the loop.
    SHORT_TERM: tl.constexpr = "add" if KEY_TERM == "add" else "none"
    # Tiles are [j, i] here: p and ds are the left operands of their products as they come. Keys past the end are
    # whole rows of them, and are not stored.
    for _ in range(0, short, BLOCK_I):
        q = load(q_ptr, i, stride_qi, None, D, True)
        do = load(do_ptr, i, stride_doi, None, D, True)
        logsum, delta = load_pairs(terms_ptr, 0, BLOCK_I, True)
        kq = dot(k, tl.trans(q), None, PRECISION)  # [BLOCK_J, BLOCK_I]
        dp = dot(v, tl.trans(do), None, PRECISION)
        bias = 0.0
        if HAS_BIAS:
            bias = unpack(tl.load(words_ptr + tl.arange(0, WORDS)), dtype, BLOCK_I)
            words_ptr += WORDS
        p = short_probabilities(kq, factor, bias, logsum[None, :], short_key, HAS_BIAS, SHORT_TERM)
        ds = p * (dp - delta[None, :])
        dv = dot(p.to(dtype), do, dv, PRECISION)
        dk = dot(ds.to(dtype), q, dk, PRECISION)
        q_ptr += BLOCK_I * tl.cast(stride_qi, tl.int64)
        do_ptr += BLOCK_I * tl.cast(stride_doi, tl.int64)
        terms_ptr += 2 * BLOCK_I
    if KEY_TERM == "select":
        dk = tl.where(short_key < 0.0, 0.0, dk)
        dv = tl.where(short_key < 0.0, 0.0, dv)

    key = load_key_term(key_ptr, j, j_in_range, stride_key_j, KEY_TERM)
    for start in tl.range(short, last, BLOCK_I, num_stages=SLOW_STAGES):
        in_range = i < I - start
        q = load(q_after, i, stride_qi, in_range, D, False)
        do = load(do_after, i, stride_doi, in_range, D, False)
        # An infinite maximum makes p = 0 for a query past the end, whatever the key term.
        row_max = tl.load(row_max_ptr + start + i, mask=in_range, other=float("inf"))
        log2_sum = tl.log2(tl.load(row_sum_ptr + start + i, mask=in_range, other=1.0))
        _logsum, delta = load_pairs(terms_after, I - start, BLOCK_I, False)
        kq = dot(k, tl.trans(q), None, PRECISION)
        dp = dot(v, tl.trans(do), None, PRECISION)
        bias = 0.0
        if HAS_BIAS:
            bias = unpack(tl.load(words_after + tl.arange(0, WORDS)), dtype, BLOCK_I)
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

    store(dk_ptr + out_offset, dk * scale, j, H * D, j_in_range, D)
    store(dv_ptr + out_offset, dv, j, H * D, j_in_range, D)


@triton.jit
def _triangle_attention_bwd_dkdv_lean(
    q_ptr,
    k_ptr,
    v_ptr,
    words_ptr,  # of the bias, [j, i]
    key_ptr,
    key_terms_ptr,
    spans_ptr,
    do_ptr,
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
    terms_ptr,  # [B, R, H, I, 2] contiguous: L and δ
    huge_ptr,  # [B, R, H, flags] contiguous
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
    J_terms,
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
):
    operands = (
        (q_ptr, stride_qb, stride_qr, stride_qi, stride_qh),
        (k_ptr, stride_kb, stride_kr, stride_kj, stride_kh),
        (v_ptr, stride_vb, stride_vr, stride_vj, stride_vh),
        (key_ptr, stride_key_b, stride_key_r, stride_key_j),
        (do_ptr, stride_dob, stride_dor, stride_doi, stride_doh),
    )
    b, r, h, block = program_place(tl.program_id(0), tl.cdiv(J, BLOCK_J), R, H)
    dkdv_of_block(
        b,
        r,
        h,
        block,
        operands,
        words_ptr,
        (key_terms_ptr, spans_ptr),
        (row_max_ptr, row_sum_ptr),
        (terms_ptr, huge_ptr),
        dk_ptr,
        dv_ptr,
        (R, H, I, J, J_terms, flags),
        (scale, fill),
        D,
        HAS_BIAS,
        KEY_TERM,
        KEY_TERM_FIRST,
        PRECISION,
        BLOCK_I,
        BLOCK_J,
    )
