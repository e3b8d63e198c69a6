"""Two processes on the CPU: DistributedDataParallel, whose graphs Dynamo splits by buckets, and FSDP2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each process found; both wrappers in one start, since starting is what takes long."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-W", "ignore", "-m", "tests.graphs.two_processes"]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], cwd=CHECKOUT, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=500)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["data_parallel", "sharded"])
def test_agrees_with_eager_on_both_processes(found, wrapper):
    for process in found:
        assert process[wrapper]["trifast"] == {"rewritten": 2}
        assert process[wrapper]["difference"] < 1e-4
