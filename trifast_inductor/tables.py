"""Figures as files and text: CSV with a header of comments, Markdown tables."""

from __future__ import annotations

import csv
import dataclasses
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

AnyRow = TypeVar("AnyRow")


class CsvFile:
    """Written line by line, so that what was measured survives whatever happens next."""

    def __init__(self, path: Path, header: dict[str, str], kind: type[Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="", encoding="utf-8")
        for name, value in header.items():
            self._file.write(f"# {name}: {value}\n")
        self._names = [field.name for field in dataclasses.fields(kind)]
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(self._names)
        self._file.flush()

    def add(self, row: Any) -> None:
        self._writer.writerow([_cell(getattr(row, name)) for name in self._names])
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def read_csv(path: Path, kind: type[AnyRow]) -> tuple[dict[str, str], list[AnyRow]]:
    """The header and the rows of a file that `CsvFile` wrote."""
    header: dict[str, str] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    while lines and lines[0].startswith("# "):
        name, _, value = lines.pop(0)[2:].partition(": ")
        header[name] = value
    types = typing.get_type_hints(kind)
    rows = [kind(**{n: _parsed(text, types[n]) for n, text in line.items()}) for line in csv.DictReader(lines)]
    return header, rows


def _parsed(text: str, type_: Any) -> Any:
    if type_ is str:
        return text
    if text == "":
        return None
    if type_ is bool:
        return text == "True"
    return int(text) if type_ is int else float(text)


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up as plain text."""
    table = [list(columns), *map(list, lines)]
    widths = [max(len(line[n]) for line in table) for n in range(len(columns))]
    texts = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in table]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])


def header_text(header: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in header.items())
