"""Which backward calls these kernels take, and their launches."""

from typing import Any

import torch
import triton
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments, sums, tiling
from trifast_inductor.kernels.triangle_attention.launching import Launch
from trifast_inductor.kernels.triangle_attention.lean import dbias, dqkv, tiles
from trifast_inductor.kernels.triangle_attention.lean.spans import Spans
from trifast_inductor.kernels.triangle_attention.lean.words import Words

# A program owns a row of a head: fewer would leave multiprocessors idle that the portable kernels keep busy.
FEWEST_PROGRAMS = 256
# Up to here the passes that prepare cost more than they save. Neither bound was measured.
SHORTEST = 129


def refusal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, grad_out: Tensor) -> str | None:
    """Why a call goes to the portable kernels, or None."""
    B, R, I, H, D = q.shape
    why = None
    if q.dtype not in (torch.bfloat16, torch.float16) or (bias is not None and bias.dtype != q.dtype):
        why = "q, k, v and bias are not of one 16-bit dtype"
    elif D not in (16, 32, 64):
        why = "the head size is not 16, 32 or 64"
    elif max(I, k.shape[2]) < SHORTEST or B * R * H < FEWEST_PROGRAMS:
        why = "too small"
    elif not arguments.rows_are_aligned(q, k, v, grad_out):
        why = "rows do not start on 16 bytes"
    elif any(t.stride(2) >= 2**24 for t in (q, k, v, grad_out)) or k.shape[2] >= 2**24:
        why = "an offset within a tile would pass 32 bits"
    elif not _is_hopper():
        why = "no Hopper GPU"
    return why


def _is_hopper() -> bool:
    if triton.knobs.runtime.interpret:
        return True
    target = triton.runtime.driver.active.get_current_target()
    return bool(target.backend == "cuda" and target.arch == 90)


class _Capped(Launch):
    def __init__(self, kernel: Any, programs: int, given: dict[str, Any], tile: tiles.Tile) -> None:
        super().__init__(kernel, programs, {**given, "WARPS": tile.num_warps}, tile)
        if tile.maxnreg is not None:
            self._options["maxnreg"] = tile.maxnreg


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
        tile, dbias_tile = tiles.dqkv_tile(D), tiles.dbias_tile(D)
        flagged = dbias_tile.BLOCK_I
        flags = triton.cdiv(I, flagged)
        given = arguments.shared(q, k, v, bias, key_bias, key_mask, scale, fill, key_term_first)
        given |= {**arguments.strides("do", grad_out, "brihd"), "B": B, "flags": flags, "flagged": flagged}
        self._words = Words(bias, dbias_tile, tile)
        self._spans = Spans(key_bias if key_mask is None else key_mask, fill, key_mask is not None)
        self._terms_shape = (B, R, H, I, 2)
        self._huge_shape = (B, R, H, flags)
        self._slices_shape = (B, R, H, triton.cdiv(I, tile.BLOCK_I), tile.BLOCK_I * D)
        self._terms = Launch(dqkv._triangle_attention_bwd_terms, B * R * H * flags, given, dbias_tile)
        self._dqkv = _Capped(dqkv._triangle_attention_bwd_dqkv, B * R * H, given, tile)

        self._dbias: Launch | None = None
        self._sum: Launch | None = None
        self._dbias_shape: tuple[int, ...] = (0,)
        if bias is None or not needs_dbias:
            return
        self._dbias_shape = tuple(bias.shape)
        programs = B * H * flags * triton.cdiv(J, dbias_tile.BLOCK_J)
        rows = triton.cdiv(R, tiling.dbias_groups(R, programs))
        groups = triton.cdiv(R, rows)
        self._dbias = _Capped(
            dbias._triangle_attention_bwd_dbias_lean, groups * programs, {**given, "rows": rows}, dbias_tile
        )
        if groups > 1:
            self._parts_shape = (groups, *self._dbias_shape)
            self._sum = sums.sum_of(B * H * I * J, groups)

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
            return torch.empty(shape, dtype=dtype, device=q.device)

        dq, dk, dv, sums_of_ds = empty(q.shape), empty(k.shape), empty(v.shape), empty(self._dbias_shape)
        terms = empty(self._terms_shape, torch.float32)
        huge = empty(self._huge_shape, torch.int32)
        by_i, by_j = self._words(bias)
        spans = self._spans(key)
        saved = (row_max, row_sum, terms, huge)
        self._terms(grad_out, out, *saved)
        slices = empty(self._slices_shape, torch.float32)
        self._dqkv(q, k, v, by_j, key, spans, grad_out, *saved, slices, dq, dk, dv)
        if self._sum is not None and self._dbias is not None:
            parts = empty(self._parts_shape, torch.float32)
            self._dbias(q, k, v, by_i, key, spans, grad_out, *saved, parts)
            self._sum(parts, sums_of_ds)
        elif self._dbias is not None:
            self._dbias(q, k, v, by_i, key, spans, grad_out, *saved, sums_of_ds)
        return dq, dk, dv, sums_of_ds
