"""Times below which no kernel can go on a known GPU, from three rates.

    exponentials   B·H·N³ / (16 · multiprocessors · clock)            forward; the backward needs as many
    products       2 · matmuls · B·H·N³·D / matrix rate               2 matmuls forward, 5 backward
    memory         bytes of tensors read and written once / bandwidth  4 forward (q, k, v, out), 8 backward, and bias

The floor is the largest of the three. 16 a clock is the rate of the special-function unit of every GPU from sm_75
on; clock is the highest that the multiprocessors may have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trifast_inductor.bench.case import Case


@dataclass(frozen=True)
class Rates:
    """Of one GPU model, per second."""

    multiprocessors: int
    clock: float
    matrix: dict[torch.dtype, float]
    bandwidth: float


# By the device's name. H200: 8192³ bf16 product on random data 788 TFLOP/s, device-to-device copy 4.3 TB/s (reads and
# writes), both measured through torch 2.11; float32 is 128 fused multiply-adds a clock and multiprocessor.
KNOWN = {
    "NVIDIA H200": Rates(
        multiprocessors=132,
        clock=1.98e9,
        matrix={torch.bfloat16: 790e12, torch.float16: 790e12, torch.float32: 2 * 128 * 132 * 1.98e9},
        bandwidth=4.3e12,
    )
}


def floors_ms(case: Case, device_name: str) -> tuple[float, float] | None:
    """Forward and backward, of the attention alone; None on a GPU whose rates nobody has entered."""
    rates = KNOWN.get(device_name)
    if rates is None:
        return None
    scores = case.B * case.H * case.N**3
    exponentials = scores / (16 * rates.multiprocessors * rates.clock)
    one_matmul = 2 * scores * case.D / rates.matrix[case.dtype]
    tensor = case.B * case.N**2 * case.H * case.D * case.dtype.itemsize / rates.bandwidth
    bias = case.B * case.N**2 * case.H * case.dtype.itemsize / rates.bandwidth
    forward = max(exponentials, 2 * one_matmul, 4 * tensor + bias)
    backward = max(exponentials, 5 * one_matmul, 8 * tensor + 2 * bias)
    return 1e3 * forward, 1e3 * backward
