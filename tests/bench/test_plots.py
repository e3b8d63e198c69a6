"""Plots: files that are images; a clear word where matplotlib is missing."""

import sys
from pathlib import Path

import pytest

from tests.bench.conftest import small
from trifast_inductor.bench import plots
from trifast_inductor.bench.measure import row
from trifast_inductor.errors import MissingPackageError

ROWS = [row(small(N=N), "ours", forward_device_ms=N / 10, forward_floor_ms=N / 20, step_mib=2.0 * N) for N in (8, 16)]


def test_one_png_for_each_group(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = plots.plot([*ROWS, row(small(mask="none"), "eager")], tmp_path, "a GPU")
    assert [path.name for path in paths] == [
        "B2-H2-D8-float32-padding-friendly.png",
        "B2-H2-D8-float32-none-friendly.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_without_matplotlib_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'trifast_inductor\[bench\]'"):
        plots.plot(ROWS, tmp_path, "a GPU")
