"""Launches for CUDA's compute-sanitizer: `python -m tests.kernels.sanitizer {memcheck,racecheck,initcheck,synccheck}`.

Runs itself under the tool, with an allocation of its own for every tensor, and exits with the tool's error. Small
sizes, odd and even, every kernel and every way to read a key term; a few minutes in all.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trifast_inductor.kernels.triangle_attention import op, tuning
from trifast_inductor.kernels.triangle_attention.hopper import choice, dbias_choice, dqkv_choice
from trifast_inductor.kernels.triangle_attention.lean import launch as lean
from trifast_inductor.testing import KEY_TERMS, Inputs, random_inputs, results

INSIDE = "TRIFAST_UNDER_SANITIZER"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def launches() -> int:
    """Forward and backward over a grid for the portable kernels and, on a Hopper GPU, one for its own; how many."""
    count = 0
    for dtype, N, D in itertools.product((torch.bfloat16, torch.float32), (16, 33, 64, 100), (16, 32, 128)):
        key_term = KEY_TERMS[count % len(KEY_TERMS)]
        _launch(dtype, N, N + 7 * (count % 2), D, key_term, key_term_first=count % 3 == 0, has_bias=count % 5 != 0)
        count += 1
    if torch.cuda.get_device_capability() != (9, 0):
        return count
    _let_any_size_through()
    for dtype, D, key_term in itertools.product((torch.bfloat16, torch.float16), (16, 32, 64), KEY_TERMS):
        _launch(dtype, 130 + count % 3, 200 + count % 2, D, key_term)
        count += 1
    if (why := choice.gluon_refusal()) is not None:
        raise RuntimeError(why)
    return count


def _launch(dtype: torch.dtype, I: int, J: int, D: int, key_term: str, **options: Any) -> None:
    x = inputs(dtype, I, J, D, key_term, device="cuda", **options)
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
    if os.environ.get(INSIDE):
        print(f"{launches()} cases, forward and backward, on {torch.cuda.get_device_name()}")
        return 0
    tool = sys.argv[1] if len(sys.argv) == 2 else ""
    if tool not in TOOLS:
        print(f"usage: python -m tests.kernels.sanitizer {{{','.join(TOOLS)}}}", file=sys.stderr)
        return 2
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(sanitizer):
        print("compute-sanitizer is not on the path: it is part of the CUDA toolkit", file=sys.stderr)
        return 2
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1", "--target-processes", "application-only"]
    environ = {**os.environ, INSIDE: "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if tool == "racecheck":
        command += ["--print-limit", "0"]
    done = subprocess.run(
        [*command, sys.executable, "-W", "ignore", "-m", "tests.kernels.sanitizer"],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if tool != "racecheck" or "RACECHECK SUMMARY" not in done.stdout:
        print(done.stdout)
        return done.returncode
    return _judged(done.stdout)


def _judged(report: str) -> int:
    """1 if racecheck found what is neither of two things that Triton's own code does, which are counted.

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
    print("\n".join(ours))
    print(next(line for line in report.splitlines() if "cases, forward and backward" in line))
    for what, count in apart.items():
        print(f"{count} reports set apart: {what}")
    print(f"{len(ours)} other races")
    return int(bool(ours))


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
