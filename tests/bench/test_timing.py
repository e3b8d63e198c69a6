"""The clock, where no GPU is needed."""

import time

import pytest

from tests.bench.conftest import CPU
from trifast_inductor.bench.timing import Clock, turns_for


def test_only_the_run_is_timed_and_turns_advance() -> None:
    turns: list[int] = []

    def prepare(turn: int) -> int:
        time.sleep(0.02)
        return turn

    def run(turn: int) -> None:
        turns.append(turn)
        time.sleep(0.004)

    assert 3.5 < Clock(CPU, seconds=0.05).device_ms(run, prepare) < 15
    assert turns[-5:] == [0, 1, 2, 3, 4]


def test_a_call_is_timed_whole() -> None:
    assert Clock(CPU, seconds=0.02).call_ms(lambda turn: time.sleep(0.003)) == pytest.approx(3.2, abs=2.5)


def test_a_cpu_has_no_peak_and_needs_one_set() -> None:
    assert Clock(CPU).peak_mib(lambda: pytest.fail("not run")) is None
    assert turns_for(1, CPU) == 1
