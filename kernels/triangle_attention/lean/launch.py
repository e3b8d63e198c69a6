"""Which backward calls these kernels take, and their launches."""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments, memory, sums, tiling
from trifast_inductor.kernels.triangle_attention.hopper import choice as hopper
from trifast_inductor.kernels.triangle_attention.hopper import dbias_choice, dqkv_choice
from trifast_inductor.kernels.triangle_attention.hopper.lists import Listed, Lists
from trifast_inductor.kernels.triangle_attention.hopper.query_terms import QueryTerms
from trifast_inductor.kernels.triangle_attention.launching import Launch, is_for_hopper
from trifast_inductor.kernels.triangle_attention.lean import dbias, dkdv, dq, keys, marked
from trifast_inductor.kernels.triangle_attention.lean.tiles import Tiles, tiles
from trifast_inductor.kernels.triangle_attention.lean.words import Words

# Below it, or `dqkv_choice.SHORTEST`, passes that prepare cost more than they save: docs/benchmarks/log-backward.md,
# steps 4, 17, 24 and 27.
FEWEST_LOGITS = 256**3
# Elements of whole tiles over those of the bias, where all portable kernels together are two launches.
MOST_PADDED = 1.2


def refusal(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    fill: float,
) -> str | None:
    """Why a call goes to the portable kernels, or None."""
    B, R, I, H, D = q.shape
    J = k.shape[2]
    why = None
    if q.dtype not in (torch.bfloat16, torch.float16) or (bias is not None and bias.dtype != q.dtype):
        why = "q, k, v and bias are not of one 16-bit dtype"
    elif D not in (16, 32, 64):
        why = f"D={D} is not 16, 32 or 64"
    elif min(I, J) < dqkv_choice.SHORTEST[D] or B * R * H * I * J < FEWEST_LOGITS:
        why = "too small"
    elif max(I, J) <= tiling.LONGEST_AFTER_DQ and triton.cdiv(I, 64) * triton.cdiv(J, 64) * 64**2 > MOST_PADDED * I * J:
        why = f"tiles of 64 do not fit {I} queries by {J} keys"
    elif key_mask is not None and not fill <= keys.FILL:
        why = f"keys that are masked with {fill:g} may still be seen"
    elif not arguments.rows_are_aligned(q, k, v, grad_out):
        why = "rows do not start on 16 bytes"
    elif max(abs(t.stride(2)) for t in (q, k, v, grad_out)) >= 2**24 or max(H * D, J) >= 2**24:
        why = "an offset within a tile would pass 32 bits"
    elif not is_for_hopper():
        why = "no Hopper GPU"
    return why


def _planned_dbias(*given: Any) -> Callable[..., Tensor]:
    from trifast_inductor.kernels.triangle_attention.hopper import dbias

    return dbias.Plan(*given)


def _planned_dqkv(*given: Any) -> Callable[..., bool]:
    from trifast_inductor.kernels.triangle_attention.hopper import dqkv

    return dqkv.Plan(*given)


