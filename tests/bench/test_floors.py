"""Floors: the figures that the design states for an H200."""

import pytest
import torch

from tests.bench.conftest import small
from trifast_inductor.bench.floors import floors_ms


@pytest.mark.parametrize(
    ("N", "forward", "backward"),
    [(256, 0.016, 0.032), (512, 0.128, 0.217), (1024, 1.03, 1.74), (2048, 8.2, 13.9)],
)
def test_bf16_at_the_usual_shape(N: int, forward: float, backward: float) -> None:
    floors = floors_ms(small(N=N, D=32, H=4, B=1, dtype=torch.bfloat16), "NVIDIA H200")
    assert floors == pytest.approx((forward, backward), rel=0.04)


def test_an_unknown_gpu_has_none() -> None:
    assert floors_ms(small(), "Some other GPU") is None
