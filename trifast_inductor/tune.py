"""`trifast-tune`, or `python -m trifast_inductor tune`: search the fastest tiles of this machine's GPU and keep them.

Shapes that are stored already are left alone, unless TRIFAST_FORCE_TUNE=1. Each winner is stored as soon as it is
found, so an interrupted run loses nothing, and several may run at once.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from trifast_inductor import progress
from trifast_inductor.kernels.triangle_attention import tile_store, tuning
from trifast_inductor.kernels.triangle_attention.tuning import Key
from trifast_inductor.options import integers, names

DTYPES = ("bfloat16", "float16", "float32")
_BAR = 24


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 where there is no GPU."""
    arguments = _parser().parse_args(argv)
    if arguments.clear:
        removed = tile_store.clear()
        print("\n".join(f"removed {path}" for path in removed) or f"nothing to remove in {tile_store.directory()}")
        return 0
    if arguments.show:
        _show()
        return 0
    if not torch.cuda.is_available():
        print(
            "trifast-tune needs a CUDA GPU, and torch sees none: run it on the machine that is to be tuned. "
            "Without it the shipped tiles are used.",
            file=sys.stderr,
        )
        return 2
    if arguments.tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    return _tune(list(keys(arguments)), torch.cuda.current_device(), arguments.all_kernels)


def keys(arguments: argparse.Namespace) -> Iterator[Key]:
    """Every kernel at every power of two from --min-n, rounded up, to --max-n."""
    from trifast_inductor.kernels.triangle_attention.arguments import dot_precision

    lengths = [1 << power for power in range(20) if arguments.min_n <= 1 << power <= arguments.max_n]
    masks = {"on": (True,), "off": (False,), "both": (True, False)}[arguments.mask]
    grid = itertools.product(arguments.dtype, arguments.d, arguments.h, masks, lengths, tuning.KERNELS)
    for name, D, H, mask, N, kernel in grid:
        dtype = getattr(torch, name)
        yield tuning.make_key(kernel, dtype, dot_precision(dtype, D), D, H, N, mask, bias=True)


def _tune(wanted: list[Key], device: int, all_kernels: bool) -> int:
    from trifast_inductor.kernels.triangle_attention import tile_search

    machine = tuning.machine_of(device)
    if not all_kernels:
        serving = [key for key in wanted if tile_search.serves(device, key)]
        if fixed := len(wanted) - len(serving):
            print(f"{fixed} of {len(wanted)} shapes go to kernels for Hopper, whose tiles are fixed")
        wanted = serving
    stored = {} if tuning.FORCED else tuning.load(machine)
    todo = [key for key in wanted if key not in stored]
    print(f"{machine.gpu}: {len(todo)} of {len(wanted)} shapes to tune, {len(wanted) - len(todo)} stored already")
    outcomes: list[tile_search.Outcome] = []
    failed: list[str] = []
    start = time.monotonic()
    for done, key in enumerate(todo):
        progress.show(f"{_bar(done, len(todo))} {key}", in_logs=True)
        try:
            outcome = tile_search.search(device, key)
        except Exception as error:  # one shape that does not fit must not end the others
            failed.append(f"{key}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            tuning.use(device, key, None)
            continue
        tile_store.save(machine, {str(key): outcome.entry})
        outcomes.append(outcome)
    progress.show(_bar(len(todo), len(todo)), in_logs=True)
    progress.show("")
    changed = [outcome for outcome in outcomes if outcome.changed]
    for outcome in changed:
        print(outcome)
    kept = len(outcomes) - len(changed)
    print(f"{len(changed)} tiles changed, {kept} kept, {len(failed)} failed, {time.monotonic() - start:.0f} s")
    for line in failed:
        print(f"failed: {line}")
    print(f"stored in {tile_store.directory() / machine.file_name}")
    return 0


def _show() -> None:
    """Every file of tuned tiles, also those of other machines."""
    files = sorted(tile_store.directory().glob("*.json"))
    if not files:
        print(f"nothing is tuned: no files in {tile_store.directory()}")
    for path in files:
        print(path)
        for key, entry in sorted(tile_store.read_entries(path).items()):
            sizes = " ".join(f"{name}={size}" for name, size in entry["tile"].items())
            print(f"  {key}: {sizes}, {entry.get('heuristic_ms')} -> {entry.get('ms')} ms")


def _bar(done: int, total: int) -> str:
    filled = _BAR * done // max(total, 1)
    return f"[{'#' * filled}{'.' * (_BAR - filled)}] {done}/{total}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trifast-tune", description=__doc__)
    parser.add_argument("--min-n", type=int, default=16, help="shortest axis, 16 by default")
    parser.add_argument("--max-n", type=int, default=1024, help="longest axis, 1024 by default")
    parser.add_argument("--dtype", type=names(DTYPES), default=["bfloat16"], help="bfloat16, float16, float32, or all")
    parser.add_argument("--h", type=integers, default=[4], help="heads, 4 by default; commas between several")
    parser.add_argument("--d", type=integers, default=[32], help="head size, 32 by default; commas between several")
    parser.add_argument("--mask", choices=("on", "off", "both"), default="on", help="tune with masked keys or without")
    parser.add_argument("--tf32", action="store_true", help="tune float32 for tf32 products")
    parser.add_argument(
        "--all-kernels", action="store_true", help="also kernels that only calls with a bias of another dtype take"
    )
    parser.add_argument("--show", action="store_true", help="list what is stored, tune nothing")
    parser.add_argument("--clear", action="store_true", help="remove what is stored, tune nothing")
    return parser
