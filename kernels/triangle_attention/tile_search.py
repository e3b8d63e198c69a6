"""Search for a faster tile: from the shipped one to its best neighbour, until no neighbour is faster.

A tile of a backward kernel is timed within the whole backward, the other kernels' tiles unchanged. A tile that does
not compile, does not fit, or gives another result than the shipped one is passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import backward, forward, tiling, tuning
from trifast_inductor.kernels.triangle_attention.tile_store import Entry
from trifast_inductor.kernels.triangle_attention.tuning import Key, Sizes

log = logging.getLogger(__name__)

STEPS = {
    "BLOCK_I": (16, 32, 64, 128, 256),
    "BLOCK_J": (16, 32, 64, 128, 256),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4),
}
# One parameter up or down, or one block longer and the other shorter.
MOVES = (
    *({name: by} for name in STEPS for by in (1, -1)),
    {"BLOCK_I": 1, "BLOCK_J": -1},
    {"BLOCK_I": -1, "BLOCK_J": 1},
)
WORTHWHILE = 0.98  # of the time before; medians of one kernel repeat within 1 %
ROUNDS = 6

Run = Callable[[], Sequence[Tensor]]
Measure = Callable[[Run], float]
Workload = Callable[[int, Key], Run]


@dataclass(frozen=True)
class Outcome:
    """What a search ended with; `tried` counts tiles, the shipped one included."""

    key: Key
    sizes: Sizes
    ms: float
    heuristic: Sizes
    heuristic_ms: float
    tried: int

    @property
    def entry(self) -> Entry:
        """As it is stored."""
        return {"tile": self.sizes, "ms": round(self.ms, 6), "heuristic_ms": round(self.heuristic_ms, 6)}

    @property
    def changed(self) -> bool:
        return self.sizes != self.heuristic

    def __str__(self) -> str:
        times = f"{self.heuristic_ms:.4f} -> {self.ms:.4f} ms"
        return f"{self.key}: {short(self.heuristic)} -> {short(self.sizes)}, {times}, {self.tried} tried"


def short(sizes: Sizes) -> str:
    """`64x32 w4 s3`."""
    return "{BLOCK_I}x{BLOCK_J} w{num_warps} s{num_stages}".format(**sizes)


def median_ms(run: Run) -> float:
    """On the GPU, after warming up, the L2 cache emptied before each run."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=40, return_mode="median"))


def workload(device: int, key: Key) -> Run:
    """A launch on random inputs that takes its tile by this key: the portable forward, or the whole backward."""
    H, D, N = key.H, key.D, key.length
    where = torch.device("cuda", device)
    generator = torch.Generator(where).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=where, dtype=key.dtype)

    q, k, v, grad_out = (normal(1, N, N, H, D) for _ in range(4))
    bias = normal(1, H, N, N) if key.bias else None
    key_bias = None
    if key.mask:
        left_out = torch.rand((1, N, N), generator=generator, device=where) < 0.1
        key_bias = torch.where(left_out, -1e9, 0.0)
    inputs = (q, k, v, bias, key_bias, None, D**-0.5, 0.0, True)
    if key.kernel == "forward":
        return lambda: forward.portable(*inputs)
    results = forward.portable(*inputs)
    return lambda: backward.portable(grad_out, *inputs[:6], *results, *inputs[6:], bias is not None)


def search(device: int, key: Key, measure: Measure = median_ms, workload: Workload = workload) -> Outcome:
    """The fastest tile found, which is in use afterwards.

    Raises whatever the shipped tile's own launch raises: then there is nothing to compare with.
    """
    run = workload(device, key)
    heuristic = _clipped(asdict(tiling.heuristic(key.kernel, key.dtype, key.D, key.precision, key.length)), key)
    tuning.use(device, key, heuristic)
    expected = [result.clone() for result in run()]
    times = {tuple(heuristic.values()): measure(run)}
    best = heuristic
    for _ in range(ROUNDS):
        for sizes in _neighbours(best, key):
            if tuple(sizes.values()) not in times:
                times[tuple(sizes.values())] = _time(device, key, sizes, run, expected, measure)
        fastest = min(times, key=times.__getitem__)
        if times[fastest] > WORTHWHILE * times[tuple(best.values())]:
            break
        best = dict(zip(heuristic, fastest, strict=True))
    tuning.use(device, key, best)
    ms, heuristic_ms = times[tuple(best.values())], times[tuple(heuristic.values())]
    return Outcome(key, best, ms, heuristic, heuristic_ms, len(times))


def _time(device: int, key: Key, sizes: Sizes, run: Run, expected: Sequence[Tensor], measure: Measure) -> float:
    """Milliseconds, or infinity for a tile that must not be taken."""
    tuning.use(device, key, sizes)
    try:
        if not all(map(_agree, run(), expected)):
            log.warning("%s with tile %s gives another result; it is passed over", key, short(sizes))
            return float("inf")
        return measure(run)
    except Exception as error:  # of the compiler or the launch: too large, or not supported
        log.debug("%s with tile %s: %s", key, short(sizes), error)
        return float("inf")


def _agree(actual: Tensor, expected: Tensor) -> bool:
    """Alike but for the order of sums, which a tile decides."""
    finite = expected.isfinite()
    if not torch.equal(actual.isfinite(), finite):
        return False
    expected = expected.float().where(finite, 0.0)
    off = (actual.float().where(finite, 0.0) - expected).norm()
    return bool(off <= max(4 * torch.finfo(actual.dtype).eps, 1e-3) * expected.norm())


def _neighbours(sizes: Sizes, key: Key) -> Iterator[Sizes]:
    for move in MOVES:
        moved = dict(sizes)
        for name, by in move.items():
            place = STEPS[name].index(sizes[name]) + by
            if not 0 <= place < len(STEPS[name]):
                break
            moved[name] = STEPS[name][place]
        else:
            yield _clipped(moved, key)


def _clipped(sizes: Sizes, key: Key) -> Sizes:
    """No block longer than the axis, as a launch will have it."""
    longest = max(16, key.length)
    return {name: min(size, longest) if name.startswith("BLOCK") else size for name, size in sizes.items()}
