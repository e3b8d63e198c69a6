"""What launches the Hopper kernels for all gradients of a row: by key up to 128, in tiles beyond."""

import torch
import triton
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments, memory, sums
from trifast_inductor.kernels.triangle_attention.bias import AlignedRows
from trifast_inductor.kernels.triangle_attention.hopper import choice, whole, whole_by_key, whole_choice
from trifast_inductor.kernels.triangle_attention.hopper.descriptors import CopyingLaunch


class Plan:
    """What a call that `whole_choice.refusal` lets through launches; the arguments as in `backward.launch`."""

    def __init__(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor,
        key_bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        fill: float,
        key_term_first: bool,
        needs_dbias: bool,
    ) -> None:
        B, R, I, H, D = q.shape
        J = k.shape[2]
        SIDE = sums.SIDE.value
        TI, TJ = triton.cdiv(I, SIDE), triton.cdiv(J, SIDE)
        rows = whole_choice.rows_of_a_program(R, B * H, choice.multiprocessors(q.get_device()))
        groups = triton.cdiv(R, rows)
        given = {
            **arguments.shared(q, k, v, bias, key_bias, key_mask, scale, fill, key_term_first),
            "B": B,
            "rows": rows,
            "NEEDS_DBIAS": needs_dbias,
            "EVEN_J": J % SIDE == 0,
        }
        names = ("q", "do", "out", "k", "v", "dq", "dk", "dv")
        boxes: dict[str, tuple[int, ...]] = {f"{name}_desc": (1, 1, SIDE, 1, D) for name in names}
        self._aligned: AlignedRows | None = None  # a bias that is copied box by box has to be
        if whole_choice.is_by_key(I, J):
            kernel = whole_by_key._triangle_attention_bwd_whole_by_key_hopper
            boxes |= {f"{name}_desc": (1, 1, whole_by_key.KEYS.value, 1, D) for name in ("k", "v", "dk", "dv")}
        else:
            kernel = whole._triangle_attention_bwd_whole_hopper
            given |= {"TI": TI, "TJ": TJ}
            boxes["bias_desc"] = (1, 1, SIDE, SIDE)
            self._aligned = AlignedRows(bias)
        self._run = CopyingLaunch(kernel, B * H * groups, given, 8, boxes)
        self._needs_dbias = needs_dbias
        self._dbias_shape = (B, H, I, J) if needs_dbias else (0,)
        self._parts_shape = (groups, B, H, TJ, TI, SIDE, SIDE) if needs_dbias else (0,)
        self._sum = sums.sum_of_tiles(B * H, I, J, groups)

    def __call__(self, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Of the tensors of `_launch`; None where the kernel could not run."""
        return choice.attempt(self._launch, *tensors)

    def _launch(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor,
        key: Tensor | None,
        out: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        key = arguments.bytes_of_mask(key)
        dq, dk, dv = (memory.empty(t.shape, q.dtype, q) for t in (q, k, v))
        dbias = memory.empty(self._dbias_shape, q.dtype, q)
        parts = memory.empty(self._parts_shape, torch.float32, q)
        readable = bias if self._aligned is None else self._aligned(bias)
        self._run(q, grad_out, out, k, v, dq, dk, dv, readable, key, row_max, row_sum, parts)
        if self._needs_dbias:
            self._sum(parts, dbias)
        return dq, dk, dv, dbias
