"""Down from the probabilities to the product with the values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from trifast_inductor.patterns import axes, products, terms
from trifast_inductor.patterns.axes import Label, Labels, aten, flat, packet
from trifast_inductor.patterns.products import leads_to_product, live_readers, multiplied
from trifast_inductor.patterns.recording import Op, Value
from trifast_inductor.patterns.site import Declined, Operand, Reason

_MAX_STEPS = 64


@dataclasses.dataclass(frozen=True)
class Weighted:
    """out = Σ_keys probabilities · v. `ends_at` is when the product is made."""

    v: Operand
    out: Operand
    head: Label
    ends_at: int
    zeroes_nan: bool = False


def read(probabilities: Value, labels: Labels, keys: Label) -> Weighted:
    """What becomes of the probabilities; raises `Declined`."""
    value, zeroes_nan = probabilities, False
    for _ in range(_MAX_STEPS):
        readers = live_readers(value)
        if any(_is_dropout(op) for op in readers):
            raise Declined(Reason.DROPOUT)
        if value.escapes or len(readers) != 1:
            raise Declined(Reason.PROBABILITIES_USED if readers else Reason.NOT_CONTRACTED)
        op = _sum_of(readers[0]) or readers[0]
        found = products.weighted(op, value, labels)
        if found is not None:
            if readers[0].inputs.count(value) > 1:
                raise Declined(Reason.PROBABILITIES_USED)
            return _weighted(op, *found, keys, zeroes_nan)
        pushed = axes.push(op, labels) if op.args and op.args[0] is value else None
        if packet(op) is aten.nan_to_num and _nan_becomes_zero(op):
            zeroes_nan, pushed = True, labels
        if pushed is None:
            if not any(leads_to_product(out) for out in op.outputs):
                raise Declined(Reason.NOT_CONTRACTED)
            raise Declined(Reason.UNKNOWN_OP_AFTER, f"{packet(op) or op.target}".removeprefix("aten."))
        value, labels = op.outputs[0], pushed
    raise Declined(Reason.NOT_CONTRACTED)


def _nan_becomes_zero(op: Op) -> bool:
    nan = op.kwargs.get("nan", op.args[1] if len(op.args) > 1 else None)
    return nan is None or (isinstance(nan, (int, float)) and nan == 0)


def _sum_of(op: Op) -> Op | None:
    """The sum that is the one reader of a multiplication."""
    if packet(op) is not aten.mul or not op.outputs:
        return None
    readers = live_readers(op.outputs[0])
    is_contraction = len(readers) == 1 and multiplied(readers[0]) is op and not op.outputs[0].escapes
    return readers[0] if is_contraction else None


def _weighted(op: Op, product: products.Product, result: Labels, keys: Label, zeroes_nan: bool) -> Weighted:
    if flat(product.contracted) != flat(keys):
        raise Declined(Reason.NOT_CONTRACTED)
    v = terms.operand(product.rhs, product.rhs_labels, op.time)
    known = set(flat(*product.lhs_labels))
    head = tuple(atom for atom in flat(*product.rhs_labels) if atom not in known)
    out, labels = op.outputs[0], result
    while not out.nodes:
        readers = live_readers(out)
        pushed = axes.push(readers[0], labels) if len(readers) == 1 and not out.escapes else None
        if pushed is None:
            raise Declined(Reason.UNREADABLE, "the result stays inside an opaque call")
        out, labels = readers[0].outputs[0], pushed
    return Weighted(v, Operand(out, labels), head, op.time, zeroes_nan)


def _is_dropout(op: Op) -> bool:
    """`native_dropout`, or a product with noise."""
    if packet(op) is aten.native_dropout:
        return True
    return packet(op) is aten.mul and any(
        packet(source) in (aten.bernoulli, aten.rand_like, aten.rand) for source in _above(op, 3)
    )


def _above(op: Op, steps: int) -> Iterator[Op]:
    level = [op]
    for _ in range(steps):
        level = [value.op for current in level for value in current.inputs if value.op is not None]
        yield from level
