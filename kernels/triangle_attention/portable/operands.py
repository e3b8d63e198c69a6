"""What the kernels of this directory are given alike, and the terms of a query.

    L = log2(row_sum)     δ = Σ_d out·grad_out

`operands` of a kernel is `(q, k, v, bias, key, do)`, each a pointer and its strides; `sizes` `(R, H, I, J, J_bias)`;
`numbers` `(scale, fill)`; `saved` what the forward left, `(out, row_max, row_sum, terms)`, the last of them L and δ,
`[B, R, H, 2, I]`, where the kernel for dq has left them. All of it is contiguous; what is not read may be any pointer.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from trifast_inductor.kernels.triangle_attention.logits import load_rows


@triton.jit
def saved_of_block(saved, b, r, h, first, sizes, D: tl.constexpr):
    """`saved` from the first query of a block on."""
    out_ptr, row_max_ptr, row_sum_ptr, terms_ptr = saved
    R, H, I, _J, _J_bias = sizes
    head = (b * R + r) * H + h
    query = head * I + first
    return (
        out_ptr + (((b * R + r) * I + first) * H + h) * D,
        row_max_ptr + query,
        row_sum_ptr + query,
        terms_ptr + head * 2 * I + first,
    )


@triton.jit
def query_terms(
    out_ptr,
    row_max_ptr,
    row_sum_ptr,
    terms_ptr,
    do,
    i,
    in_range,
    I,
    H,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TERMS_ARE_LEFT: tl.constexpr,
):
    """Row maximum, L and δ of a block of queries, which the pointers are at.

    Past the end the maximum is infinite, which makes p = 0 whatever the key term.
    """
    row_max = tl.load(row_max_ptr + i, mask=in_range, other=float("inf"))
    if TERMS_ARE_LEFT:
        log2_sum = tl.load(terms_ptr + i, mask=in_range, other=0.0)
        delta = tl.load(terms_ptr + I + i, mask=in_range, other=0.0)
    else:
        out = load_rows(out_ptr, i, in_range, H * D, 1, D, BLOCK_D, ALIGNED=False)
        log2_sum = tl.log2(tl.load(row_sum_ptr + i, mask=in_range, other=1.0))
        delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    return row_max, log2_sum, delta
