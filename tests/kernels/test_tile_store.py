"""Tuned tiles on disk: nothing is lost, nothing foreign is believed, and no fault is worse than a warning."""

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trifast_inductor.kernels.triangle_attention import tile_store
from trifast_inductor.kernels.triangle_attention.tile_store import Machine

MACHINE = Machine("Some GPU (80GB)", (9, 0), "3.9.0")
ENTRY = {"tile": {"BLOCK_I": 64, "BLOCK_J": 32, "num_warps": 4, "num_stages": 3}, "ms": 1.0, "heuristic_ms": 2.0}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of MACHINE, in a directory of its own that nothing has made yet."""
    monkeypatch.setenv(tile_store.DIRECTORY_VARIABLE, str(tmp_path / "tiles"))
    tile_store._warn_once.cache_clear()
    yield tmp_path / "tiles" / MACHINE.file_name
    tile_store._warn_once.cache_clear()


def test_what_is_saved_is_loaded_and_merged(store: Path) -> None:
    assert tile_store.load(MACHINE) == {}
    assert tile_store.save(MACHINE, {"a": ENTRY}) == store
    tile_store.save(MACHINE, {"b": ENTRY})
    assert tile_store.load(MACHINE) == {"a": ENTRY, "b": ENTRY}
    assert store.name == "Some_GPU_80GB_-sm90-triton3.9.0.json"
    assert [path.name for path in store.parent.iterdir() if path.suffix == ".tmp"] == []


def _changed(**changes: object) -> str:
    return json.dumps(tile_store._content(MACHINE, {"a": ENTRY}) | changes)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "is not JSON"),
        ('{"format": 1, "tiles": {', "is not JSON"),
        ("\x80", "is not JSON"),
        ("[1, 2]", "is not a file of tuned tiles"),
        (_changed(tiles=[]), "is not a file of tuned tiles"),
        (_changed(format=2), "is for format 2, not 1"),
        (_changed(gpu="Another GPU"), "is for gpu 'Another GPU'"),
        (_changed(triton="2.0"), "is for triton '2.0'"),
        (_changed(kernels="0123"), "was tuned for other kernels"),
    ],
)
def test_a_useless_file_is_left_alone_with_one_warning(
    text: str, fault: str, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.parent.mkdir()
    store.write_bytes(text.encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        assert tile_store.load(MACHINE) == {}
        assert tile_store.load(MACHINE) == {}
    (record,) = caplog.records
    assert fault in record.getMessage()
    assert "run trifast-tune" in record.getMessage()
    assert store.read_bytes() == text.encode("latin-1")
    tile_store.save(MACHINE, {"b": ENTRY})
    assert tile_store.load(MACHINE) == {"b": ENTRY}


@pytest.mark.parametrize("entry", [None, {}, {"tile": 3}, {"tile": {"BLOCK_I": "64"}}, {"tile": {"BLOCK_I": True}}])
def test_an_entry_that_is_no_tile_is_dropped(entry: object, store: Path) -> None:
    store.parent.mkdir()
    store.write_text(_changed(tiles={"good": ENTRY, "bad": entry}))
    assert tile_store.load(MACHINE) == {"good": ENTRY}


def test_a_directory_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file in its place refuses root too, whom permissions do not stop."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(tile_store.DIRECTORY_VARIABLE, str(tmp_path / "file" / "tiles"))
    assert tile_store.save(MACHINE, {"a": ENTRY}) is None
    assert tile_store.save(MACHINE, {"a": ENTRY}) is None
    messages = [record.getMessage() for record in caplog.records if "cannot be written" in record.getMessage()]
    assert len(messages) == 1


def test_a_write_that_breaks_off_leaves_the_old_file(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tile_store.save(MACHINE, {"a": ENTRY})

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tile_store.save(MACHINE, {"b": ENTRY})
    assert tile_store.load(MACHINE) == {"a": ENTRY}
    assert not list(store.parent.glob(".*.tmp"))


def test_a_full_disk_costs_one_warning_and_leaves_the_old_file(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tile_store.save(MACHINE, {"a": ENTRY})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert tile_store.save(MACHINE, {"b": ENTRY}) is None
    assert tile_store.save(MACHINE, {"b": ENTRY}) is None
    (record,) = caplog.records
    assert "No space left" in record.getMessage()
    assert tile_store.load(MACHINE) == {"a": ENTRY}
    assert not list(store.parent.glob(".*.tmp"))


def test_two_processes_at_once_lose_nothing(store: Path) -> None:
    """The store alone is loaded there: torch would take longer to import than all the writing takes."""
    program = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("tile_store", sys.argv[1])
tile_store = sys.modules["tile_store"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tile_store)
machine = tile_store.Machine("Some GPU (80GB)", (9, 0), "3.9.0")
for n in range(40):
    assert tile_store.save(machine, {f"{sys.argv[2]} {n}": {"tile": {"BLOCK_I": n}}}) is not None
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(tile_store.__file__), name]) for name in ("one", "two")
    ]
    assert [writer.wait(timeout=300) for writer in writers] == [0, 0]
    assert len(tile_store.load(MACHINE)) == 80


def test_clear_removes_every_machine(store: Path) -> None:
    other = Machine("Another GPU", (8, 0), "3.9.0")
    for machine in (MACHINE, other):
        tile_store.save(machine, {"a": ENTRY})
    assert {path.name for path in tile_store.clear()} == {MACHINE.file_name, other.file_name}
    assert list(store.parent.iterdir()) == []


def test_the_hash_covers_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(tile_store.__file__).parent
    for name in ("tile_store.py", "forward.py", "logits.py", "cpu.py"):
        (tmp_path / name).write_bytes((here / name).read_bytes())
    monkeypatch.setattr(tile_store, "__file__", str(tmp_path / "tile_store.py"))

    def hash_now() -> str:
        tile_store.kernels_hash.cache_clear()
        return tile_store.kernels_hash()

    try:
        before = hash_now()
        (tmp_path / "cpu.py").write_text("")
        assert hash_now() == before
        (tmp_path / "forward.py").write_bytes((tmp_path / "forward.py").read_bytes() + b"\n")
        assert hash_now() != before
    finally:
        tile_store.kernels_hash.cache_clear()
