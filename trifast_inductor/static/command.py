"""The command line of `python -m trifast_inductor inspect`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from trifast_inductor import progress
from trifast_inductor.options import integers, names
from trifast_inductor.static.checked import SPILLING, checked_variants
from trifast_inductor.static.figures import DTYPES, KEY_TERMS, Figures, Variant, figures, triton_version
from trifast_inductor.static.targets import TARGETS
from trifast_inductor.tables import CsvFile, markdown, read_csv

_COLUMNS = ("arch", "kernel", "dtype", "D", "N", "key term", "bias", "tile")
_FIGURES = ("registers", "stack", "spills", "shared KiB", "instructions/score", "")


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 where a kernel that may not spills, or does not fit the shared memory; 2 where none can be compiled."""
    arguments = _parser().parse_args(argv)
    obstacle = _obstacle()
    if obstacle is not None:
        print(obstacle, file=sys.stderr)
        return 2
    wanted = checked_variants() if arguments.update else _grid(arguments)
    rows: list[Figures] = []
    for variant, arch in wanted:
        progress.show(f"{arch} {variant}")
        rows += figures(variant, arch)
    progress.show("")
    print(table(rows))
    if arguments.update:
        _update(arguments.update, rows)
    return int(any((row.spills and row.kernel not in SPILLING) or not row.fits for row in rows))


def table(rows: Sequence[Figures]) -> str:
    lines = [
        [
            row.arch,
            row.kernel,
            row.dtype,
            str(row.D),
            str(row.N),
            row.key_term,
            "yes" if row.bias else "no",
            row.tile,
            str(row.registers),
            str(row.stack_bytes),
            str(row.spills),
            f"{row.shared_kib:g}",
            "" if row.instructions_per_score is None else f"{row.instructions_per_score:.1f}",
            " ".join(["spills"] * bool(row.spills) + ["does not fit"] * (not row.fits)),
        ]
        for row in rows
    ]
    return markdown((*_COLUMNS, *_FIGURES), lines)


def _obstacle() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "inspect compiles with Triton, which is not installed: pip install triton (on Linux)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "under TRITON_INTERPRET=1 kernels are interpreted, not compiled: unset it"
    return None


def _update(path: Path, rows: Sequence[Figures]) -> None:
    """Replace the rows of this Triton version; those of others stay."""
    others = read_csv(path, Figures)[1] if path.exists() else []
    others = [row for row in others if row.triton != triton_version()]
    about = {"command": f"python -m trifast_inductor inspect --update {path.as_posix()}"}
    file = CsvFile(path, about, Figures)
    for row in sorted([*others, *rows], key=lambda row: [str(getattr(row, f.name)) for f in dataclasses.fields(row)]):
        file.add(row)
    file.close()


def _grid(arguments: argparse.Namespace) -> Iterator[tuple[Variant, str]]:
    biases = {"yes": (True,), "no": (False,), "both": (True, False)}[arguments.bias]
    axes = (arguments.arch, arguments.dtype, arguments.d, arguments.key_term, biases, arguments.n)
    for arch, dtype, D, key_term, bias, N in itertools.product(*axes):
        yield Variant(dtype, D, key_term, bias, N), arch


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trifast_inductor inspect",
        description="Compile the kernels without a GPU and count; lists take commas.",
    )
    add = parser.add_argument
    add(
        "--arch",
        type=names(list(TARGETS)),
        default=["sm_90"],
        help=f"{', '.join(TARGETS)} or all; sm_90 by default",
    )
    add("--dtype", type=names(list(DTYPES)), default=["bfloat16"], help=f"{', '.join(DTYPES)}, or all")
    add("--d", type=integers, default=[32], help="head size")
    add("--n", type=integers, default=[512], help="length of all axes")
    add("--key-term", type=names(KEY_TERMS), default=["add"], help=f"{', '.join(KEY_TERMS)}, or all")
    add("--bias", choices=("yes", "no", "both"), default="yes")
    add("--update", type=Path, metavar="FILE", help="compile the checked selection and write it to a table")
    return parser
