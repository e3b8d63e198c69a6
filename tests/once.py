"""What costs enough that the workers of one run of the tests share it."""

import json
import os
from collections.abc import Callable
from typing import TypeVar

import pytest
from filelock import FileLock

T = TypeVar("T")


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[], T]) -> T:
    """What the first worker that asks has made, by way of a file of JSON; the others wait for it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of the run
    file = folder / f"{name}.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            file.write_text(json.dumps(make()), encoding="utf-8")
        made: T = json.loads(file.read_text(encoding="utf-8"))
    return made
