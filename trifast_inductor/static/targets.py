"""The GPUs that kernels are compiled for without being there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """`arch` is what Triton calls it; a launcher may ask for the rest.

    Shared memory in KiB, as much as one program may have (CUDA C++ Programming Guide, "Compute Capabilities"; AMD
    Instinct MI300 ISA, local data share). Multiprocessors of A100, L40S, H200, B200 and MI300X.
    """

    name: str
    backend: str
    arch: int | str
    capability: tuple[int, int]
    threads: int  # of a warp
    multiprocessors: int
    shared_kib: int


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, (8, 0), 32, 108, 163),
        Target("sm_89", "cuda", 89, (8, 9), 32, 142, 99),
        Target("sm_90", "cuda", 90, (9, 0), 32, 132, 227),
        Target("sm_100", "cuda", 100, (10, 0), 32, 148, 227),
        Target("gfx942", "hip", "gfx942", (9, 4), 64, 304, 64),
    )
}
