"""The draft of dq, dk and dv in one pass beside the lean kernels: `python docs/benchmarks/variants/dqkv.py [NAME]`.

On a Hopper GPU, from a checkout. NAME is one of `SHAPES`, rows by blocks of keys. First the largest differences from
the lean gradients, over the largest of them; then milliseconds of the kernel, and of a lean call without dbias.
"""

import functools
import sys
from typing import Any

import torch
import triton
from dqkv_hopper import _triangle_attention_bwd_dqkv_hopper
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import backward, forward
from trifast_inductor.kernels.triangle_attention.hopper.descriptors import descriptor
from trifast_inductor.kernels.triangle_attention.lean.words import Words
from trifast_inductor.testing import Inputs, random_inputs

LOG2E = 1.4426950408889634
_TWO = {"KV_STAGES": 2, "DS_STAGES": 2, "REGISTERS": 200, "DQ_REGISTERS": 80, "SUM_TILES": 0}
_THREE = {"DS_STAGES": 2, "REGISTERS": 136, "DQ_REGISTERS": 48, "SUM_TILES": 0}
SHAPES = {
    "12": {"ROWS": 1, "BLOCKS": 2, "STAGES": 3, **_TWO},
    "12s": {"ROWS": 1, "BLOCKS": 2, "STAGES": 3, **_TWO, "SUM_TILES": 8},  # up to 512 queries
    "21": {"ROWS": 2, "BLOCKS": 1, "STAGES": 3, **_TWO},
    "13": {"ROWS": 1, "BLOCKS": 3, "STAGES": 3, "KV_STAGES": 1, **_THREE},
    "31": {"ROWS": 3, "BLOCKS": 1, "STAGES": 2, "KV_STAGES": 2, **_THREE},
}


def in_three(x: Tensor) -> list[Tensor]:
    """x as the sum of three bfloat16."""
    parts = []
    for _ in range(3):
        parts.append(x.to(torch.bfloat16))
        x = x - parts[-1].float()
    return parts


class Prepared:
    """Results of the forward, and what the kernel reads: terms of the queries, words of the bias `[j, i]`."""

    def __init__(self, x: Inputs) -> None:
        self.x = x
        self.out, self.row_max, self.row_sum = forward.launch(*x.op)
        B, R, I, H, _ = x.q.shape
        shift = self.row_max * LOG2E + self.row_sum.log2()
        delta = (self.out.float() * x.grad_out.float()).sum(-1).transpose(2, 3)
        terms = torch.zeros((B, R, H, I + -I % 64, 16), dtype=torch.bfloat16, device=x.q.device)
        for n, part in enumerate(in_three(-shift / (x.scale * LOG2E))):
            terms[..., :I, n] = part
        terms[..., :I, 3:6] = 1
        for n, part in enumerate(in_three(-delta)):
            terms[..., :I, 6 + n] = part
        self.terms = terms.view(-1, 16)
        by_j = Words(x.bias)(x.bias)[1]
        assert by_j is not None
        self.words = by_j.view(-1, 32)

    def lean(self, needs_dbias: bool = False) -> tuple[Tensor, ...]:
        x = self.x
        numbers = (x.scale, x.fill, x.key_term_first, needs_dbias)
        return backward.launch(x.grad_out, *x.op[:6], self.out, self.row_max, self.row_sum, *numbers)

    def draft(self, shape: dict[str, int]) -> tuple[Tensor, ...]:
        x = self.x
        B, R, I, H, D = x.q.shape
        J = x.k.shape[2]
        tiles_i, tiles_j = triton.cdiv(I, 64), triton.cdiv(J, 64)
        row_groups, groups_j = triton.cdiv(R, shape["ROWS"]), triton.cdiv(tiles_j, shape["BLOCKS"])
        items = B * row_groups * H
        programs = min(items, torch.cuda.get_device_properties(x.q.device).multi_processor_count)
        gradients = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x.q, x.k, x.v)]
        sums = torch.empty((programs, tiles_i, shape["ROWS"], 64, D), dtype=torch.float32, device=x.q.device)
        key = x.key_bias if x.key_mask is None else x.key_mask.view(torch.uint8)
        key_term = "none" if key is None else "add" if x.key_mask is None else "select"

        def described(t: Tensor, *box: int) -> Any:
            return descriptor(t, box).in_full()

        _triangle_attention_bwd_dqkv_hopper[(programs,)](
            *(described(t, 1, 1, 64, 1, D) for t in (x.q, x.grad_out, x.k, x.v)),
            described(self.terms, 64, 16),
            described(self.words, 64, 32),
            key,
            sums,
            *gradients,
            *((0, 0, 0) if key is None else key.stride()),
            *(R, H, I, J, row_groups, tiles_i, tiles_j, groups_j, items),
            x.scale,
            D=D,
            KEY_TERM=key_term,
            num_warps=4,
            **shape,
        )
        return tuple(gradients)


def main(name: str) -> None:
    shape = SHAPES[name]
    for sizes in ((5, 200, 333, 2, "none"), (7, 256, 256, 4, "additive"), (300, 192, 256, 4, "mask")):
        R, I, J, H, key_term = sizes
        x = random_inputs(R=R, I=I, J=J, H=H, D=32, dtype=torch.bfloat16, device="cuda", key_term=key_term)
        prepared = Prepared(x)
        pairs = zip(prepared.draft(shape), prepared.lean(), strict=False)
        off = [((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in pairs]
        print(name, sizes, "dq, dk, dv:", *(f"{x:.1e}" for x in off), flush=True)
    for N in (256, 512):
        prepared = Prepared(random_inputs(R=N, I=N, J=N, H=4, D=32, dtype=torch.bfloat16, device="cuda"))
        calls = (functools.partial(prepared.draft, shape), prepared.lean)
        times = [triton.testing.do_bench(call, warmup=20, rep=60, return_mode="median") for call in calls]
        print(name, f"N={N}: {times[0]:.4f}, lean {times[1]:.4f}", flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or list(SHAPES):
        main(name)
