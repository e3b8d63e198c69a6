"""Dense tensors that kernels write, not initialised, made as the code that Inductor generates makes its own.

`torch.empty` parses its arguments and asks the dispatcher: 3.5 us a call where this takes 1.3, of some thirty in a
training step of one module (CPU, torch 2.13). Where torch no longer has the function, `torch.empty` it is.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import tape

_Make = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]


def _of_inductor(name: str) -> _Make | None:
    guards: Any = getattr(torch._C._dynamo, "guards", None)
    make: _Make | None = getattr(guards, name, None)
    return make


_on_cuda = _of_inductor("_empty_strided_cuda")
_on_cpu = _of_inductor("_empty_strided_cpu")


@functools.lru_cache(maxsize=4096)
def _sizes_and_strides(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(shape), torch.empty(shape, device="meta").stride()


def maker(shape: tuple[int, ...], dtype: torch.dtype, on: Tensor) -> Callable[[], Tensor]:
    """Makes `torch.empty(shape, dtype=dtype, device=on.device)`; a CUDA device has to be the current one."""
    make = _on_cuda if on.is_cuda else _on_cpu if on.is_cpu else None
    if make is None:
        return functools.partial(torch.empty, shape, dtype=dtype, device=on.device)
    return functools.partial(make, *_sizes_and_strides(shape), dtype)


def empty(shape: tuple[int, ...], dtype: torch.dtype, on: Tensor) -> Tensor:
    """What `maker` makes, once."""
    made = maker(shape, dtype, on)()
    tape.note_made(made)
    return made
