"""Code blocks of a Markdown page: where they stand, their language, and what is said before or after them.

A fence names its language: `python`, `sh` or `text`. `text` right after a block that was run is what it prints.
`<!-- parsed only: REASON -->` on the line before a `sh` fence keeps its commands from being run; their arguments are
read all the same. In docs/benchmarks/ an indented block is `sh`, too, and parsed only: figures take hours or a GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

CHECKOUT = Path(__file__).parents[2]
LANGUAGES = {"python", "sh", "text"}
_NOTE = re.compile(r"<!-- parsed only: (.+?) -->\n")


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
    """Those of a page in order, as CommonMark has them: what goes on with an item of a list is no block of its own."""
    tokens = [token for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")) if token.map]
    blocks = []
    for before, token, after in zip([None, *tokens], tokens, [*tokens[1:], None], strict=False):
        first, _ = token.map
        if token.type == "fence":
            note = before and _NOTE.fullmatch(before.content)
            printed = after is not None and after.type == "fence" and after.info == "text"
            reason = note[1] if note else ""
            output = after.content if printed else None
            blocks.append(Block(page, first + 2, token.info, token.content, reason, output))
        elif token.type == "code_block":
            blocks.append(Block(page, first + 1, "sh", token.content, "hours or a GPU"))
    return blocks
