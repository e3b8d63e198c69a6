"""The kernels' small cases on the CPU, in processes of their own: Triton reads TRITON_INTERPRET once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton")


def _version(module: object) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


# About as many tests as each file has: a process that collects nothing must not pass. What takes longest comes first.
FILES = {
    "backward": 50,
    "hopper_dqkv_passes": 30,
    "lean_backward": 35,
    "forward": 50,
    "hopper_again": 30,
    "budget": 30,
    "masked_rows": 20,
    "launching": 6,
    "hopper_dbias_passes": 20,
    "hopper_choice": 10,
}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is such a process already")
@pytest.mark.skipif(
    _version(triton) < (3, 7) and _version(numpy) >= (2, 4),
    reason="the interpreter of triton 3.6 fails with numpy 2.4: only 0-dimensional arrays can be converted",
)
@pytest.mark.parametrize("file", FILES)
def test_under_the_interpreter(file: str) -> None:
    here = Path(__file__).parent
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # tensors too small to share
    options = ["-m", "not gpu", "-k", "not on_the_cpu", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(here / f"test_{file}.py")],
        cwd=here.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", **threads},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed, run.stdout
    assert int(passed[1]) >= FILES[file], run.stdout
    assert "skipped" not in run.stdout, run.stdout
