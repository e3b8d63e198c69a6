"""`python -m trifast_inductor COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": ("trifast_inductor.demo", "a published folding trunk on two proteins: eager, inductor, trifast"),
    "explain": ("trifast_inductor.explain", "report on every softmax of a model: rewritten or declined, and why"),
    "bench": ("trifast_inductor.bench", "time triangle attention, or whole modules, beside their peers"),
    "inspect": ("trifast_inductor.static", "registers, spills and instructions of each kernel, without a GPU"),
    "tune": ("trifast_inductor.tune", "search the fastest tiles of this machine's GPU and keep them"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the rest of the command line to a command's own `main`; its exit status."""
    width = max(map(len, COMMANDS)) + 2
    listing = "\n".join(f"  {name:{width}}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m trifast_inductor",
        description="Fused triangle attention.",
        epilog=f"commands:\n{listing}\n\nCOMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parsed = parser.parse_args(argv)
    module = importlib.import_module(COMMANDS[parsed.command][0])
    return int(module.main(parsed.arguments))


if __name__ == "__main__":
    sys.exit(main())
