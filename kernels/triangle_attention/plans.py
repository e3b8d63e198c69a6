"""What was decided for calls, found again when such a call comes: by its signature, or faster where it is written down.

Checking the arguments, choosing a tile and having Triton bind some forty of them takes longer than the kernels
themselves run at N = 128. All of it depends on shapes, strides, dtypes and alignment alone.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import tuning
from trifast_inductor.kernels.triangle_attention.launching import on_device_of
from trifast_inductor.kernels.triangle_attention.replay import Program, Recorder

T = TypeVar("T")
Signature = tuple[Hashable, ...]


def signature(*tensors: Tensor | None) -> Signature:
    """All that a launch can depend on in its tensors, but for their addresses."""
    parts: list[Hashable] = []
    for t in tensors:
        if t is None:
            parts.append(None)
        else:
            # Triton compiles other code for a pointer that is a multiple of 16 bytes.
            parts += (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16 == 0)
    return tuple(parts)


class Plans(dict[Signature, T], Generic[T]):
    """What was decided for each signature seen."""

    # Sequence lengths of a long evaluation, a few calls each: 30 KB a plan, with its program and what Triton keeps.
    _LIMIT = 1024

    def __init__(self) -> None:
        super().__init__()
        self.programs = Programs()
        tuning.when_changed(self.clear)

    def clear(self) -> None:
        super().clear()
        self.programs.clear()

    def of(self, key: Signature, on: Tensor, make: Callable[..., T], given: Sequence[Any]) -> T:
        """What was decided for the key, or is now, on the device of a tensor."""
        plan = self.get(key)
        if plan is None:
            with on_device_of(on):
                plan = self.add(key, make(*given))
        return plan

    def add(self, key: Signature, plan: T) -> T:
        if len(self) >= self._LIMIT:
            self.clear()
        self[key] = plan
        return plan


class Programs:
    """Calls that were written down, by their numbers; then by the guards that torch's compiler has for its graphs.

    A guard on six tensors takes 0.5 us where their signature takes 6 (CPU, torch 2.13). It asks for more than a
    signature: one program may stand under several guards.
    """

    _LIMIT = 16  # layouts of one set of numbers: the modules of a model with few kinds of them

    def __init__(self) -> None:
        self._known: dict[Any, list[tuple[Callable[..., bool], Program]]] = {}

    def clear(self) -> None:
        self._known.clear()

    def run(self, tensors: Sequence[Tensor | None], numbers: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        """The results, if such a call is known."""
        known = self._known.get(key := _key(tensors, numbers))
        if known is None:
            return None
        given = [t for t in tensors if t is not None]
        addresses = [t.data_ptr() for t in given]
        for n, (fits, program) in enumerate(known):
            if fits(*given):
                if not _are_aligned(addresses):
                    return None
                if n:
                    self._known[key] = [known[n], *known[:n], *known[n + 1 :]]
                return program(addresses)
        return None

    def record(
        self,
        recorder: Recorder,
        run: Callable[[], tuple[Tensor, ...]],
        tensors: Sequence[Tensor | None],
        numbers: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:
        """What `run` gives, which may be written down; it is known from then on if every tensor starts on 16 bytes."""
        given = [t for t in tensors if t is not None]
        results = recorder(run, given)
        if recorder.program is not None and _are_aligned([t.data_ptr() for t in given]):
            self._add(recorder.program, given, _key(tensors, numbers))
        return results

    def _add(self, program: Program, given: Sequence[Tensor], key: tuple[Any, ...]) -> None:
        known = self._known.get(key, [])
        fits = None if any(fits(*given) for fits, _ in known) else _guard(given)
        if fits is not None:
            self._known[key] = [(fits, program), *known[: self._LIMIT - 1]]


def _key(tensors: Sequence[Tensor | None], numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    return numbers, *[t is None for t in tensors]


def _are_aligned(addresses: Sequence[int]) -> bool:
    bits = 0
    for address in addresses:
        bits |= address
    return bits % 16 == 0


def _guard(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """Whether tensors have the sizes, strides, dtypes and devices of these; None where torch lacks what tells."""
    guards: Any = getattr(torch._C._dynamo, "guards", None)
    try:
        check: Callable[..., bool] = guards.TensorGuards(
            *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
        ).check
        return check if check(*tensors) else None
    except (AttributeError, TypeError, RuntimeError, ValueError):
        return None
