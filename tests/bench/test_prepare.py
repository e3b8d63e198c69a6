"""Compiling ahead: one process for each part of the grid, the longest first, few at a time."""

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
def test_one_process_for_each_part(hangs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    Process.started, Process.alive, Process.most, Process.hangs = [], 0, 0, hangs
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    prepare.compile_ahead(["--d", "16", "--n", "8,16,32"], [["--n", str(N)] for N in (32, 16, 8)], CPU)
    assert [options[-4] for options in Process.started] == ["32", "16", "8"]
    assert Process.started[0][0] == sys.executable
    assert Process.started[0][-9:] == ["--d", "16", "--n", "8,16,32", "--n", "32", "--device", "cpu", "--compile-only"]
    assert (Process.alive, Process.most) == (0, 2)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ([], [["--n", "16"], ["--n", "8"]]),
        (
            ["--module", "--variants", "inductor,trifast"],
            [
                ["--n", N, "--models", model, "--variants", variant]
                for N in ("16", "8")
                for model in ("triangle attention", "pairformer block")
                for variant in ("inductor", "trifast")
            ],
        ),
    ],
    ids=["op", "modules"],
)
def test_parts_of_the_grid(options: list[str], parts: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(command, "compile_ahead", lambda given, narrowed, device: asked.extend(narrowed))
    monkeypatch.setattr(command, "_run", lambda *_: 0)
    monkeypatch.setattr(command.module_command, "run", lambda *_: 0)
    assert main(["bench", "--prepare", "--n", "8,16", "--device", "cpu", *options]) == 0
    assert asked == parts


def test_such_a_process_compiles_the_peers_that_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []

    def compile_only(case: Case, peer: Peer, device: object) -> None:
        asked.append((case.N, peer.name))

    monkeypatch.setattr(command, "compile_only", compile_only)
    assert main(["bench", "--n", "8,16", "--n", "32", "--device", "cpu", "--compile-only"]) == 0
    assert asked == [(32, "ours-compiled"), (32, "inductor"), (32, "sdpa-compiled")]
