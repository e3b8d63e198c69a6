"""Lists on command lines: `--n 64,128`, `--dtype bfloat16,float32`, `--dtype all`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence


def integers(text: str) -> list[int]:
    """Positive integers with commas between."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected positive integers with commas between, got {text!r}")
    return [int(part) for part in parts]


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Some of these with commas between, or all."""

    def parse(text: str) -> list[str]:
        parts = list(known) if text == "all" else text.split(",")
        wrong = [part for part in parts if part not in known]
        if wrong:
            raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: known are {', '.join(known)}, and all")
        return parts

    return parse