class Plan:
    """What a call launches, decided from shapes, strides and dtypes alone; the arguments as in `backward.launch`."""

    def __init__(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        key_bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        fill: float,
        key_term_first: bool,
        needs_dbias: bool,
    ) -> None:
        B, R, I, H, D = q.shape
        J = k.shape[2]
        tile = tiles(D)
        flags = triton.cdiv(I, tile.dq.BLOCK_I)
        given = arguments.shared(q, k, v, bias, key_bias, key_mask, scale, fill, key_term_first)
        given |= {**arguments.strides("do", grad_out, "brihd"), "B": B, "flags": flags, "J_terms": J + -J % 64}
        key = key_bias if key_mask is None else key_mask
        self._keys = keys.Keys(key, bias, given)
        self._terms_shape = (B, R, H, I, 2)
        self._huge_shape = (B, R, H, flags)
        self._dq = Launch(dq._triangle_attention_bwd_dq_lean, B * R * H * flags, given, tile.dq)
        programs = B * R * H * triton.cdiv(J, tile.dkdv.BLOCK_J)
        self._dkdv = Launch(dkdv._triangle_attention_bwd_dkdv_lean, programs, given, tile.dkdv)

        numbers = (scale, fill, key_term_first)
        self._dqkv_on_hopper: Callable[..., bool] | None = None
        if dqkv_choice.refusal(grad_out, q, k, v, bias, key_mask, *numbers) is None:
            self._dqkv_on_hopper = hopper.attempt(_planned_dqkv, grad_out, q, k, v, key, scale)
            self._marked = self._planned_marked(B * R * H, q, given, tile)
        self._dbias_on_hopper: Callable[..., Tensor] | None = None
        self._dbias: Launch | None = None
        self._sum: Launch | None = None
        self._dbias_shape: tuple[int, ...] = (0,)
        if needs_dbias and dbias_choice.refusal(grad_out, q, k, v, bias, key_mask, *numbers) is None:
            tensors = (grad_out, q, k, v, bias, key_bias, key_mask)
            self._dbias_on_hopper = hopper.attempt(_planned_dbias, *tensors, *numbers)
        self._query_terms: QueryTerms | None = None
        tiled = self._dbias_on_hopper is not None
        if bias is not None and (tiled or self._dqkv_on_hopper is not None):
            self._query_terms = QueryTerms(grad_out, bias, tiled=tiled)
            self._lists = Lists(B, R, H, I, J, key, scale, tiled=tiled)
        else:
            self._words = Words(bias)
        if bias is None or not needs_dbias:
            return
        self._dbias_shape = tuple(bias.shape)
        programs = B * H * flags * triton.cdiv(J, tile.dbias.BLOCK_J)
        rows = triton.cdiv(R, tiling.dbias_groups(R, programs))
        groups = triton.cdiv(R, rows)
        given["rows"] = rows
        self._dbias = Launch(dbias._triangle_attention_bwd_dbias_lean, groups * programs, given, tile.dbias)
        if groups > 1:
            self._parts_shape = (groups, *self._dbias_shape)
            self._sum = sums.sum_of(B * H * I * J, groups)

    def _planned_marked(self, heads: int, q: Tensor, given: dict[str, Any], tile: Tiles) -> Launch:
        """What does the heads that the Hopper kernel for dq, dk and dv cannot do."""
        programs = tile.marked.programs * hopper.multiprocessors(q.get_device())
        return Launch(marked._triangle_attention_bwd_marked, programs, {**given, "heads": heads}, tile.marked)

    def __call__(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        key: Tensor | None,
        out: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        def empty(shape: Any, dtype: torch.dtype = q.dtype) -> Tensor:
            return memory.empty(shape, dtype, q)

        dq, dk, dv = empty(q.shape), empty(k.shape), empty(v.shape)
        left = (empty(self._terms_shape, torch.float32), empty(self._huge_shape, torch.int32))
        statistics = (row_max, row_sum)
        saved = (out, *statistics)
        # What dbias wants alone lies in dk and dv, which come after it.
        apart = memory.empty if self._dbias_on_hopper is None else memory.Scratch(dk, dv).empty
        row_tiles: Tensor | None = None
        flags: Tensor | None = None
        if bias is not None and self._query_terms is not None:
            words, row_tiles, flags = self._query_terms(bias, grad_out, *saved, left, apart)
        else:
            words = self._words(bias)
        by_i, by_j, loud = words
        rest = (key, *self._keys(key, loud), grad_out)
        listed: Listed | None = None
        if self._query_terms is not None:
            listed = self._lists(left[1], rest[2], flags, key, apart)
        dbias: Tensor | None = None
        if listed is not None and self._dbias_on_hopper is not None:
            made = (left[0], row_tiles, listed.of_dbias, apart)
            dbias = hopper.attempt(self._dbias_on_hopper, grad_out, q, k, v, bias, key, *statistics, *made)
        is_done: bool | None = None
        if listed is not None and self._dqkv_on_hopper is not None:
            given = (grad_out, q, k, v, by_j, key, left[0], listed.marked, (dq, dk, dv))
            is_done = hopper.attempt(self._dqkv_on_hopper, *given)
        if listed is not None and is_done:
            self._marked(listed.marked, q, k, v, by_i, by_j, *rest, *saved, *left, dq, dk, dv)
        else:
            self._dq(q, k, v, by_i, *rest, *saved, *left, dq)
            self._dkdv(q, k, v, by_j, *rest, *statistics, *left, dk, dv)
        if dbias is not None:
            return dq, dk, dv, dbias
        sums_of_ds = empty(self._dbias_shape)
        if self._sum is not None and self._dbias is not None:
            parts = empty(self._parts_shape, torch.float32)
            self._dbias(q, k, v, by_i, *rest, *statistics, *left, parts)
            self._sum(parts, sums_of_ds)
        elif self._dbias is not None:
            self._dbias(q, k, v, by_i, *rest, *statistics, *left, sums_of_ds)
        return dq, dk, dv, sums_of_ds
