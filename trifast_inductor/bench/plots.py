"""Runtime and memory against N, forward and backward, log axes, as PNG."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trifast_inductor.bench.measure import Row
from trifast_inductor.bench.peers import OURS
from trifast_inductor.errors import MissingPackageError

_PANELS = (
    ("forward_device_ms", "forward, ms", "forward_floor_ms"),
    ("backward_device_ms", "backward, ms", "backward_floor_ms"),
    ("forward_mib", "forward, peak MiB", None),
    ("step_mib", "forward and backward, peak MiB", None),
)


def plot(rows: Sequence[Row], directory: Path, device: str) -> list[Path]:
    """One file for each group of cases, named after it."""
    pyplot = _pyplot()
    paths = []
    for group in dict.fromkeys(row.group for row in rows):
        of_group = [row for row in rows if row.group == group]
        figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), sharex=True, layout="constrained")
        for panel, (column, title, floor) in zip(axes.flat, _PANELS, strict=True):
            _draw(panel, of_group, column, floor)
            panel.set_title(title)
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=9, fontsize="small")
        figure.suptitle(f"triangle attention, {group}\n{device}", fontsize="medium")
        paths.append(directory / f"{group}.png")
        figure.savefig(paths[-1], dpi=110)
        pyplot.close(figure)
    return paths


def _draw(panel: Any, rows: Sequence[Row], column: str, floor: str | None) -> None:
    for peer in dict.fromkeys(row.peer for row in rows):
        points = [(row.N, getattr(row, column)) for row in rows if row.peer == peer]
        points = [(n, value) for n, value in points if value is not None]
        if points:
            ours = peer in OURS
            width, above = (2.5, 3) if ours else (1.2, 2)
            style = "--" if ours and peer != "ours" else "-"  # two that often coincide
            panel.plot(
                *zip(*points, strict=True),
                style,
                marker="o",
                markersize=3,
                linewidth=width,
                zorder=above,
                label=peer,
            )
    if floor is not None:
        bounds = {row.N: getattr(row, floor) for row in rows if getattr(row, floor) is not None}
        if bounds:
            panel.plot(list(bounds), list(bounds.values()), "k:", linewidth=1, label="floor")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    lengths = sorted({row.N for row in rows})
    panel.set_xticks(lengths, [str(N) for N in lengths])
    panel.set_xlabel("N")
    panel.grid(visible=True, which="both", alpha=0.25)


def _pyplot() -> Any:
    try:
        importlib.import_module("matplotlib").use("Agg")
    except ImportError as error:
        raise MissingPackageError("plots need matplotlib: pip install 'trifast_inductor[bench]'") from error
    return importlib.import_module("matplotlib.pyplot")
