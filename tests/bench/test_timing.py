"""The clock, where no GPU is needed, by a time of the test's own: a busy machine is as good as an idle one."""

from types import SimpleNamespace

import pytest

from tests.bench.conftest import CPU
from trifast_inductor.bench import timing
from trifast_inductor.bench.timing import Clock, turns_for


class Time:
    """Stands for the module: passes when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    passing = Time()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=passing.perf_counter))
    return passing


def test_only_the_run_is_timed_and_turns_advance(time: Time) -> None:
    turns: list[int] = []

    def prepare(turn: int) -> int:
        time.sleep(0.02)
        return turn

    def run(turn: int) -> None:
        turns.append(turn)
        time.sleep(0.004 if turn else 0.1)  # one slow run does not move a median

    assert Clock(CPU, seconds=0.05).device_ms(run, prepare) == pytest.approx(4)
    assert turns[-5:] == [0, 1, 2, 3, 4]


def test_a_call_is_timed_whole(time: Time) -> None:
    assert Clock(CPU, seconds=0.02).call_ms(lambda turn: time.sleep(0.003)) == pytest.approx(3)


def test_a_cpu_has_no_peak_and_needs_one_set() -> None:
    assert Clock(CPU).peak_mib(lambda: pytest.fail("not run")) is None
    assert turns_for(1, CPU) == 1
