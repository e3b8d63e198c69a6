"""Per row of keys, where key terms begin and where the keys end that any query sees."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments
from trifast_inductor.kernels.triangle_attention.launching import Launch
from trifast_inductor.kernels.triangle_attention.tiling import Tile

# A key term of this or less is a mask: no logit of a query that is not huge comes back from there.
LEFT_OUT = tl.constexpr(-1e8)


@triton.jit
def _triangle_attention_key_spans(
    key_ptr,
    spans_ptr,  # [B, R, 2]: keys before the first that has a term; keys up to the last that is not left out
    stride_b: tl.int64,
    stride_r: tl.int64,
    stride_j: tl.int64,
    R,
    J,
    fill,
    KEY_TERM: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    row = tl.program_id(0)
    key_ptr += (row // R).to(tl.int64) * stride_b + (row % R).to(tl.int64) * stride_r
    clean = J
    end = 0
    for start in range(0, J, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        key = tl.load(key_ptr + j.to(tl.int64) * stride_j, mask=j < J, other=0)
        if KEY_TERM == "add":
            kept = (key.to(tl.float32) <= LEFT_OUT) == 0  # a NaN is kept
        if KEY_TERM == "select":
            kept = (key == 0) | (fill > LEFT_OUT)
        clean = tl.minimum(clean, tl.min(tl.where((key != 0) & (j < J), j, J), 0))
        end = tl.maximum(end, tl.max(tl.where(kept & (j < J), j + 1, 0), 0))
    tl.store(spans_ptr + 2 * row, clean)
    tl.store(spans_ptr + 2 * row + 1, tl.where(end == 0, J, end))


class Spans:
    """Finds both for a key term of one shape and layout."""

    def __init__(self, key: Tensor | None, fill: float, selects: bool) -> None:
        if key is None:
            return
        B, R, J = key.shape
        given = {**arguments.strides("", key, "brj"), "R": R, "J": J, "fill": fill}
        tile = Tile(BLOCK_I=1, BLOCK_J=min(1024, triton.next_power_of_2(J)), num_warps=4, num_stages=1)
        kind = {"KEY_TERM": "select" if selects else "add"}
        self._find = Launch(_triangle_attention_key_spans, B * R, {**given, **kind}, tile)

    def __call__(self, key: Tensor | None) -> Tensor | None:
        if key is None:
            return None
        spans = torch.empty((*key.shape[:2], 2), dtype=torch.int32, device=key.device)
        self._find(key, spans)
        return spans
