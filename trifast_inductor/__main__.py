"""`python -m trifast_inductor COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import sys


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trifast_inductor", description="Fused triangle attention.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="a published folding trunk on two proteins: eager, inductor, trifast")
    arguments = parser.parse_args(argv)
    command = importlib.import_module(f"trifast_inductor.{arguments.command}")
    return int(command.main())


if __name__ == "__main__":
    sys.exit(main())
