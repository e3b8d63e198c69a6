"""Compiling ahead: one process for each N, the longest first, few at a time."""

import subprocess
import sys

import pytest

from tests.bench.conftest import CPU
from trifast_inductor.__main__ import main
from trifast_inductor.bench import command, prepare
from trifast_inductor.bench.case import Case
from trifast_inductor.bench.peers import Peer


class Process:
    """Stands in for a process; what was started and how many lived at once."""

    started: list[list[str]]
    alive: int
    most: int
    hangs: bool

    def __init__(self, options: list[str], **_: object) -> None:
        Process.started.append(options)
        Process.alive += 1
        Process.most = max(Process.most, Process.alive)
        self.killed = False

    def wait(self, timeout: float | None = None) -> None:
        if Process.hangs and not self.killed:
            raise subprocess.TimeoutExpired("bench", 1.0)
        Process.alive -= 1

    def kill(self) -> None:
        self.killed = True


@pytest.mark.parametrize("hangs", [False, True])
def test_one_process_for_each_length(hangs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    Process.started, Process.alive, Process.most, Process.hangs = [], 0, 0, hangs
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    prepare.compile_ahead(["--d", "16", "--n", "8,16,32"], [8, 32, 16], CPU)
    assert [options[-4] for options in Process.started] == ["32", "16", "8"]
    assert Process.started[0][0] == sys.executable
    assert Process.started[0][-9:] == ["--d", "16", "--n", "8,16,32", "--n", "32", "--device", "cpu", "--compile-only"]
    assert (Process.alive, Process.most) == (0, 2)


def test_such_a_process_compiles_the_peers_that_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []

    def compile_only(case: Case, peer: Peer, device: object) -> None:
        asked.append((case.N, peer.name))

    monkeypatch.setattr(command, "compile_only", compile_only)
    assert main(["bench", "--n", "8,16", "--n", "32", "--device", "cpu", "--compile-only"]) == 0
    assert asked == [(32, "ours-compiled"), (32, "inductor")]
