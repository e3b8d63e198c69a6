"""What a compiled module launches: from the code that inductor generated, and from the profiler on a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

_CALL = re.compile(
    r"^\s+(?:\w+ = )?"
    r"(?P<name>(?:triton|cpp)_\w+|extern_kernels\.\w+|torch\.ops\.[\w.]+|aten\.[\w.]+)(?:\.run)?\("
)


def generated(run: Callable[[], object]) -> list[str]:
    """Names of the kernels and extern calls in each graph's `call`, in order; compiles anew.

    A copy around an op would show here as a kernel with `clone` or `copy` in its name.
    """
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    # A compile that comes from a cache shows no code.
    with torch._inductor.config.patch(force_disable_caches=True):
        _, sources = run_and_get_code(run)
    return [name for source in sources for name in called(source)]


def called(source: str) -> list[str]:
    """The calls in one generated module."""
    names = []
    inside = False
    for line in source.splitlines():
        if re.match(r"\s*def call\(", line):
            inside = True
        elif inside and re.match(r"\s+return\b", line):
            inside = False
        elif inside and (match := _CALL.match(line)):
            names.append(match["name"])
    return names


def profiled(run: Callable[[], object]) -> list[tuple[str, int, float]]:
    """Kernels that a GPU ran, the longest first: name, number, milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [
        (event.key, event.count, event.self_device_time_total / 1e3)
        for event in profiler.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(events, key=lambda event: -event[2])
