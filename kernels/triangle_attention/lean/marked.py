"""The heads that `hopper/dqkv.py` cannot do and leaves out: the list of them, and dq, dk and dv of each.

A head of a row is marked where one of its queries is huge, or its key terms are, as `operands.py` and `keys.py` say.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from trifast_inductor.kernels.triangle_attention.lean.dkdv import dkdv_of_block
from trifast_inductor.kernels.triangle_attention.lean.dq import dq_of_block

PROGRAMS = 3  # of each kernel, to a multiprocessor: as many as fit


@triton.jit
def _triangle_attention_bwd_list_marked(
    huge_ptr,  # [heads, flags]
    spans_ptr,  # [rows, 2]
    marked_ptr,  # how many, and which; from the end backwards, those that are not
    heads,  # B·R·H
    H,
    flags,
    KEY_TERM: tl.constexpr,
    SEEN: tl.constexpr,  # heads looked at together
):
    count = 0
    for start in range(0, heads, SEEN):
        head = start + tl.arange(0, SEEN)
        marked = tl.zeros([SEEN], tl.int32)
        for flag in range(flags):
            marked |= tl.load(huge_ptr + head * flags + flag, mask=head < heads, other=0)
        if KEY_TERM != "none":
            marked |= tl.load(spans_ptr + head // H * 2 + 1, mask=head < heads, other=0)
        marked = (marked != 0).to(tl.int32)
        so_far = count + tl.cumsum(marked, 0)
        place = tl.where(marked != 0, so_far, heads - (head - so_far))
        tl.store(marked_ptr + place, head, mask=head < heads)
        count += tl.sum(marked, 0)
    tl.store(marked_ptr, count)


@triton.jit
def _place(marked_ptr, n, R, H):
    head = tl.load(marked_ptr + 1 + n).to(tl.int64)
    return head // (R * H), head // H % R, head % H


@triton.jit
def _triangle_attention_bwd_dq_marked(
    marked_ptr,
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
    sums_ptr,  # [B, R, H, I, 2] contiguous: row maximum and log2 of the row sum
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
    blocks = tl.cdiv(I, BLOCK_I)
    for n in range(tl.program_id(0), tl.load(marked_ptr) * blocks, tl.num_programs(0)):
        b, r, h = _place(marked_ptr, n // blocks, R, H)
        dq_of_block(
            b,
            r,
            h,
            n % blocks,
            q_ptr,
            k_ptr,
            v_ptr,
            words_ptr,
            key_ptr,
            key_terms_ptr,
            spans_ptr,
            do_ptr,
            out_ptr,
            row_max_ptr,
            row_sum_ptr,
            terms_ptr,
            sums_ptr,
            huge_ptr,
            dq_ptr,
            stride_qb,
            stride_qr,
            stride_qi,
            stride_qh,
            stride_kb,
            stride_kr,
            stride_kj,
            stride_kh,
            stride_vb,
            stride_vr,
            stride_vj,
            stride_vh,
            stride_key_b,
            stride_key_r,
            stride_key_j,
            stride_dob,
            stride_dor,
            stride_doi,
            stride_doh,
            R,
            H,
            I,
            J,
            J_terms,
            scale,
            fill,
            D,
            HAS_BIAS,
            KEY_TERM,
            KEY_TERM_FIRST,
            PRECISION,
            BLOCK_I,
            BLOCK_J,
        )


@triton.jit
def _triangle_attention_bwd_dkdv_marked(
    marked_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    words_ptr,  # of the bias, [j, i]
    key_ptr,
    key_terms_ptr,
    spans_ptr,
    do_ptr,
    terms_ptr,  # [B, R, H, I, 2] contiguous: L and δ
    sums_ptr,  # [B, R, H, I, 2] contiguous: row maximum and log2 of the row sum
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
    blocks = tl.cdiv(J, BLOCK_J)
    for n in range(tl.program_id(0), tl.load(marked_ptr) * blocks, tl.num_programs(0)):
        b, r, h = _place(marked_ptr, n // blocks, R, H)
        dkdv_of_block(
            b,
            r,
            h,
            n % blocks,
            q_ptr,
            k_ptr,
            v_ptr,
            words_ptr,
            key_ptr,
            key_terms_ptr,
            spans_ptr,
            do_ptr,
            terms_ptr,
            sums_ptr,
            huge_ptr,
            dk_ptr,
            dv_ptr,
            stride_qb,
            stride_qr,
            stride_qi,
            stride_qh,
            stride_kb,
            stride_kr,
            stride_kj,
            stride_kh,
            stride_vb,
            stride_vr,
            stride_vj,
            stride_vh,
            stride_key_b,
            stride_key_r,
            stride_key_j,
            stride_dob,
            stride_dor,
            stride_doi,
            stride_doh,
            R,
            H,
            I,
            J,
            J_terms,
            flags,
            scale,
            fill,
            D,
            HAS_BIAS,
            KEY_TERM,
            KEY_TERM_FIRST,
            PRECISION,
            BLOCK_I,
            BLOCK_J,
        )
