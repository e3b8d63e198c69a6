"""In which dtype the op computes: eager's upcasts of queries and keys are undone where nothing is lost by it.

Models in bfloat16 often make the logits of `q.float()` and `k.float()` and go back to bfloat16 for the product with
the values. The kernels sum products of halves in float32 anyway, so such a site runs on the halves.
"""

from __future__ import annotations

import torch

from trifast_inductor.patterns import axes, scaling
from trifast_inductor.patterns.logits import Logits
from trifast_inductor.patterns.site import Factor, Operand

_HALVES = (torch.bfloat16, torch.float16)


def operands(logits: Logits, v: Operand) -> tuple[Operand, Operand, Factor, torch.dtype]:
    """Queries, keys, scale, and the dtype of the op: float32 wins over a half type where eager's product was in it."""
    if v.dtype in _HALVES and logits.q.dtype == logits.k.dtype == torch.float32:
        q, k = _before_upcast(logits.q, v.dtype), _before_upcast(logits.k, v.dtype)
        if q is not None and k is not None:
            return q[0], k[0], logits.scale.times(Factor(q[1] * k[1])), v.dtype
    dtypes = {logits.q.dtype, logits.k.dtype, v.dtype}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.promote_types(logits.q.dtype, v.dtype)
    return logits.q, logits.k, logits.scale, dtype


def _before_upcast(operand: Operand, dtype: torch.dtype) -> tuple[Operand, float] | None:
    """What was cast up to float32, and the number it was scaled by since."""
    value, labels, read_at, number = operand.value, operand.labels, operand.read_at, 1.0
    if operand.casts and any(cast != torch.float32 for cast in operand.casts):
        return None
    while value.dtype != dtype or not value.nodes:
        op = value.op
        if op is None:
            return None
        pulled = axes.pull(value, labels)
        if pulled is None:
            by = scaling.number_of(op)
            if by is None or value.dtype != torch.float32:
                return None
            pulled, number = (op.args[0], labels), number * by
        if pulled[0].dtype not in (dtype, torch.float32):
            return None
        value, labels = pulled
        read_at = min(read_at, op.time)
    return Operand(value, labels, read_at=read_at), number
