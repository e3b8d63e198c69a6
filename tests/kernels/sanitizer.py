"""Launches for CUDA's compute-sanitizer: `python -m tests.kernels.sanitizer {memcheck,racecheck,initcheck,synccheck}`.

Runs the cases under the tool, several at a time, each in a process of its own with an allocation of its own for every
tensor, and exits with an error if anything was found or a case did not end. Small sizes, odd and even, every kernel and
every way to read a key term.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trifast_inductor.kernels.triangle_attention import op, tuning
from trifast_inductor.kernels.triangle_attention.hopper import choice, dbias_choice, dqkv_choice
from trifast_inductor.kernels.triangle_attention.lean import launch as lean
from trifast_inductor.options import integers
from trifast_inductor.testing import KEY_TERMS, Inputs, random_inputs, results

INSIDE = "TRIFAST_UNDER_SANITIZER"  # the number of a case, and seconds
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def cases() -> list[Callable[[], None]]:
    """Forward and backward over a grid for the portable kernels and, on a Hopper GPU, one for its own."""
    found = [
        partial(_launch, dtype, N, N + 7 * (n % 2), D, KEY_TERMS[n % len(KEY_TERMS)], n % 3 == 0, n % 5 != 0)
        for n, (dtype, N, D) in enumerate(
            itertools.product((torch.bfloat16, torch.float32), (16, 33, 64, 100), (16, 32, 128))
        )
    ]
    if torch.cuda.get_device_capability() == (9, 0):
        found += [
            partial(_launch_on_hopper, dtype, 130 + n % 3, 200 + n % 2, D, key_term)
            for n, (dtype, D, key_term) in enumerate(
                itertools.product((torch.bfloat16, torch.float16), (16, 32, 64), KEY_TERMS)
            )
        ]
    return found


def _launch_on_hopper(*case: Any) -> None:
    _let_any_size_through()
    _launch(*case)
    if (why := choice.gluon_refusal()) is not None:
        raise RuntimeError(why)


def _launch(
    dtype: torch.dtype, I: int, J: int, D: int, key_term: str, key_term_first: bool = False, has_bias: bool = True
) -> None:
    x = inputs(dtype, I, J, D, key_term, device="cuda", key_term_first=key_term_first, has_bias=has_bias)
    found = results(lambda *arguments: op.triangle_attention(*arguments)[0], x)
    torch.cuda.synchronize()
    assert all(t.isfinite().all() for t in found.values()), (dtype, I, J, D, key_term)


def inputs(dtype: torch.dtype, I: int, J: int, D: int, key_term: str, **options: Any) -> Inputs:
    """With a row without a key, which takes ways of its own, but for a fill that gives NaN."""
    x = random_inputs(B=1, R=5, I=I, J=J, H=2, D=D, dtype=dtype, key_term=key_term, **options)
    if x.key_bias is not None:
        # In float16 it would be -inf, and the row NaN.
        x = replace(x, key_bias=x.key_bias.float())
        x.key_bias[:, 1] = -1e9
    elif key_term == "mask":
        x.key_mask[:, 1] = True
    return x


def _let_any_size_through() -> None:
    """To the kernels for Hopper, plain and in Gluon, which take long sequences otherwise."""
    lean.SHORTEST = lean.SHORTEST_WITH_KEY_TERM = lean.FEWEST_LOGITS = 1
    choice._FEWEST_ITEMS = dqkv_choice._SHORTEST = dbias_choice._SHORTEST = 1
    dbias_choice._MOST_PADDED = float("inf")
    # `refusal` has it as a default.
    choice.refusal.__defaults__ = (1,)
    tuning.changed()


def main() -> int:
    if inside := os.environ.get(INSIDE):
        case, seconds = map(int, inside.split())
        faulthandler.dump_traceback_later(seconds, exit=True)
        cases()[case - 1]()
        print(_ENDED)
        return 0
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.sanitizer", description=__doc__.splitlines()[0])
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--processes", type=int, default=4, help="at a time")
    parser.add_argument("--cases", type=integers, help="their numbers, from 1; all by default")
    parser.add_argument("--seconds", type=int, default=300, help="after which a case is given up, and says where it is")
    given = parser.parse_args()
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(sanitizer):
        parser.error("compute-sanitizer is not on the path: it is part of the CUDA toolkit")
    command = [sanitizer, "--tool", given.tool, "--error-exitcode", "1", "--target-processes", "application-only"]
    if given.tool == "racecheck":
        command += ["--print-limit", "0"]
    command += [sys.executable, "-W", "ignore", "-m", "tests.kernels.sanitizer"]

    def run(case: int) -> str:
        start = time.monotonic()
        environ = {**os.environ, INSIDE: f"{case} {given.seconds}", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        state = "ended" if _ENDED in done.stdout else "did not end"
        print(f"case {case} {state} after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        return done.stdout

    with ThreadPoolExecutor(given.processes) as pool:
        reports = list(pool.map(run, given.cases or range(1, len(cases()) + 1)))
    failed = judged(given.tool, reports)
    print(f"{len(reports)} cases, forward and backward, on {torch.cuda.get_device_name()}")
    return failed


_ENDED = "results are finite"


def judged(tool: str, reports: Sequence[str]) -> int:
    """What the tool said of each case, in a few lines; 1 if it is anything of ours or one of them did not end."""
    summary = "RACECHECK SUMMARY" if tool == "racecheck" else "ERROR SUMMARY"
    ended = [text for text in reports if summary in text and _ENDED in text]
    print("\n".join(text for text in reports if text not in ended), end="")
    if tool == "racecheck":
        failed = _races("".join(ended)) > 0
    else:
        counts = [int(count) for text in ended for count in re.findall(r"ERROR SUMMARY: (\d+)", text)]
        failed = sum(counts) > 0
        print("\n".join(text for text, count in zip(ended, counts, strict=True) if count), end="")
        print(f"========= ERROR SUMMARY: {sum(counts)} errors")
    return int(failed or len(ended) < len(reports))


def _races(report: str) -> int:
    """How many racecheck found that are neither of two things that Triton's own code does, which are counted.

    It does not follow the barriers between the warps of a program and those that wait for a partition.
    """
    ours, apart = [], Counter[str]()
    for block in report.split("Race reported between ")[1:]:
        found = re.findall(r"(Read|Write) access at (\w+)\+(0x[0-9a-f]+) in \S+:(\d+)", block)
        (kind, kernel, offset, _), *others = found
        if all((kind, offset) == ("Write", other[2]) == (other[0], offset) for other in others):
            apart["threads that hold the same element write it, by one instruction"] += 1
        elif {int(each[3]) for each in found} <= _lines_of_dispatch(kernel):
            apart["warps that wait for a partition are handed its number and what it is given"] += 1
        else:
            ours.append(block.strip())
    for race in ours:
        print(race)
    for what, count in apart.items():
        print(f"{count} reports set apart: {what}")
    print(f"{len(ours)} other races")
    return len(ours)


def _lines_of_dispatch(kernel: str) -> set[int]:
    """Of a Gluon kernel: that of its name, which code gets that has no line, and the statement of `warp_specialize`."""
    for path in Path(choice.__file__).parent.glob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        if f"def {kernel}(" in lines:
            head = lines.index(f"def {kernel}(")
            dispatch = next(n for n in range(head, len(lines)) if "gl.warp_specialize(" in lines[n])
            while lines[dispatch].startswith("        "):
                dispatch -= 1
            return {head + 1, dispatch + 1}
    return set()


if __name__ == "__main__":
    sys.exit(main())
