"""A small case that a CPU takes milliseconds for."""

import pytest
import torch

from trifast_inductor.bench.case import Case

CPU = torch.device("cpu")


def small(**changes: object) -> Case:
    sizes = {"N": 6, "D": 8, "H": 2, "B": 2, "dtype": torch.float32, "mask": "padding", "layout": "friendly"}
    return Case(**(sizes | changes))  # type: ignore[arg-type]


@pytest.fixture(params=["friendly", "model"])
def case(request: pytest.FixtureRequest) -> Case:
    return small(layout=request.param)
