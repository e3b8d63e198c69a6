"""Tensors as the copy engine takes them."""

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


def descriptor(t: Tensor, box: list[int]) -> TensorDescriptor:
    """An axis of length 1 may have any stride, which the copy engine does not take."""
    strides = [step if size > 1 else t.shape[-1] for step, size in zip(t.stride(), t.shape, strict=True)]
    layout = gl.NVMMASharedLayout.get_default_for(box, _DTYPES[t.dtype])
    return TensorDescriptor(t, list(t.shape), [*strides[:-1], 1], box, layout)
