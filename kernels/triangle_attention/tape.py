"""What a call allocates and launches, written down in order while it runs.

A call of one signature always makes the same tensors and launches the same kernels. Once that is known, a later call
needs none of the Python in between: `replay.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_running: dict[int, "Tape"] = {}  # by thread


@dataclass
class Made:
    """A tensor that the call made, and the launches between which its contents are wanted."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    address: int
    tensor: ReferenceType[Tensor]
    used: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """Where the address of a launched tensor comes from: an input, or so many bytes into what was made."""

    input: int = -1
    made: int = -1
    offset: int = 0


class Tape(TorchDispatchMode):
    """Use as a context in which the call runs.

    Args:
        inputs: what the call is given; no two may be one tensor, or which of them is launched would be a guess.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._inputs = inputs
        self.made: list[Made] = []
        self.launches: list[tuple[Any, list[Place]]] = []
        self.gap: str | None = None  # what happened first that cannot be written down
        if len({id(t) for t in inputs}) < len(inputs):
            self.gap = "one tensor in two places"

    def __enter__(self) -> "Tape":
        _running[get_ident()] = self
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        del _running[get_ident()]
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What torch computes on the way, no launch of ours would compute again; a view computes nothing.
        if not func.is_view and func not in _EMPTY:
            self.gap = self.gap or f"{func} of torch"
        return func(*args, **(kwargs or {}))

    def _place_of(self, t: Tensor) -> Place | None:
        """None where it cannot be told."""
        for n, given in enumerate(self._inputs):
            if given is t:
                return Place(n)
        # What is newest lies where it does now; what lay there before is free.
        address = t.data_ptr()
        for n in reversed(range(len(self.made))):
            one = self.made[n]
            if one.tensor() is t or one.address <= address < one.address + one.nbytes:
                return Place(made=n, offset=address - one.address)
        alike = [n for n, given in enumerate(self._inputs) if given.data_ptr() == address]
        return Place(alike[0]) if len(alike) == 1 else None

    def _note_launch(self, launch: Any, tensors: Sequence[Tensor]) -> None:
        places = []
        for t in tensors:
            place = self._place_of(t)
            if place is None:
                self.gap = self.gap or "a launch on a tensor of unknown origin"
                return
            if place.made >= 0:
                self.made[place.made].used.append(len(self.launches))
            places.append(place)
        self.launches.append((launch, places))

    def _note_made(self, t: Tensor) -> None:
        self.made.append(Made(tuple(t.shape), t.dtype, t.nbytes, t.data_ptr(), ref(t)))


_EMPTY = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default)


def note_made(t: Tensor) -> None:
    """A tensor was made, if this thread runs a tape."""
    tape = _running.get(get_ident()) if _running else None
    if tape is not None:
        tape._note_made(t)


def note_launch(launch: Any, tensors: Sequence[Tensor | None]) -> None:
    """Something that has a `kernel` was launched, if this thread runs a tape."""
    tape = _running.get(get_ident()) if _running else None
    if tape is not None:
        tape._note_launch(launch, [t for t in tensors if t is not None])
