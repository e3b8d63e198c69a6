"""Tensors as the copy engine takes them, and launches of kernels that are given such."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from trifast_inductor.kernels.triangle_attention.launching import Launch
from trifast_inductor.kernels.triangle_attention.tiling import Tile

_DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
    torch.int32: gl.int32,
}


def descriptor(t: Tensor, box: tuple[int, ...]) -> TensorDescriptor:
    """A tensor that is copied box by box.

    An axis of length 1 may have any stride, which the copy engine does not take.
    """
    strides = [step if size > 1 else t.shape[-1] for step, size in zip(t.stride(), t.shape, strict=True)]
    strides[-1] = 1
    layout = gl.NVMMASharedLayout.get_default_for(list(box), _DTYPES[t.dtype])
    return TensorDescriptor(t, list(t.shape), strides, list(box), layout)


class _Walked:
    """What a launch reads of a descriptor, and no more: Triton's own checks all that it is given, each time."""

    __slots__ = ("base", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False  # from triton 3.7 on

    def __init__(self, base: Tensor, shape: Sequence[int], strides: Sequence[int]) -> None:
        self.base, self.shape, self.strides = base, shape, strides


class CopyingLaunch(Launch):
    """A launch of a Gluon kernel.

    Args:
        boxes: of its parameters that are descriptors (`x_desc`), by name.
    """

    def __init__(
        self, kernel: Any, programs: int, arguments: dict[str, Any], num_warps: int, boxes: dict[str, tuple[int, ...]]
    ) -> None:
        super().__init__(kernel, programs, arguments, Tile(BLOCK_I=1, BLOCK_J=1, num_warps=num_warps, num_stages=1))
        self._boxes = [boxes.get(name) for name in kernel.arg_names]
        self._walks: list[tuple[list[int], list[int]] | None] = []

    def _in_full(self, tensors: Sequence[Tensor | None]) -> Sequence[Any]:
        given = [
            t if t is None or box is None else descriptor(t, box) for t, box in zip(tensors, self._boxes, strict=False)
        ]
        # Without their tensors, which nothing here may keep.
        self._walks = [(d.shape, d.strides) if isinstance(d, TensorDescriptor) else None for d in given]
        return given

    def _walked(self) -> Sequence[Any]:
        return [walk for walk in self._walks if walk is not None]

    def _handed(self, tensors: Sequence[Tensor | None]) -> Sequence[Any]:
        return [
            None if t is None else t.data_ptr() if walk is None else _Walked(t, *walk)
            for t, walk in zip(tensors, self._walks, strict=True)
        ]
