"""The command line of `python -m trifast_inductor bench`."""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from trifast_inductor import progress
from trifast_inductor.bench import environment, module_command, plots, tables
from trifast_inductor.bench.accuracy import Exact, exact_fits
from trifast_inductor.bench.case import DTYPES, LAYOUTS, MASKS, Case
from trifast_inductor.bench.measure import Row, compile_only, measure, row
from trifast_inductor.bench.modules import MODELS
from trifast_inductor.bench.peers import PEERS
from trifast_inductor.bench.prepare import compile_ahead
from trifast_inductor.bench.timing import Clock
from trifast_inductor.errors import MissingPackageError
from trifast_inductor.options import integers, names
from trifast_inductor.tables import CsvFile, header_text, read_csv

_LENGTHS = {"cuda": [64, 128, 256, 384, 512, 768, 1024, 1536, 2048], "cpu": [32, 64]}
_QUICK = {"cuda": [128, 512], "cpu": [16]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the grid; 0 unless one of our own implementations failed, 2 where something is missing."""
    arguments = _parser().parse_args(argv)
    options = list(sys.argv[2:] if argv is None else argv)
    command = shlex.join(["python", "-m", "trifast_inductor", "bench", *options])
    warnings.filterwarnings("ignore")  # the peers' own, of which there are many
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    directory = arguments.out or Path("docs/benchmarks") / environment.directory_name(device)
    try:
        if arguments.from_csv is not None:
            _present(arguments.from_csv, directory, plot=True)
            return 0
        arguments.n = arguments.n or lengths(arguments, device)
        if arguments.compile_only:
            return module_command.compile_only(arguments, device) if arguments.module else _compile(arguments, device)
        if arguments.prepare:
            compile_ahead(options, _parts(arguments), device)
        header = environment.describe(device, command, arguments.commit)
        if arguments.module:
            return module_command.run(arguments, device, header, directory)
        return _run(arguments, device, header, directory)
    except MissingPackageError as error:
        print(error, file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace, device: torch.device, header: dict[str, str], directory: Path) -> int:
    print(header_text(header), flush=True)
    peers = []
    for name in arguments.peers:
        reason = PEERS[name].absent(device)
        if reason is None:
            peers.append(PEERS[name])
        else:
            print(f"- left out: {name}: {reason}")
    clock = Clock(device, 0.05 if arguments.quick else arguments.seconds)
    deadline = time.monotonic() + arguments.budget
    rows: list[Row] = []
    path = directory / f"{arguments.name}.csv"
    file = CsvFile(path, header, Row)
    for case in cases(arguments):
        exact = Exact(case, device) if arguments.errors and exact_fits(case, device) else None
        for peer in peers:
            if time.monotonic() > deadline:
                rows.append(row(case, peer.name, note="not run: the time budget is spent"))
            else:
                progress.show(f"{row(case, peer.name).group} N={case.N} {peer.name}")
                rows.append(measure(case, peer, device, clock, exact))
            file.add(rows[-1])
    file.close()
    progress.show("")
    _present(path, directory, plot=arguments.plot)
    return int(any(r.note.startswith("error") for r in rows if r.peer.startswith("ours")))


def _compile(arguments: argparse.Namespace, device: torch.device) -> int:
    for case, name in itertools.product(cases(arguments), arguments.peers):
        peer = PEERS[name]
        if peer.backend is not None and peer.absent(device) is None:
            compile_only(case, peer, device)
    return 0


def _parts(arguments: argparse.Namespace) -> list[list[str]]:
    """Of the grid, about as long to compile, that of the longest N first: the others would wait for it."""
    each = [["--n", str(N)] for N in sorted(arguments.n, reverse=True)]
    if not arguments.module:
        return each
    grid = itertools.product(each, arguments.models, arguments.variants)
    return [[*n, "--models", model, "--variants", variant] for n, model, variant in grid]


def lengths(arguments: argparse.Namespace, device: torch.device) -> list[int]:
    """What N ranges over where `--n` does not say."""
    if arguments.module:
        return (module_command.QUICK if arguments.quick else module_command.LENGTHS)[device.type]
    return (_QUICK if arguments.quick else _LENGTHS)[device.type]


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """The grid, N innermost and growing."""
    others = itertools.product(arguments.b, arguments.h, arguments.d, arguments.dtype, arguments.mask, arguments.layout)
    for (B, H, D, dtype, mask, layout), N in itertools.product(others, sorted(arguments.n)):
        yield Case(N=N, D=D, H=H, B=B, dtype=DTYPES[dtype], mask=mask, layout=layout)


def _present(source: Path, directory: Path, *, plot: bool) -> None:
    """Tables and plots from a file of results: what it holds is rounded, and nothing else is shown anywhere."""
    header, rows = read_csv(source, Row)
    text = tables.attention_tables(rows)
    print(f"\n{text}\n")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{source.stem}.md"
    path.write_text(f"{header_text(header)}\n\n{text}\n", encoding="utf-8")
    print(f"wrote {path}")
    if plot:
        for picture in plots.plot(rows, directory, header.get("device", "")):
            print(f"wrote {picture}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trifast_inductor bench",
        description="Time triangle attention beside its peers; lists take commas.",
    )
    add = parser.add_argument
    add("--n", type=integers, help="residues; 64 to 2048 by default, 32,64 on a CPU")
    add("--d", type=integers, default=[32], help="head size")
    add("--h", type=integers, default=[4], help="heads")
    add("--b", type=integers, default=[1], help="batch")
    add("--dtype", type=names(list(DTYPES)), default=["bfloat16"], help=f"{', '.join(DTYPES)} or all")
    add("--mask", type=names(MASKS), default=["padding"], help=f"keys left out: {', '.join(MASKS)} or all")
    add("--layout", type=names(LAYOUTS), default=["friendly"], help="friendly, model or all")
    add("--peers", type=names(list(PEERS)), default=list(PEERS), help=f"{', '.join(PEERS)} or all")
    add("--quick", action="store_true", help="two sizes and short clocks: does it work?")
    add("--seconds", type=float, default=0.25, help="time for each figure once warm")
    add("--budget", type=float, default=3600.0, help="seconds after which no further figure is begun")
    add("--prepare", action="store_true", help="compile first, all N at once in processes of their own")
    add("--compile-only", action="store_true", help=argparse.SUPPRESS)  # what those processes do
    add("--no-errors", dest="errors", action="store_false", help="do not compare with float64")
    add("--device", choices=["cuda", "cpu"], help="cuda where there is one")
    add("--out", type=Path, help="directory of results; docs/benchmarks/<device> by default")
    add("--name", default="attention", help="of the files of results")
    add("--commit", help="written into the header; asked from git by default")
    add("--plot", action="store_true", help="draw runtime and memory against N (needs matplotlib)")
    add("--from-csv", type=Path, metavar="FILE", help="measure nothing; tables and plots from a file of results")
    modules = parser.add_argument_group("whole modules instead of the op alone")
    modules.add_argument(
        "--module", action="store_true", help="a triangle attention module and a Pairformer-like block"
    )
    models, variants = list(MODELS), list(module_command.VARIANTS)
    modules.add_argument("--models", type=names(models), default=models, help=", ".join(models))
    modules.add_argument("--variants", type=names(variants), default=variants, help=", ".join(variants))
    modules.add_argument("--kernels", type=int, metavar="N", help="list what each module launches at this N, in order")
    return parser
