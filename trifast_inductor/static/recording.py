"""Kernels compiled as their own launchers launch them, for a GPU that is not there.

The launchers run on CPU tensors that nobody reads. Each launch stops after compiling, for the architecture that
stands in for the GPU, so tile choice, specialisation and options are those of a real launch, whatever they become.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from trifast_inductor.kernels.triangle_attention import tuning
from trifast_inductor.static.targets import TARGETS, Target


@dataclass(frozen=True)
class Launch:
    """A compiled kernel and the constants that it was launched with."""

    name: str
    target: Target
    compiled: Any
    constants: dict[str, Any]


class _Driver:
    """What Triton asks the active driver for when it compiles."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(target.backend, target.arch, target.threads)
        # Triton keeps compiled kernels by device, so each architecture is a device of its own, and no real one.
        self.device = list(TARGETS).index(target.name) + 80

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Unloaded:
    """A compiled kernel for which there is no GPU: launching it again does nothing."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.compiled, name)


@contextmanager
def launches_for(name: str) -> Iterator[list[Launch]]:
    """Every kernel launched inside is compiled for one of `TARGETS`, recorded and not run."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    target = TARGETS[name]
    recorded: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        constants = {name: value for name, value in given.items() if isinstance(value, (int, str, bool))}
        recorded.append(Launch(self.__name__.lstrip("_"), target, compiled, constants))
        return _Unloaded(compiled)

    properties = SimpleNamespace(
        major=target.capability[0],
        minor=target.capability[1],
        multi_processor_count=target.multiprocessors,
        shared_memory_per_block_optin=target.shared_kib * 1024,
    )
    present = driver._active
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        patches.enter_context(mock.patch.object(torch.cuda, "get_device_capability", return_value=target.capability))
        patches.enter_context(mock.patch.object(torch.cuda, "get_device_properties", return_value=properties))
        driver.set_active(_Driver(target))
        # What launchers keep from one call to the next is for one GPU.
        tuning.changed()
        try:
            yield recorded
        finally:
            driver._active = present
            tuning.changed()
