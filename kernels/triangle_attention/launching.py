"""A launch decided once: all that a kernel is given besides tensors, bound; later ones hand pointers to the driver."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from trifast_inductor.kernels.triangle_attention import direct, tape
from trifast_inductor.kernels.triangle_attention.tiling import CappedTile, Tile


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
        self.kernel: direct.Kernel | None = None  # once it is compiled, if it can be launched past Triton

    def __call__(self, *tensors: Tensor | None) -> None:
        tape.note_launch(self, tensors)
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
        self.kernel = self._kernel_of(compiled, given)
        straight = None
        if self.kernel is not None:
            count = sum(t is not None for t in given)
            straight = direct.launcher([(self.kernel, range(count))], count)

        def launch(tensors: Sequence[Tensor | None]) -> None:
            if are_heard():
                listened(*self._handed(tensors), *arguments)
            elif straight is not None:
                straight([t.data_ptr() for t in tensors if t is not None], current_stream(device))
            else:
                stream = current_stream(device)
                run(*grid, stream, function, metadata, None, None, None, *self._handed(tensors), *arguments)

        return launch

    def _kernel_of(self, compiled: Any, given: Sequence[Tensor | None]) -> direct.Kernel | None:
        if compiled.metadata.target.backend != "cuda":
            return None
        names = self._kernel.arg_names
        kinds = {name: compiled.src.signature[name] for name in names}
        values = dict(zip(names[len(given) :], self._arguments, strict=True))
        addresses = [t.data_ptr() for t in given if t is not None]
        return direct.kernel(compiled, self._grid, kinds, values, self._walked(), addresses)

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


def is_for_hopper() -> bool:
    """Whether launches run on Hopper, or under the interpreter, which stands in for it."""
    return bool(triton.knobs.runtime.interpret) or cuda_arch() == 90


def are_heard() -> bool:
    """Whether anybody listens to launches by Triton's hooks."""
    knobs = triton.knobs.runtime
    return _listens(knobs.launch_enter_hook) or _listens(knobs.launch_exit_hook)


def _listens(hook: Any) -> bool:
    return bool(getattr(hook, "calls", hook))


_NOTHING: AbstractContextManager[None] = nullcontext()


def on_device_of(t: Tensor) -> AbstractContextManager[Any]:
    """`torch.cuda.device_of`, but for free when that device is current."""
    index = t.get_device()
    if index < 0 or index == triton.runtime.driver.active.get_current_device():
        return _NOTHING
    return torch.cuda.device(index)
