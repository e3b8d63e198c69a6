"""Tuned tiles on disk: one JSON file for each GPU model and Triton version, shared by any number of processes.

    {"format": 1, "gpu": "NVIDIA H200", "capability": [9, 0], "triton": "3.6.0", "kernels": "<hash of their sources>",
     "tiles": {"<key>": {"tile": {"BLOCK_I": 64, ...}, "ms": 0.12, "heuristic_ms": 0.15}}}

A reader takes a file whole or not at all: one that is corrupt, of another format or tuned for other kernels is left
alone with one warning. A writer merges what it found under a lock and replaces the file at once, so two processes
that tune at the same time lose nothing. Nothing here is executable: JSON, never pickles.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

log = logging.getLogger(__name__)
FORMAT = 1
DIRECTORY_VARIABLE = "TRIFAST_CACHE_DIR"

Entry = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """What tiles are tuned for."""

    gpu: str
    capability: tuple[int, int]
    triton: str

    @property
    def file_name(self) -> str:
        parts = (self.gpu, f"sm{self.capability[0]}{self.capability[1]}", f"triton{self.triton}")
        return "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", part) for part in parts) + ".json"


def directory() -> Path:
    """`TRIFAST_CACHE_DIR`, or the user's cache directory."""
    chosen = os.environ.get(DIRECTORY_VARIABLE)
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("trifast_inductor")) / "tiles"


@functools.cache
def kernels_hash() -> str:
    """Of every source file here that holds a kernel: a tile is tuned for the code that it was timed with."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        source = path.read_bytes()
        if b"\n@triton.jit" in source or b"\n@gluon.jit" in source:
            digest.update(path.name.encode() + b"\0" + source)
    return digest.hexdigest()[:16]


def load(machine: Machine) -> dict[str, Entry]:
    """Entries by key; none where there is no file, or none that can be used."""
    return _read(directory() / machine.file_name, lambda content: _fault(content, machine))


def read_entries(path: Path) -> dict[str, Entry]:
    """Entries of any file of tuned tiles, for whatever machine."""
    return _read(path, lambda content: None)


def _read(path: Path, fault_of: Callable[[dict[str, Any]], str | None]) -> dict[str, Entry]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        _warn_once(path, f"cannot be read ({error})")
        return {}
    except (ValueError, RecursionError) as error:
        _warn_once(path, f"is not JSON ({error})")
        return {}
    if isinstance(content, dict) and isinstance(content.get("tiles"), dict):
        fault = fault_of(content)
    else:
        fault = "is not a file of tuned tiles"
    if fault is not None:
        _warn_once(path, fault)
        return {}
    return {key: entry for key, entry in content["tiles"].items() if _is_entry(entry)}


def save(machine: Machine, entries: Mapping[str, Entry]) -> Path | None:
    """Add entries to those on disk; the file, or None, with a warning, where it cannot be written."""
    path = directory() / machine.file_name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            _replace(path, json.dumps(_content(machine, {**load(machine), **entries}), indent=1))
    except OSError as error:
        _warn_once(path, f"cannot be written ({error}); this process goes on with what it has tuned")
        return None
    return path


def clear() -> list[Path]:
    """Remove every file of tuned tiles, for all GPUs; which those were."""
    found = sorted(directory().glob("*.json"))
    for path in found:
        path.unlink(missing_ok=True)
        path.with_suffix(".lock").unlink(missing_ok=True)
    return found


def _content(machine: Machine, entries: Mapping[str, Entry]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "gpu": machine.gpu,
        "capability": list(machine.capability),
        "triton": machine.triton,
        "kernels": kernels_hash(),
        "tiles": dict(sorted(entries.items())),
    }


def _fault(content: dict[str, Any], machine: Machine) -> str | None:
    """What makes a file's content useless here."""
    expected = _content(machine, {})
    for name in ("format", "gpu", "capability", "triton"):
        if content.get(name) != expected[name]:
            return f"is for {name} {content.get(name)!r}, not {expected[name]!r}"
    if content.get("kernels") != expected["kernels"]:
        return "was tuned for other kernels than these"
    return None


def _is_entry(entry: Any) -> bool:
    tile = entry.get("tile") if isinstance(entry, dict) else None
    return isinstance(tile, dict) and all(type(value) is int for value in tile.values())


def _replace(path: Path, text: str) -> None:
    """Whoever reads meanwhile sees the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time; the lock is a file beside, since the file itself is replaced."""
    import fcntl  # not on Windows, where Triton is not either

    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def _warn_once(path: Path, fault: str) -> None:
    log.warning("tuned tiles are not used: %s %s; run trifast-tune to tune again", path, fault)
