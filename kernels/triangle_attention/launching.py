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
from triton.compiler import CompiledKernel

from trifast_inductor.kernels.triangle_attention import direct, tuning
from trifast_inductor.kernels.triangle_attention.tiling import CappedTile, Tile

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
        # The launch of a kernel can overlap the end of the one before from Hopper on.
        dependent = "PDL" in kernel.arg_names and cuda_arch() >= 90
        values = {**vars(tile), "PDL": dependent, **arguments}
        self._arguments = [values[name] for name in kernel.arg_names if not name.endswith(("_ptr", "_desc"))]
        self._options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        if dependent:
            self._options["launch_pdl"] = True
        if isinstance(tile, CappedTile) and tile.maxnreg is not None:
            self._options["maxnreg"] = tile.maxnreg
        self._run: Callable[[Sequence[Tensor | None]], None] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        if self._run is not None:
            self._run(tensors)
            return
        compiled = self._kernel[self._grid](*self._in_full(tensors), *self._arguments, **self._options)
        if compiled is not None:  # the interpreter compiles nothing
            self._run = self._bound(compiled, tensors)

    def _bound(self, compiled: Any, given: Sequence[Tensor | None]) -> Callable[[Sequence[Tensor | None]], None]:
        """`compiled[grid]` on the device that is current now.

        Straight through the driver where that can be; without what Triton prepares for listeners to launches.
        """
        grid, arguments = self._grid, self._arguments
        listened: Callable[..., None] = compiled[grid]
        if not isinstance(compiled, CompiledKernel):
            return lambda tensors: listened(*self._handed(tensors), *arguments)
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        device = triton.runtime.driver.active.get_current_device()
        current_stream = triton.runtime.driver.active.get_current_stream
        knobs = triton.knobs.runtime
        straight = self._straight(compiled, given)

        def launch(tensors: Sequence[Tensor | None]) -> None:
            if _listens(knobs.launch_enter_hook) or _listens(knobs.launch_exit_hook):
                listened(*self._handed(tensors), *arguments)
            elif straight is not None:
                straight([t.data_ptr() for t in tensors if t is not None], current_stream(device))
            else:
                stream = current_stream(device)
                run(*grid, stream, function, metadata, None, None, None, *self._handed(tensors), *arguments)

        return launch

    def _straight(self, compiled: Any, given: Sequence[Tensor | None]) -> Callable[[list[int], int], None] | None:
        if compiled.metadata.target.backend != "cuda":
            return None
        names = self._kernel.arg_names
        kinds = {name: compiled.src.signature[name] for name in names}
        values = dict(zip(names[len(given) :], self._arguments, strict=True))
        addresses = [t.data_ptr() for t in given if t is not None]
        return direct.launcher(compiled, self._grid, kinds, values, self._walked(), addresses)

    def _walked(self) -> Sequence[Any]:
        """Lengths and strides of each tensor that is handed over as a descriptor."""
        return []

    def _in_full(self, tensors: Sequence[Tensor | None]) -> Sequence[Any]:
        """What Triton is given to compile for."""
        return tensors

    def _handed(self, tensors: Sequence[Tensor | None]) -> Sequence[Any]:
        """What the driver is given."""
        return [None if t is None else t.data_ptr() for t in tensors]


def cuda_arch() -> int:
    """What Triton compiles for on the current device, as 90; 0 where it is not CUDA, and under the interpreter."""
    if triton.knobs.runtime.interpret:
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return int(target.arch) if target.backend == "cuda" else 0


def _listens(hook: Any) -> bool:
    return bool(getattr(hook, "calls", hook))


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
