"""Search for a faster tile: from the shipped one to its best neighbour, until no neighbour is faster.

A tile of a backward kernel is timed within the whole backward, the other kernels' tiles unchanged. A tile that does
not compile, does not fit, or gives another result than the shipped one is passed over.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import backward, forward, tiling, tuning
from trifast_inductor.kernels.triangle_attention.hopper import choice as hopper
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


def serves(device: int, key: Key) -> bool:
    """Whether launches take this kernel at some length that the key stands for, operands and bias of one dtype.

    Sequences of 16 bits go to kernels for Hopper where those serve. Their tiles are fixed: by the order in which they
    keep the bias, or because a tile is a whole row.
    """
    if not hopper.is_hopper(device):
        return True
    lengths = (key.length // 2 + 1, 3 * key.length // 4 + 1, key.length)
    return any(_is_portable(device, key, length) for length in lengths)


def _is_portable(device: int, key: Key, length: int) -> bool:
    make = functools.partial(torch.empty, device=torch.device("cuda", device))
    grad_out, q, k, v, bias, key_bias = _operands(key, length, make)
    if key.kernel == "forward":
        return forward.plan_on_hopper(q, k, v, bias, None, *_NUMBERS) is None
    return backward.plan_elsewhere(grad_out, q, k, v, bias, key_bias, None, fill=0.0) is None


_NUMBERS = (1.0, 0.0, True)  # scale, fill, and a key term that comes before the bias


def _operands(key: Key, N: int, make: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Any, Any]:
    """A gradient of the output, q, k, v, bias and key term."""
    grad_out, q, k, v = (make((1, N, N, key.H, key.D), dtype=key.dtype) for _ in range(4))
    bias = make((1, key.H, N, N), dtype=key.dtype) if key.bias else None
    key_bias = make((1, N, N), dtype=torch.float32) if key.mask else None
    return grad_out, q, k, v, bias, key_bias


def workload(device: int, key: Key) -> Run:
    """A launch on random inputs that takes its tile by this key: the portable forward, or the whole backward."""
    where = torch.device("cuda", device)
    make = functools.partial(torch.randn, generator=torch.Generator(where).manual_seed(0), device=where)
    grad_out, q, k, v, bias, key_bias = _operands(key, key.length, make)
    if key_bias is not None:  # a tenth of the keys are left out
        key_bias = torch.where(key_bias > 1.2816, -1e9, 0.0)
    tensors = (q * key.D**-0.5, k, v, bias, key_bias, None)
    if key.kernel == "forward":
        return lambda: forward.portable(*tensors, *_NUMBERS)
    results = forward.portable(*tensors, *_NUMBERS)
    return lambda: backward.portable(grad_out, *tensors, *results, *_NUMBERS, key.bias)


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
