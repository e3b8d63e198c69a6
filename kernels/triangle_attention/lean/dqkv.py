"""dq, dk and dv of one row of one head in one pass, so that with dbias two passes do.

Seven products and two exponentials a logit, where three passes take nine and three.

A program walks the blocks of keys, and for each of them the blocks of queries. dk and dv stay in registers; dq is added
to in a float32 slice of memory that is this program's alone: no atomics, one order. The slices of all programs that run
at once stay within L2 (N = 512, D = 32: 396 programs of 64 KiB).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from trifast_inductor.kernels.triangle_attention.lean.operands import leave_terms, load, pair_of_terms, store
from trifast_inductor.kernels.triangle_attention.lean.words import unpack
from trifast_inductor.kernels.triangle_attention.logits import LOG2E, dot, load_key_term, logits_tile, probabilities


@triton.jit
def _triangle_attention_bwd_terms(
    do_ptr,
    out_ptr,
    row_max_ptr,
    row_sum_ptr,
    terms_ptr,
    huge_ptr,
    stride_dob: tl.int64,
    stride_dor: tl.int64,
    stride_doi,
    stride_doh: tl.int64,
    R,
    H,
    I,
    D: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    blocks = tl.cdiv(I, BLOCK_I)
    # Heads innermost: they lie side by side in both operands.
    h = (tl.program_id(0) % H).to(tl.int64)
    block = tl.program_id(0) // H % blocks
    row = (tl.program_id(0) // (H * blocks)).to(tl.int64)
    first = (block * BLOCK_I).to(tl.int64)
    i = tl.arange(0, BLOCK_I)
    in_range = i < I - first
    do_ptr += row // R * stride_dob + row % R * stride_dor + h * stride_doh + first * stride_doi
    head = row * H + h
    queries = head * I + first
    do = load(do_ptr, i, stride_doi, in_range, D, False)
    leave_terms(
        do_ptr,
        out_ptr + ((row * I + first) * H + h) * D,
        row_max_ptr + queries,
        row_sum_ptr + queries,
        terms_ptr + 2 * queries,
        huge_ptr + head * blocks + block,
        do,
        i,
        in_range,
        H,
        D,
    )


@triton.jit
def _flat(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """A tile as its threads hold it, 16 bytes at a time: four warps share 64 rows, eight the columns as well."""
    x = tl.reshape(x, [ROWS // 64, 4, 2, 8, WARPS // 4, COLUMNS // (2 * WARPS), 4, 2])
    return tl.reshape(tl.permute(x, [0, 5, 4, 1, 3, 6, 2, 7]), [ROWS * COLUMNS])


@triton.jit
def _tile(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """The other way."""
    x = tl.reshape(x, [ROWS // 64, COLUMNS // (2 * WARPS), WARPS // 4, 4, 8, 4, 2, 2])
    return tl.reshape(tl.permute(x, [0, 3, 6, 4, 2, 1, 5, 7]), [ROWS, COLUMNS])


@triton.jit
def _triangle_attention_bwd_dqkv(
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
    slice_ptr,  # [B, R, H, blocks of queries, BLOCK_I * D], float32
    dq_ptr,  # [B, R, I, H, D] contiguous
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
    # Rows innermost: programs that run together read the same bias.
    pid = tl.program_id(0)
    bh = (pid // R).to(tl.int64)
    r = (pid % R).to(tl.int64)
    b = bh // H
    h = bh % H
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    place = tl.arange(0, BLOCK_I * D)
    row = b * R + r
    head = row * H + h
    blocks_i = tl.cdiv(I, BLOCK_I)

    q_ptr += b * stride_qb + r * stride_qr + h * stride_qh
    k_ptr += b * stride_kb + r * stride_kr + h * stride_kh
    v_ptr += b * stride_vb + r * stride_vr + h * stride_vh
    do_ptr += b * stride_dob + r * stride_dor + h * stride_doh
    if HAS_BIAS:
        words_ptr += bh * tl.cdiv(J, BLOCK_J) * blocks_i * WORDS
    terms_ptr += 2 * head * I
    row_max_ptr += head * I
    row_sum_ptr += head * I
    slice_ptr += head * blocks_i * (BLOCK_I * D)

    huge = 0
    for n in range(0, flags, 32):
        flag = n + tl.arange(0, 32)
        huge += tl.sum(tl.load(huge_ptr + head * flags + flag, mask=flag < flags, other=0), 0)
    clean = J
    end = J
    if KEY_TERM != "none":
        key_ptr += b * stride_key_b + r * stride_key_r
        clean = tl.load(spans_ptr + 2 * row)
        end = tl.load(spans_ptr + 2 * row + 1)
    clean = tl.where(huge != 0, 0, clean)
    end = tl.where(huge != 0, J, end)

    factor = tl.cast(scale, tl.float32) * LOG2E
    nothing = tl.zeros([BLOCK_I * D], tl.float32)
    for block in tl.range(blocks_i, num_stages=1):
        tl.store(slice_ptr + block * (BLOCK_I * D) + place, nothing)

    for first in range(0, J, BLOCK_J):
        # What this program has stored is read by its other threads.
        tl.debug_barrier()
        j_in_range = j < J - first
        k = load(k_ptr, j, stride_kj, j_in_range, D, False)
        v = load(v_ptr, j, stride_vj, j_in_range, D, False)
        key = load_key_term(key_ptr, j, j_in_range, stride_key_j, KEY_TERM)
        dk = tl.zeros([BLOCK_J, D], tl.float32)
        dv = tl.zeros([BLOCK_J, D], tl.float32)
        # dq sums over keys: here those past the end do matter.
        whole = tl.where(first + BLOCK_J <= clean, I // BLOCK_I, 0)
        last = tl.where(first >= end, 0, blocks_i)
        for block in range(whole):
            dq_ptrs = slice_ptr + block * (BLOCK_I * D) + place
            q = load(q_ptr + block * BLOCK_I * tl.cast(stride_qi, tl.int64), i, stride_qi, None, D, True)
            do = load(do_ptr + block * BLOCK_I * tl.cast(stride_doi, tl.int64), i, stride_doi, None, D, True)
            logsum, delta = pair_of_terms(terms_ptr + 2 * BLOCK_I * block, BLOCK_I)
            kq = dot(k, tl.trans(q), None, PRECISION)  # [BLOCK_J, BLOCK_I]
            dp = dot(v, tl.trans(do), None, PRECISION)
            if HAS_BIAS:
                words = tl.load(words_ptr + block * WORDS + tl.arange(0, WORDS))
                bias = unpack(words, dtype, BLOCK_J, BLOCK_I, WARPS)
                p = tl.exp2(kq * factor + (bias * LOG2E - logsum[None, :]))
            else:
                p = tl.exp2(kq * factor - logsum[None, :])
            ds = (p * (dp - delta[None, :])).to(dtype)
            # Under the products, and not before: registers are short until here.
            so_far = tl.load(dq_ptrs)
            dv = dot(p.to(dtype), do, dv, PRECISION)
            dk = dot(ds, q, dk, PRECISION)
            dq = _flat(dot(tl.trans(ds), k, None, PRECISION), BLOCK_I, D, WARPS)
            tl.store(dq_ptrs, so_far + dq)
        for block in tl.range(whole, last, num_stages=SLOW_STAGES):
            i_in_range = i < I - block * BLOCK_I
            dq_ptrs = slice_ptr + block * (BLOCK_I * D) + place
            q = load(q_ptr + block * BLOCK_I * tl.cast(stride_qi, tl.int64), i, stride_qi, i_in_range, D, False)
            do = load(do_ptr + block * BLOCK_I * tl.cast(stride_doi, tl.int64), i, stride_doi, i_in_range, D, False)
            query = block * BLOCK_I + i
            # An infinite maximum makes p = 0 for a query past the end, whatever the key term.
            row_max = tl.load(row_max_ptr + query, mask=i_in_range, other=float("inf"))
            log2_sum = tl.log2(tl.load(row_sum_ptr + query, mask=i_in_range, other=1.0))
            delta = tl.load(terms_ptr + 2 * query + 1, mask=i_in_range, other=0.0)
            kq = dot(k, tl.trans(q), None, PRECISION)
            dp = dot(v, tl.trans(do), None, PRECISION)
            bias = 0.0
            if HAS_BIAS:
                words = tl.load(words_ptr + block * WORDS + tl.arange(0, WORDS))
                bias = unpack(words, dtype, BLOCK_J, BLOCK_I, WARPS)
            x = logits_tile(
                kq, bias, key[:, None], j_in_range[:, None], scale, fill, HAS_BIAS, KEY_TERM, KEY_TERM_FIRST, False
            )
            p = probabilities(x, row_max[None, :], log2_sum[None, :])
            ds = p * (dp - delta[None, :])
            if KEY_TERM == "select":
                ds = tl.where(key[:, None], 0.0, ds)
            # p is NaN, not 0, past the end of a row whose logits are all -inf.
            ds = tl.where(j_in_range[:, None], ds, 0.0).to(dtype)
            # Under the products, and not before: registers are short until here.
            so_far = tl.load(dq_ptrs)
            dv = dot(p.to(dtype), do, dv, PRECISION)
            dk = dot(ds, q, dk, PRECISION)
            dq = _flat(dot(tl.trans(ds), k, None, PRECISION), BLOCK_I, D, WARPS)
            tl.store(dq_ptrs, so_far + dq)

        out_offset = ((row * J + first) * H + h) * D
        store(dk_ptr + out_offset, dk * scale, j, H * D, j_in_range, D)
        store(dv_ptr + out_offset, dv, j, H * D, j_in_range, D)
        k_ptr += BLOCK_J * tl.cast(stride_kj, tl.int64)
        v_ptr += BLOCK_J * tl.cast(stride_vj, tl.int64)
        if HAS_BIAS:
            words_ptr += blocks_i * WORDS
        if KEY_TERM != "none":
            key_ptr += BLOCK_J * tl.cast(stride_key_j, tl.int64)

    tl.debug_barrier()
    for block in tl.range(blocks_i, num_stages=1):
        dq = _tile(tl.load(slice_ptr + block * (BLOCK_I * D) + place), BLOCK_I, D, WARPS)
        out_offset = ((row * I + block * BLOCK_I) * H + h) * D
        store(dq_ptr + out_offset, dq * scale, i, H * D, i < I - block * BLOCK_I, D)
