"""Attention's results as tables, with ratios to the best peer and to the floor."""

from __future__ import annotations

from collections.abc import Sequence

from trifast_inductor.bench.measure import Row
from trifast_inductor.bench.peers import OURS
from trifast_inductor.tables import markdown

_COLUMNS = ("N", "implementation", "fwd ms", "best peer", "floor", "bwd ms", "best peer", "floor")
_MORE = ("fwd call ms", "step call ms", "fwd MiB", "step MiB", "fwd error", "bwd error", "note")


def attention_tables(rows: Sequence[Row]) -> str:
    """One Markdown table for each group; a ratio is this row's time over the best peer's, or over the floor."""
    tables = []
    for group in dict.fromkeys(row.group for row in rows):
        of_group = [row for row in rows if row.group == group]
        lines = [_attention_line(row, [r for r in of_group if r.N == row.N]) for row in of_group]
        tables.append(f"### {group}\n\n{markdown((*_COLUMNS, *_MORE), lines)}")
    return "\n\n".join(tables)


def _attention_line(row: Row, same_case: Sequence[Row]) -> list[str]:
    cells = [str(row.N), row.peer]
    for name in ("forward", "backward"):
        column = f"{name}_device_ms"
        time = getattr(row, column)
        peers = [getattr(r, column) for r in same_case if r.peer not in OURS and r.peer != row.peer]
        best = min((t for t in peers if t is not None), default=None)
        cells += [figure(time), ratio(time, best), ratio(time, getattr(row, f"{name}_floor_ms"))]
    cells += [figure(row.forward_call_ms), figure(row.step_call_ms)]
    cells += ["" if x is None else f"{x:.0f}" for x in (row.forward_mib, row.step_mib)]
    cells.append("" if row.forward_error is None else f"{row.forward_error:.1e}")
    cells.append("" if row.backward_error is None else f"{row.backward_error:.1e} {row.worst_gradient}")
    return [*cells, row.note]


def figure(value: float | None) -> str:
    """Three digits: 0.0123, 1.23, 123."""
    if value is None:
        return ""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def ratio(value: float | None, reference: float | None) -> str:
    return f"{value / reference:.2f}" if value is not None and reference else ""
