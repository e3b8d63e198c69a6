"""CSV there and back, Markdown that lines up."""

from dataclasses import dataclass
from pathlib import Path

from trifast_inductor import tables


@dataclass(frozen=True)
class Row:
    name: str
    N: int
    mask: bool
    ms: float | None
    note: str = ""


ROWS = [Row("a, b", 64, True, 0.5), Row("c", 2**40, False, None, note='says "no"')]


def test_csv_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.csv"
    file = tables.CsvFile(path, {"device": "a GPU: fast", "commit": "abc"}, Row)
    for line in ROWS:
        file.add(line)
    file.close()
    header, rows = tables.read_csv(path, Row)
    assert header == {"device": "a GPU: fast", "commit": "abc"}
    assert rows == ROWS


def test_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    file = tables.CsvFile(tmp_path / "x.csv", {}, Row)
    file.add(ROWS[0])
    assert tables.read_csv(tmp_path / "x.csv", Row)[1] == ROWS[:1]
    file.close()


def test_markdown_lines_up() -> None:
    assert tables.markdown(("N", "ms"), [("64", "0.125")]) == "| N  | ms    |\n|----|-------|\n| 64 | 0.125 |"
