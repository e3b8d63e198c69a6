"""Clocks: medians of many runs on inputs that take turns, of the device alone and of whole calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_FEWEST, _MOST = 5, 200
# The device idles this many times as long as a run takes to be launched, so that it never waits for the host.
_HEAD_START = 2.0


class Clock:
    """Times a function of a turn number.

    Args:
        seconds: about how long each figure may take once warm; at least five runs are made.
    """

    def __init__(self, device: torch.device, seconds: float = 0.25) -> None:
        self.device = device
        self.seconds = seconds

    def device_ms(self, run: Callable[[Any], object], prepare: Callable[[int], Any] = lambda turn: turn) -> float:
        """Median milliseconds that the device works on `run(prepare(turn))`; launch and `prepare` are left out.

        On a GPU the stream first idles for as long as the launches take. On a CPU: wall time of `run`.
        """
        run(prepare(0))
        self.wait()
        host, whole = self._one(run, prepare)
        times: list[float] = []
        events = []
        for turn in range(self._turns(whole)):
            if self.device.type == "cpu":
                given = prepare(turn)
                start = time.perf_counter()
                run(given)
                times.append(1e3 * (time.perf_counter() - start))
                continue
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(_HEAD_START * host * sleep_cycles_a_second()))
            given = prepare(turn)
            first.record()
            run(given)
            last.record()
            events.append((first, last))
            del given
        self.wait()
        times += [first.elapsed_time(last) for first, last in events]
        return statistics.median(times)

    def call_ms(self, run: Callable[[int], object]) -> float:
        """Wall milliseconds a call in a stream of calls, launches included; median of five streams."""
        run(0)
        self.wait()
        _, whole = self._one(run, lambda turn: turn)
        turns = max(2, self._turns(whole) // 5)
        means = []
        for _ in range(5):
            start = time.perf_counter()
            for turn in range(turns):
                run(turn)
            self.wait()
            means.append(1e3 * (time.perf_counter() - start) / turns)
        return statistics.median(means)

    def peak_mib(self, run: Callable[[], object]) -> float | None:
        """MiB allocated at the highest point of a run beyond what was allocated before it; None on a CPU."""
        if self.device.type == "cpu":
            return None
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _one(self, run: Callable[[Any], object], prepare: Callable[[int], Any]) -> tuple[float, float]:
        """Seconds until one run has been launched, and until it has ended."""
        start = time.perf_counter()
        run(prepare(1))
        launched = time.perf_counter()
        self.wait()
        return launched - start, time.perf_counter() - start

    def _turns(self, seconds_each: float) -> int:
        return min(_MOST, max(_FEWEST, int(self.seconds / max(seconds_each, 1e-6))))


def sleep_cycles_a_second() -> float:
    """Of the counter that `torch.cuda._sleep` reads: the clock of the multiprocessors, 2 GHz at most."""
    return 2e9


def turns_for(bytes_each: int, device: torch.device) -> int:
    """How many input sets hold twice the L2 cache between them; one where a single set does."""
    if device.type == "cpu":
        return 1
    wanted = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(32, -(-wanted // bytes_each)))


@contextmanager
def freed_afterwards(device: torch.device) -> Iterator[None]:
    """Give cached memory back on the way out, so that one peer's leavings do not make another run out."""
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
