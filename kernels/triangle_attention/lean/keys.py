"""Key terms as the first loops take them: one number a key, and behind which key none is seen.

    "add": log2(e)·term, added to the exponent     "select": -inf where a key is left out, else inf, a bound to it

That is what eager gives while nothing answers the term: no bias or term above `LOUD`, and a query that is not huge.
Rows with either are marked, and take the form of `logits.logits_tile` throughout.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments, memory
from trifast_inductor.kernels.triangle_attention.launching import Launch
from trifast_inductor.kernels.triangle_attention.lean.words import LOUD
from trifast_inductor.kernels.triangle_attention.logits import LOG2E
from trifast_inductor.kernels.triangle_attention.tiling import Tile

# A term of this or less leaves its key out of every row that is not marked and every query that is not huge.
LEFT_OUT = tl.constexpr(-1e8)
# So does a fill of this or less, to which no product is added: log2(e)·(FILL + LOUD) < -HUGE - 150, and 2**-150 is 0.
FILL = -1e4


@triton.jit
def place(j):
    """Where key j's term lies: of each 64, those that one thread takes for its columns of a tile side by side."""
    return j // 64 * 64 + j % 8 // 2 * 16 + j % 64 // 8 * 2 + j % 2


@triton.jit
def load_terms(ptr):
    """The terms of 64 keys."""
    return tl.reshape(tl.permute(tl.reshape(tl.load(ptr + tl.arange(0, 64)), [4, 8, 2]), [1, 0, 2]), [64])


@triton.jit
def _triangle_attention_key_terms(
    key_ptr,
    loud_ptr,  # [B, loud]
    terms_ptr,  # [B, R, J_terms], by `place`
    spans_ptr,  # [B, R, 2]: keys up to the last that is not left out; whether the row is marked
    stride_b: tl.int64,
    stride_r: tl.int64,
    stride_j: tl.int64,
    R,
    J,
    J_terms,
    loud,  # flags to an item of the batch
    KEY_TERM: tl.constexpr,
    KEY_TERM_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    key_ptr += row // R * stride_b + row % R * stride_r
    terms_ptr += row * J_terms
    end = 0
    marked = 0
    for start in range(0, J, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        key = tl.load(key_ptr + j.to(tl.int64) * stride_j, mask=j < J, other=0)
        if KEY_TERM == "add":
            key = key.to(tl.float32)
            seen = (key <= LEFT_OUT) == 0  # a NaN is
            marked = tl.maximum(marked, 1 - tl.min((key <= LOUD).to(tl.int32), 0))
            term = key * LOG2E
        else:
            seen = key == 0
            term = tl.where(seen, float("inf"), float("-inf"))
        tl.store(terms_ptr + place(j), term, mask=j < J)
        end = tl.maximum(end, tl.max(tl.where(seen & (j < J), j + 1, 0), 0))
    # What is selected before the bias is added to, as a term is; after it, nothing comes back.
    if HAS_BIAS and (KEY_TERM == "add" or KEY_TERM_FIRST):
        loud_ptr += row // R * loud
        for start in range(0, loud, BLOCK_J):
            some = start + tl.arange(0, BLOCK_J)
            marked = tl.maximum(marked, tl.max(tl.load(loud_ptr + some, mask=some < loud, other=0), 0))
    tl.store(spans_ptr + 2 * row, tl.where((end == 0) | (marked != 0), J, end))
    tl.store(spans_ptr + 2 * row + 1, marked)


class Keys:
    """Prepares a key term of one shape and layout; `given` as the kernels of this directory have it."""

    def __init__(self, key: Tensor | None, bias: Tensor | None, given: dict[str, Any]) -> None:
        if key is None:
            return
        B, R, J = key.shape
        self._terms_shape = (B, R, given["J_terms"])
        loud = 0
        if bias is not None:
            loud = bias.shape[1] * triton.cdiv(bias.shape[2], 64) * triton.cdiv(J, 64)
        tile = Tile(BLOCK_I=1, BLOCK_J=min(1024, triton.next_power_of_2(J)), num_warps=4, num_stages=1)
        rest = {**arguments.strides("", key, "brj"), "loud": loud}
        self._prepare = Launch(_triangle_attention_key_terms, B * R, {**given, **rest}, tile)

    def __call__(self, key: Tensor | None, loud: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Terms and spans."""
        if key is None:
            return None, None
        terms = memory.empty(self._terms_shape, torch.float32, key)
        spans = memory.empty((*self._terms_shape[:2], 2), torch.int32, key)
        self._prepare(key, loud, terms, spans)
        return terms, spans
