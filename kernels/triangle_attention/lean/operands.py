"""Loads, stores, the terms of a query, the short form of a probability: what the kernels of this directory share.

    p = exp2(scale·log2(e)·⟨q, k⟩ + (log2(e)·bias - L) ⊕ key)     L = log2(e)·row_max + log2(row_sum)

Two fused multiply-adds a logit, and one operation for a key term as `keys.py` prepares it: in tiles that are whole,
while no query is huge. Other tiles take the form of `logits.probabilities`, in a second loop of the same kernel.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from trifast_inductor.kernels.triangle_attention.logits import LOG2E

# |L| above which a query is huge: one fused multiply-add is off by the rounding of L, 2**-12 of p here.
HUGE = tl.constexpr(4096.0)
# Flag of a block whose queries are all uniform, and one of them huge; that of any other with a huge one is 1.
UNIFORM = tl.constexpr(2)


@triton.jit
def head_of(operand, b, r, h):
    """Where one head of q, k, v or the gradient of the output begins, and the step from row to row."""
    ptr, stride_b, stride_r, stride_row, stride_h = operand
    return ptr + b * stride_b + r * stride_r + h * stride_h, stride_row


@triton.jit
def load(ptr, row, step, in_range, D: tl.constexpr, WHOLE: tl.constexpr):
    """`[rows, D]` of an operand whose rows start on 16 bytes; 32 bits suffice within a tile."""
    d = tl.arange(0, D)
    ptrs = ptr + ((row * step)[:, None] + d[None, :])
    ptrs = tl.multiple_of(ptrs, (1, 16))
    return tl.load(ptrs) if WHOLE else tl.load(ptrs, mask=in_range[:, None], other=0.0)


@triton.jit
def store(ptr, tile, row, step, in_range, D: tl.constexpr):
    ptrs = ptr + ((row * step)[:, None] + tl.arange(0, D)[None, :])
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=in_range[:, None])


@triton.jit
def short_probabilities(qk, factor, bias, logsum, key, HAS_BIAS: tl.constexpr, KEY_TERM: tl.constexpr):
    """p of a tile, all but qk and the bias broadcast."""
    shift = key - logsum if KEY_TERM == "add" else -logsum
    if HAS_BIAS:
        shift = bias * LOG2E + shift
    x = qk * factor + shift
    if KEY_TERM == "select":
        # Of a NaN and a bound the bound is taken. A NaN that is not left out makes its query huge.
        x = tl.minimum(x, key)
    return tl.exp2(x)


@triton.jit
def leave_terms(saved, terms_ptr, delta, first, i, in_range, J):
    """L and δ of queries `first + i`, as they are counted in `[B, R, H, I]`, stored for the other kernels.

    Args:
        saved: row maximum and row sum, `[B, R, H, I]`, contiguous.
        terms_ptr: `[B, R, H, I, 2]`, L and δ.
        delta: of these queries.

    Returns:
        Row maximum, log2 of the row sum, L, whether a query is neither huge nor not a number, and whether all its keys
        are at its maximum, as where all are left out.
    """
    row_max_ptr, row_sum_ptr = saved
    row_max = tl.load(row_max_ptr + first + i, mask=in_range, other=0.0)
    row_sum = tl.load(row_sum_ptr + first + i, mask=in_range, other=1.0)
    log2_sum = tl.log2(row_sum)
    logsum = row_max * LOG2E + log2_sum
    is_number = tl.abs(delta) < float("inf")
    is_usual = (tl.abs(logsum) <= HUGE) & is_number
    is_uniform = ((row_sum == J) & is_number) | (in_range == 0)
    terms_ptr += 2 * first
    tl.store(terms_ptr + 2 * i, logsum, mask=in_range)
    tl.store(terms_ptr + 2 * i + 1, delta, mask=in_range)
    return row_max, log2_sum, logsum, is_usual, is_uniform


@triton.jit
def flag_of(is_usual, is_uniform):
    """Of a block of queries, along the last axis: 1 if one is huge, `UNIFORM` if all are uniform besides, else 0."""
    some_huge = 1 - tl.min(is_usual.to(tl.int32), -1)
    return some_huge * (1 + tl.min(is_uniform.to(tl.int32), -1))


@triton.jit
def load_pairs(ptr, left, BLOCK_I: tl.constexpr, WHOLE: tl.constexpr):
    """Two numbers of each of BLOCK_I queries, `left` of which exist; zeros of others.

    In one load, so that they are copied ahead and not by every thread for itself.
    """
    place = tl.arange(0, 2 * BLOCK_I)
    pairs = tl.load(ptr + place) if WHOLE else tl.load(ptr + place, mask=place < 2 * left, other=0.0)
    return tl.split(tl.reshape(pairs, [BLOCK_I, 2]))
