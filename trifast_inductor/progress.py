"""One line on a terminal that says what is being done, written over by the next."""

from __future__ import annotations

import sys


def show(text: str, *, in_logs: bool = False) -> None:
    """An empty text clears the line. Where standard error is no terminal: a line each if `in_logs`, or nothing."""
    if sys.stderr.isatty():
        print(f"\r{text:100}", end="" if text else "\r", file=sys.stderr, flush=True)
    elif in_logs and text:
        print(text, file=sys.stderr, flush=True)
