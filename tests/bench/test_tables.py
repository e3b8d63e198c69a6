"""Ratios, and the tables that people read."""

from tests.bench.conftest import small
from trifast_inductor.bench import tables
from trifast_inductor.bench.measure import row

ROWS = [
    row(small(), "ours", forward_device_ms=0.5, backward_device_ms=2.0, forward_floor_ms=0.25, forward_error=1e-3),
    row(small(), "eager", forward_device_ms=2.0, note="out of memory"),
    row(small(), "flex", forward_device_ms=1.0, backward_device_ms=8.0),
]


def test_ratios_are_to_the_best_other_peer_and_to_the_floor() -> None:
    table = tables.attention_tables(ROWS)
    ours, eager, flex = (line.split("|") for line in table.splitlines()[-3:])
    assert [cell.strip() for cell in ours[3:9]] == ["0.5", "0.50", "2.00", "2", "0.25", ""]
    assert [cell.strip() for cell in eager[3:7]] == ["2", "2.00", "", ""]
    assert eager[-2].strip() == "out of memory"
    assert [cell.strip() for cell in flex[3:5]] == ["1", "0.50"]  # the best peer's ratio is to the next best


def test_each_group_has_a_table() -> None:
    table = tables.attention_tables([*ROWS, row(small(layout="model"), "ours")])
    assert table.count("### ") == 2


def test_figures_have_three_digits() -> None:
    assert [tables.figure(x) for x in (0.012345, 1.2345, 123.45, 12345.0, None)] == [
        "0.0123",
        "1.23",
        "123",
        "12345",
        "",
    ]
