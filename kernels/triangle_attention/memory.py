"""Dense tensors that kernels write, not initialised, made as the code that Inductor generates makes its own.

`torch.empty` parses its arguments and asks the dispatcher: 3.5 us a call where this takes 1.3, of some thirty in a
training step of one module (CPU, torch 2.13). Where torch no longer has the function, `torch.empty` it is.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import tape

Empty = Callable[[tuple[int, ...], torch.dtype, Tensor], Tensor]  # as `empty` is
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


class Scratch:
    """Room in results that are written last, for what is wanted only before: in pieces, each from 512 bytes on.

    Args:
        results: contiguous; each has one byte or more.
    """

    _UNIT = 512  # bytes, as torch's own allocator has it

    def __init__(self, *results: Tensor) -> None:
        self._rooms = [t.view(torch.uint8).view(-1) for t in results]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, on: Tensor) -> Tensor:
        """A piece, or what `empty` makes where none has the room."""
        nbytes = math.prod(shape) * dtype.itemsize
        taken = -(-nbytes // self._UNIT) * self._UNIT
        for n, room in enumerate(self._rooms):
            if taken <= room.numel():
                self._rooms[n] = room[taken:]
                return room[:nbytes].view(dtype).view(shape)
        return empty(shape, dtype, on)
