"""Boolean masks as a union of smaller ones.

A pair mask is often the outer product of a mask over queries and one over keys: filled where either is. Each part
then has its own kind, and none is as large as the pairs.
"""

from __future__ import annotations

import torch

from trifast_inductor.patterns import axes
from trifast_inductor.patterns.axes import aten, packet
from trifast_inductor.patterns.recording import Value
from trifast_inductor.patterns.site import MaskPart, Operand

_NOT = {aten.bitwise_not, aten.logical_not}
_AND = {aten.bitwise_and, aten.logical_and, aten.mul}
_OR = {aten.bitwise_or, aten.logical_or, aten.add}


def parts(mask: Operand, fills_where: bool) -> list[MaskPart]:
    """Masks which, taken together, fill what `mask` fills: its factors when it is a product, else itself."""
    operand = mask
    while True:
        op = operand.value.op
        kind = packet(op)
        if op is None or kind is None:
            break
        if kind in _NOT and _is_boolean(op.args[0]):
            fills_where = not fills_where
            operand = Operand(op.args[0], operand.labels, read_at=min(operand.read_at, op.time))
            continue
        if kind in (_OR if fills_where else _AND) and all(map(_is_boolean, op.args[:2])):
            return [
                part
                for side in op.args[:2]
                for part in parts(
                    Operand(side, axes.unbroadcast(operand.labels, side.shape), read_at=min(operand.read_at, op.time)),
                    fills_where,
                )
            ]
        pulled = axes.pull(operand.value, operand.labels)
        if pulled is None or not _is_boolean(pulled[0]):
            break
        operand = Operand(pulled[0], pulled[1], read_at=min(operand.read_at, op.time))
    return [MaskPart(operand, fills_where)]


def _is_boolean(x: object) -> bool:
    return isinstance(x, Value) and x.dtype is torch.bool
