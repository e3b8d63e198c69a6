"""What a figure is worth nothing without: the machine, the versions, the commit, the command."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch

_PACKAGES = ("torch", "triton", "trifast", "cuequivariance_torch")


def describe(device: torch.device, command: str, commit: str | None) -> dict[str, str]:
    """Header of every file of results, in order."""
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "device": device_line(device),
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{n} {v}" for n, v in versions.items() if v)]
            + ([f"CUDA {torch.version.cuda}"] if torch.version.cuda else [])
        ),
        "commit": commit or _commit() or "unknown",
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def device_line(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{processor()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    parts = [
        properties.name,
        f"{properties.multi_processor_count} multiprocessors",
        f"{properties.total_memory / 2**30:.0f} GiB",
        f"L2 {properties.L2_cache_size / 2**20:.0f} MiB",
        *_clocks(),
    ]
    return ", ".join(parts)


def processor() -> str:
    """The model's name where Linux gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown processor")


def directory_name(device: torch.device) -> str:
    """`nvidia-h200`, `cpu`: where results of this kind of device are kept."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this file is in, if it is in one."""
    here = Path(__file__).resolve().parent
    return _output("git", "-C", str(here), "describe", "--always", "--dirty")


def _clocks() -> list[str]:
    query = "--query-gpu=clocks.max.sm,driver_version"
    line = _output("nvidia-smi", query, "--format=csv,noheader")
    if line is None or line.count(",") < 1:
        return []
    clock, driver = line.splitlines()[0].split(",")[:2]
    return [f"at most {clock.strip()}", f"driver {driver.strip()}"]


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
