"""Launches decided once for each signature: a repeated call looks up a dict and hands pointers to the driver.

Checking the arguments, choosing a tile and having Triton bind some forty of them takes longer than the kernels
themselves run at N = 128. All of it depends on shapes, strides, dtypes and alignment alone.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
import triton
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import tuning
from trifast_inductor.kernels.triangle_attention.tiling import Tile

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


class Launch:
    """A kernel with everything bound but its tensors, which are its first parameters.

    Args:
        arguments: the other parameters by name; a superset will do.
    """

    def __init__(self, kernel: Any, programs: int, arguments: dict[str, Any], tile: Tile) -> None:
        self._kernel = kernel
        self._grid = (programs, 1, 1)
        values = {**arguments, **vars(tile)}
        self._arguments = [values[name] for name in kernel.arg_names if not name.endswith("_ptr")]
        self._options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        self._run: Callable[..., None] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        if self._run is not None:
            self._run(*[None if t is None else t.data_ptr() for t in tensors], *self._arguments)
            return
        compiled = self._kernel[self._grid](*tensors, *self._arguments, **self._options)
        if compiled is not None:  # the interpreter compiles nothing
            self._run = compiled[self._grid]


class Repeated:
    """`kernel[grid]`, bound by Triton once for each set of values; later calls hand pointers to the driver.

    For launches that no plan holds. Takes all parameters in the kernel's order, its constants too; the first one is a
    tensor, or the descriptor of one, on the device that is current.
    """

    _LIMIT = 4096

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._runs: dict[Signature, Callable[..., None]] = {}

    def __call__(self, programs: int, *arguments: Any, **options: int) -> None:
        device = getattr(arguments[0], "base", arguments[0]).get_device()
        key: list[Hashable] = [programs, device, *options.values()]
        passed: list[Any] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                pointer = argument.data_ptr()
                key += (argument.dtype, pointer % 16 == 0)
                passed.append(pointer)
            else:
                key.append(getattr(argument, "key", argument))  # of a descriptor its own
                passed.append(argument)
        signed = tuple(key)
        run = self._runs.get(signed)
        if run is not None:
            run(*passed)
            return
        grid = (programs, 1, 1)
        in_full = [argument.in_full() if hasattr(argument, "in_full") else argument for argument in arguments]
        compiled = self._kernel[grid](*in_full, **options)
        if compiled is not None:  # the interpreter compiles nothing
            if len(self._runs) >= self._LIMIT:
                self._runs.clear()
            self._runs[signed] = compiled[grid]


class Plans(dict[Signature, T], Generic[T]):
    """What was decided for each signature seen."""

    # Sequence lengths of a long evaluation, a few calls each: about 3 KB a plan.
    _LIMIT = 4096

    def __init__(self) -> None:
        super().__init__()
        tuning.when_changed(self.clear)

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


_NOTHING: AbstractContextManager[None] = nullcontext()


def on_device_of(t: Tensor) -> AbstractContextManager[Any]:
    """`torch.cuda.device_of`, but for free when that device is current."""
    index = t.get_device()
    if index < 0 or index == triton.runtime.driver.active.get_current_device():
        return _NOTHING
    return torch.cuda.device(index)
