"""Errors against float64: relative, ‖x - exact‖ / ‖exact‖, of the result and of the worst gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from trifast_inductor.bench.case import Case, InputSet, as_called, draw

_GRADIENTS = ("dq", "dk", "dv", "dbias", "dgate")
_ROW_BYTES = 2**31  # of logits in float64 at a time; about six tensors of that size live together


class Exact:
    """Result and gradients of one set of inputs in float64, a few rows at a time, in the model's order of axes."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case = case
        # The values as rounded to the case's dtype: what is measured is the computation.
        given = draw(case, "brihd", device, seed)
        self.results = _in_chunks(case, given)

    def errors(self, results: tuple[Tensor, ...], axes: str) -> tuple[float, float, str]:
        """Of the result, of the worst gradient, and which that is. NaN counts as infinite."""
        off = []
        for n, (x, exact) in enumerate(zip(results, self.results, strict=True)):
            # q, k, v, their gradients and the result come in the peer's axes; bias and a model's tensors do not.
            if self.case.layout == "friendly" and n != 4:
                x = x.permute([axes.index(axis) for axis in "brihd"])
            distance = (x.double() - exact).norm() / exact.norm()
            off.append(distance.nan_to_num(float("inf")).item())
        worst = max(range(1, len(off)), key=off.__getitem__)
        return off[0], off[worst], _GRADIENTS[worst - 1]


def exact_fits(case: Case, device: torch.device) -> bool:
    """Whether float64 is worth its time: some 30 seconds on two CPU cores, a few on a GPU."""
    scores = case.B * case.H * case.N**3
    return scores * case.D <= (2**40 if device.type == "cuda" else 2**31)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """The definition, on `[B, R, N, H, D]`."""
    logits = torch.einsum("brihd,brjhd->brhij", q, k) * q.shape[-1] ** -0.5 + bias[:, None]
    if mask is not None:
        logits = logits.masked_fill(mask[:, :, None, None], -1e9)
    return torch.einsum("brhij,brjhd->brihd", torch.softmax(logits, -1), v)


def _in_chunks(case: Case, given: InputSet) -> tuple[Tensor, ...]:
    """Rows know of each other through dbias alone, which is a sum over them."""
    run = as_called(_attend, case, "brihd")
    rows = max(1, _ROW_BYTES // (8 * case.B * case.H * case.N**2))
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, case.N, rows):
        chunk = slice(start, start + rows)
        leaves = [(x if n == 3 else x[:, chunk]).detach().double().requires_grad_() for n, x in enumerate(given.leaves)]
        mask = None if given.mask is None else given.mask[:, chunk]
        out = run(*leaves[:4], mask, *leaves[4:])
        gradients = torch.autograd.grad(out, leaves, given.grad_out[:, chunk].double())
        parts.append((out.detach(), *gradients))
    columns = list(zip(*parts, strict=True))
    return tuple(sum(column[1:], column[0]) if n == 4 else torch.cat(column, 1) for n, column in enumerate(columns))
