"""Compiling ahead of the clock: other processes fill the compilers' disk caches, each with a part of the grid."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch

_SECONDS = 300


def compile_ahead(options: Sequence[str], parts: Sequence[Sequence[str]], device: torch.device) -> None:
    """Run the same command with `--compile-only` for each part, a few at a time; failures are left to the clock.

    Args:
        parts: options that narrow the grid, such as `["--n", "64"]`; what takes longest comes first.
    """
    at_once = max(1, min(len(parts), (os.cpu_count() or 1) // 2))
    waiting = [_command(options, part, device) for part in parts]
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(subprocess.Popen(waiting.pop(0), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        first = running.pop(0)
        try:
            first.wait(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            first.kill()
            first.wait()


def _command(options: Sequence[str], part: Sequence[str], device: torch.device) -> list[str]:
    # The last of two equal options holds.
    own = [*part, "--device", device.type, "--compile-only"]
    return [sys.executable, "-W", "ignore", "-m", "trifast_inductor", "bench", *options, *own]
