"""Numbers that queries and keys are multiplied by before their product: the op takes them as its scale.

The scaled copy, as large as the queries, then need not exist. OpenFold and its descendants scale in place
(`q /= sqrt(d)`); such a write is made out of place when nothing but the logits reads what it wrote.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from trifast_inductor.patterns import axes, terms
from trifast_inductor.patterns.axes import aten, packet
from trifast_inductor.patterns.products import live_readers
from trifast_inductor.patterns.recording import REREAD, Op, Reading, Value
from trifast_inductor.patterns.site import Operand

_OUT_OF_PLACE: dict[Any, Any] = {
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    "mul_": "mul",
    "div_": "div",
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
    aten.mul_.Scalar: aten.mul.Scalar,
    aten.div_.Scalar: aten.div.Scalar,
}


def out_of_place(node: fx.Node) -> Any:
    """The target that computes the same without writing; None when there is none."""
    return _OUT_OF_PLACE.get(node.target)


def unscaled(scaled: Operand, until: int, reading: Reading) -> tuple[Operand, float, tuple[fx.Node, ...]]:
    """An operand of the product before it was scaled by a number, the number, and the writes to make out of place."""
    best: tuple[Operand, float, tuple[fx.Node, ...]] = scaled, 1.0, ()
    value, labels, read_at, number = scaled.value, scaled.labels, scaled.read_at, 1.0
    written: tuple[fx.Node, ...] = ()
    while (op := value.op) is not None:
        pulled = axes.pull(value, labels)
        if pulled is None:
            by = number_of(op)
            if by is None:
                break
            pulled, number = (op.args[0], labels), number * by
            if _writes(op):
                if not _is_read_by_name_only(op, reading, written):
                    break
                written = (*written, *op.outputs[0].nodes)
        value, labels = pulled
        if value.dtype != scaled.value.dtype:
            break
        read_at = min(read_at, op.time)
        changed = reading.written_between(value, read_at, until, ignoring=written)
        # The nearest such node: beyond it lie only views that the lowering would have to make again.
        if number != best[1] and value.nodes and not changed:
            best = Operand(value, labels, scaled.casts, read_at), number, written
    return best


def number_of(op: Op) -> float | None:
    """What the op multiplies a tensor by, all else alike; None for any other op."""
    if packet(op) not in (aten.mul, aten.div) or op.kwargs.get("rounding_mode") is not None:
        return None
    source, by = op.args[:2]
    number = terms.number_of(by)
    if not isinstance(source, Value) or not number or source.shape != op.outputs[0].shape:
        return None
    return 1 / number if packet(op) is aten.div else number


def _writes(op: Op) -> bool:
    return any(argument.is_write for argument in op.target._schema.arguments)


def _is_read_by_name_only(write: Op, reading: Reading, undone: tuple[fx.Node, ...]) -> bool:
    """Whether what was written is read through the result of the write alone, and never through another alias."""
    (result,) = write.outputs
    if len(result.nodes) != 1 or out_of_place(result.nodes[0]) is None:
        return False
    if result.storage in reading.input_storages or reading.written_between(
        result, write.time, reading.end, ignoring=undone
    ):
        return False
    aliases = [alias for op in result.readers if op.target == REREAD and op.time == write.time for alias in op.outputs]
    return not any(alias.escapes or live_readers(alias) for alias in aliases)
