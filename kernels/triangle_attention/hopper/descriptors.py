"""Tensors as the copy engine takes them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
    torch.int32: gl.int32,
}


@dataclass(slots=True)
class Described:
    """A tensor and the box that is copied of it: what a launch reads of Triton's own descriptor, and no more.

    That one checks all that it is given, which takes longer than a launch.
    """

    base: Tensor
    box: tuple[int, ...]
    shape: list[int]
    strides: list[int]
    padding: str = "zero"
    round_f32_to_tf32: bool = False  # from triton 3.7 on

    @property
    def key(self) -> tuple[Any, ...]:
        """What code is compiled for."""
        return (self.base.dtype, self.box)

    def in_full(self) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for(list(self.box), _DTYPES[self.base.dtype])
        return TensorDescriptor(self.base, self.shape, self.strides, list(self.box), layout)


def descriptor(t: Tensor, box: tuple[int, ...]) -> Described:
    """An axis of length 1 may have any stride, which the copy engine does not take."""
    strides = [step if size > 1 else t.shape[-1] for step, size in zip(t.stride(), t.shape, strict=True)]
    strides[-1] = 1
    return Described(t, box, list(t.shape), strides)
