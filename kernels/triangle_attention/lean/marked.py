"""The heads that `hopper/dqkv.py` cannot do and leaves out: the list of them, and dq, dk and dv of each.

A head of a row is marked where one of its queries is huge, or its key terms are, as `operands.py` and `keys.py` say.
Where all its queries are uniform it needs no logits: `uniform.py`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from trifast_inductor.kernels.triangle_attention.lean.dkdv import dkdv_of_block
from trifast_inductor.kernels.triangle_attention.lean.dq import dq_of_block
from trifast_inductor.kernels.triangle_attention.lean.operands import UNIFORM
from trifast_inductor.kernels.triangle_attention.lean.uniform import dkdv_of_uniform_head, dq_of_uniform_head

PROGRAMS = 3  # to a multiprocessor: as many as fit


@triton.jit
def _triangle_attention_bwd_list_marked(
    huge_ptr,  # [heads, flags]
    spans_ptr,  # [rows, 2]
    marked_ptr,  # how many; each twice, plus 1 if it is uniform; from the end backwards, those that are not marked
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
        uniform = tl.full([SEEN], 1, tl.int32)
        for flag in range(flags):
            huge = tl.load(huge_ptr + head * flags + flag, mask=head < heads, other=0)
            marked |= huge
            uniform &= (huge == UNIFORM).to(tl.int32)
        if KEY_TERM != "none":
            marked |= tl.load(spans_ptr + head // H * 2 + 1, mask=head < heads, other=0)
        marked = (marked != 0).to(tl.int32)
        so_far = count + tl.cumsum(marked, 0)
        place = tl.where(marked != 0, so_far, heads - (head - so_far))
        tl.store(marked_ptr + place, tl.where(marked != 0, 2 * head + uniform, head), mask=head < heads)
        count += tl.sum(marked, 0)
    tl.store(marked_ptr, count)


@triton.jit
def _triangle_attention_bwd_marked(
    marked_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    words_ptr,  # of the bias, [i, j]
    turned_words_ptr,  # of the bias, [j, i]
    key_ptr,
    key_terms_ptr,
    spans_ptr,
    do_ptr,
    out_ptr,  # [B, R, I, H, D] contiguous
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
    terms_ptr,  # [B, R, H, I, 2] contiguous: L and δ
    sums_ptr,  # [B, R, H, I, 2] contiguous: row maximum and log2 of the row sum
    huge_ptr,  # [B, R, H, flags] contiguous
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
    J_terms,
    flags,  # of `huge_ptr`, to a head: one for each block of queries
    scale,
    fill,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEY_TERM: tl.constexpr,
    KEY_TERM_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,  # of dk and dv; dq takes squares
    BLOCK_J: tl.constexpr,
):
    operands = (
        (q_ptr, stride_qb, stride_qr, stride_qi, stride_qh),
        (k_ptr, stride_kb, stride_kr, stride_kj, stride_kh),
        (v_ptr, stride_vb, stride_vr, stride_vj, stride_vh),
        (key_ptr, stride_key_b, stride_key_r, stride_key_j),
        (do_ptr, stride_dob, stride_dor, stride_doi, stride_doh),
    )
    prepared = (key_terms_ptr, spans_ptr)
    left = (terms_ptr, sums_ptr, huge_ptr)
    parts = flags + tl.cdiv(J, BLOCK_J)
    count = tl.load(marked_ptr)
    # Parts outermost: all of a uniform head is in its first part and in its first of keys.
    for n in tl.range(tl.program_id(0), count * parts, tl.num_programs(0), disable_licm=True):
        part = n // count
        entry = tl.load(marked_ptr + 1 + n % count)
        head = (entry // 2).to(tl.int64)
        b = head // (R * H)
        r = head // H % R
        h = head % H
        if entry % 2 == 1:
            if part == 0:
                dq_of_uniform_head(
                    b, r, h, operands, terms_ptr, dq_ptr, (R, H, I, J), scale, D, KEY_TERM, PRECISION, BLOCK_J
                )  # fmt: skip
            elif part == flags:
                dkdv_of_uniform_head(
                    b, r, h, operands, terms_ptr, dk_ptr, dv_ptr, (R, H, I, J), scale, D, KEY_TERM, PRECISION, BLOCK_J
                )  # fmt: skip
        elif part < flags:
            dq_of_block(
                b,
                r,
                h,
                part,
                operands,
                words_ptr,
                prepared,
                (out_ptr, row_max_ptr, row_sum_ptr),
                left,
                dq_ptr,
                (R, H, I, J, J_terms),
                (scale, fill),
                D,
                HAS_BIAS,
                KEY_TERM,
                KEY_TERM_FIRST,
                PRECISION,
                BLOCK_J,
                BLOCK_J,
            )
        else:
            dkdv_of_block(
                b,
                r,
                h,
                part - flags,
                operands,
                turned_words_ptr,
                prepared,
                left,
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
