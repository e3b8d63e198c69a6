"""Code blocks of a Markdown page: where they stand, their language, and what is said before or after them.

A fence names its language: `python`, `sh` or `text`. `text` right after a block that was run is what it prints.
`<!-- parsed only: REASON -->` on the line before a `sh` fence keeps its commands from being run; their arguments are
read all the same. In docs/benchmarks/ an indented block is `sh`, too, and parsed only: figures take hours or a GPU.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
LANGUAGES = {"python", "sh", "text"}
_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?: {4}.*\n)+", re.MULTILINE)
_NOTE = re.compile(r"<!-- parsed only: (.+?) -->\n\Z")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    parsed_only: str = ""  # why it is not run
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.page.relative_to(CHECKOUT)}:{self.line}"


def pages() -> list[Path]:
    return [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    fences = list(_FENCE.finditer(text))
    blocks = []
    for fence, following in itertools.zip_longest(fences, fences[1:]):
        note = _NOTE.search(text[: fence.start()])
        printed = following is not None and following[1] == "text" and not text[fence.end() : following.start()].strip()
        blocks.append(
            Block(
                page,
                _line(text, fence.start(2)),
                fence[1],
                fence[2],
                parsed_only=note[1] if note else "",
                output=following[2] if printed and following is not None else None,
            )
        )
    return sorted([*blocks, *_indented(page, text)], key=lambda block: block.line)


def _indented(page: Path, text: str) -> list[Block]:
    """Those between the fences, whose lines are kept for their numbers."""
    without = _FENCE.sub(lambda fence: re.sub(r"[^\n]+", "", fence[0]), text)
    return [
        Block(
            page, _line(text, found.start()), "sh", re.sub("^ {4}", "", found[0], flags=re.MULTILINE), "hours or a GPU"
        )
        for found in _INDENTED.finditer(without)
        if not re.search(r"^(?:[-*]|\d+\.) .*\n(?:  .*\n)*\n\Z", without[: found.start()], re.MULTILINE)
    ]


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
