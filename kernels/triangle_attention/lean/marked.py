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
from trifast_inductor.kernels.triangle_attention.order import head_place


@triton.jit
def list_marked(
    huge_ptr,  # [heads, flags]
    spans_ptr,  # [rows, 2]
    listed_ptr,  # [2 + 2·heads]
    heads,  # B·R·H
    H,
    flags,
    KEY_TERM: tl.constexpr,
    FLAGS: tl.constexpr,  # at least `flags`, a power of two
    SEEN: tl.constexpr,  # heads looked at together
):
    """How many heads are marked, and how many of them want logits; these, and from `heads` + 1 backwards those that
    are not marked; from `heads` + 2 on those that are marked and want no logits. All in order.
    """
    marked = 0
    walked = 0
    flag = tl.arange(0, FLAGS)[None, :]
    for start in range(0, heads, SEEN):
        head = start + tl.arange(0, SEEN)
        in_range = head < heads
        huge = tl.load(huge_ptr + head[:, None] * flags + flag, mask=in_range[:, None] & (flag < flags), other=0)
        is_marked = tl.max(huge, 1)
        is_uniform = tl.min(((huge == UNIFORM) | (flag >= flags)).to(tl.int32), 1)
        if KEY_TERM != "none":
            is_marked |= tl.load(spans_ptr + head // H * 2 + 1, mask=in_range, other=0)
        is_marked = (is_marked != 0).to(tl.int32)
        is_walked = is_marked * (1 - is_uniform)
        marked_so_far = marked + tl.cumsum(is_marked, 0)
        walked_so_far = walked + tl.cumsum(is_walked, 0)
        place = tl.where(is_walked != 0, 1 + walked_so_far, heads + 1 - (head - marked_so_far))
        place = tl.where(is_marked > is_walked, heads + 1 + marked_so_far - walked_so_far, place)
        tl.store(listed_ptr + place, head, mask=in_range)
        marked += tl.sum(is_marked, 0)
        walked += tl.sum(is_walked, 0)
    tl.store(listed_ptr, marked)
    tl.store(listed_ptr + 1, walked)


@triton.jit
def _triangle_attention_bwd_marked(
    listed_ptr,  # of the list above
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
    heads,  # B·R·H
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
    left = (terms_ptr, huge_ptr)
    walked = tl.load(listed_ptr + 1)
    uniform = tl.load(listed_ptr) - walked
    for n in tl.range(tl.program_id(0), 2 * uniform, tl.num_programs(0), disable_licm=True):
        b, r, h = head_place(tl.load(listed_ptr + heads + 2 + n // 2), R, H)
        if n % 2 == 0:
            dq_of_uniform_head(
                b, r, h, operands, terms_ptr, dq_ptr, (R, H, I, J), scale, D, KEY_TERM, PRECISION, BLOCK=64
            )  # fmt: skip
        else:
            dkdv_of_uniform_head(
                b, r, h, operands, terms_ptr, dk_ptr, dv_ptr, (R, H, I, J), scale, D, KEY_TERM, PRECISION, BLOCK=64
            )  # fmt: skip
    # The blocks of a head side by side, those of queries first.
    parts = flags + tl.cdiv(J, BLOCK_J)
    for n in tl.range(tl.program_id(0), walked * parts, tl.num_programs(0), disable_licm=True):
        b, r, h = head_place(tl.load(listed_ptr + 2 + n // parts), R, H)
        part = n % parts
        if part < flags:
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
                (row_max_ptr, row_sum_ptr),
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
