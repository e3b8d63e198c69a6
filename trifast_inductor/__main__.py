"""`python -m trifast_inductor COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import sys


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trifast_inductor", description="Fused triangle attention.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="a published folding trunk on two proteins: eager, inductor, trifast")
    commands.add_parser("explain", help="what would be rewritten in a model, and why not the rest", add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    command = importlib.import_module(f"trifast_inductor.{arguments.command}")
    return int(command.main(rest) if arguments.command == "explain" else command.main())


if __name__ == "__main__":
    sys.exit(main())
