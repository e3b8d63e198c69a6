"""Launches for CUDA's compute-sanitizer: `python -m tests.kernels.sanitizer {memcheck,racecheck,initcheck,synccheck}`.

Runs the cases under the tool, with an allocation of its own for every tensor, and exits with an error if anything was
found or a case did not end. Small sizes, odd and even, every kernel and every way to read a key term; a few minutes.
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
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trifast_inductor.kernels.triangle_attention import backward, op, tuning
from trifast_inductor.kernels.triangle_attention.hopper import (
    choice,
    dbias_choice,
    dqkv_choice,
    whole_choice,
    whole_forward_choice,
)
from trifast_inductor.kernels.triangle_attention.lean import launch as lean
from trifast_inductor.kernels.triangle_attention.portable import whole
from trifast_inductor.options import integers
from trifast_inductor.testing import KEY_TERMS, Inputs, random_inputs, results

INSIDE = "TRIFAST_UNDER_SANITIZER"  # seconds for each case, and their numbers
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
        lengths = ((33, 40, 32), (100, 70, 16), (128, 128, 32), (128, 192, 32), (140, 150, 16))
        found += [
            partial(_launch_in_one_pass, dtype, *sizes, key_term)
            for dtype, sizes, key_term in itertools.product((torch.bfloat16, torch.float16), lengths, KEY_TERMS)
        ]
        found += [
            partial(_launch_on_hopper, dtype, 130 + n % 3, 200 + n % 2, D, key_term)
            for n, (dtype, D, key_term) in enumerate(
                itertools.product((torch.bfloat16, torch.float16), (16, 32, 64), KEY_TERMS)
            )
        ]
    return found


def _launch_in_one_pass(*case: Any) -> None:
    whole_forward_choice._FEWEST_ROWS = {2: 1, 3: 1}
    backward._plans.clear()
    _launch(*case)
    if all(plan.elsewhere is None for plan in backward._plans.values()):
        raise RuntimeError(f"other kernels served {case}")


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
    whole.LONGEST = whole_choice.LONGEST = whole_forward_choice.LONGEST = 0
    lean.FEWEST_LOGITS, lean.MOST_PADDED = 1, float("inf")
    choice._FEWEST_ITEMS = dbias_choice._FEWEST_LOGITS = dbias_choice._SHORTEST = 1
    dqkv_choice.SHORTEST = dict.fromkeys(dqkv_choice.SHORTEST, 1)
    # `refusal` has it as a default.
    choice.refusal.__defaults__ = (1,)
    tuning.changed()


def main() -> int:
    if inside := os.environ.get(INSIDE):
        seconds, *numbers = map(int, inside.split())
        known = cases()
        for number in numbers:
            faulthandler.dump_traceback_later(seconds, exit=True)
            known[number - 1]()
            print(f"case {number} ended", flush=True)
        faulthandler.cancel_dump_traceback_later()
        print(f"{len(numbers)} {_ENDED} on {torch.cuda.get_device_name()}")
        return 0
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.sanitizer", description=__doc__.splitlines()[0])
    parser.add_argument("tool", choices=TOOLS)
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
    numbers = given.cases or range(1, len(cases()) + 1)
    environ = {
        **os.environ,
        INSIDE: " ".join(map(str, (given.seconds, *numbers))),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    report = []
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            report.append(line)
            if line.startswith("case "):
                print(line, end="", file=sys.stderr)
    return judged(given.tool, "".join(report))


_ENDED = "cases, forward and backward,"


def judged(tool: str, report: str) -> int:
    """What the tool said, in a few lines; 1 if it is anything of ours or a case did not end."""
    summary = "RACECHECK SUMMARY" if tool == "racecheck" else "ERROR SUMMARY"
    if _ENDED not in report or summary not in report:
        print(report)
        return 1
    print(next(line for line in report.splitlines() if _ENDED in line))
    if tool == "racecheck":
        return int(_races(report) > 0)
    found = next(line for line in report.splitlines() if summary in line)
    if clean := found.endswith(" 0 errors"):
        print(found)
    else:
        print(report)
    return int(not clean)


def _races(report: str) -> int:
    """How many racecheck found that are none of three things, which are counted; Triton's own code does the first two.

    It does not follow the barriers between the warps of a program and those that wait for a partition, nor a barrier at
    which one thread arrives for the others of its partition, once they have met: lines that say "handed over".
    """
    ours, apart = [], Counter[str]()
    for block in report.split("Race reported between ")[1:]:
        found = re.findall(r"(Read|Write) access at (\w+)\+(0x[0-9a-f]+) in (\S+):(\d+)", block)
        (kind, kernel, offset, *_), *others = found
        if all((kind, offset) == ("Write", other[2]) == (other[0], offset) for other in others):
            apart["threads that hold the same element write it, by one instruction"] += 1
        elif {int(each[4]) for each in found} <= _lines_of_dispatch(kernel):
            apart["warps that wait for a partition are handed its number and what it is given"] += 1
        elif {(each[3], int(each[4])) for each in found} <= _places_handed_over():
            apart["a partition hands over what it has stored: one thread arrives for those it has met"] += 1
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


def _places_handed_over() -> set[tuple[str, int]]:
    """Files and lines of Gluon kernels that say so."""
    return {
        (path.name, n)
        for path in Path(choice.__file__).parent.glob("*.py")
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if "# handed over by " in line
    }


if __name__ == "__main__":
    sys.exit(main())
