"""Up from what a softmax reads to the product of queries and keys, collecting what is passed on the way.

Scale, addends and masks are kept with the axes they vary over; `terms` sorts them afterwards.
"""

from __future__ import annotations

import dataclasses

import torch

from trifast_inductor.patterns import axes, products, terms
from trifast_inductor.patterns.axes import Label, Labels, aten, flat, packet
from trifast_inductor.patterns.products import live_readers, reaches_product
from trifast_inductor.patterns.recording import Op, Value
from trifast_inductor.patterns.site import Declined, Factor, Operand, Reason, Select, Term

Dtypes = tuple[torch.dtype, ...]

_MAX_STEPS = 64
_ONE = Factor()


@dataclasses.dataclass(frozen=True)
class Logits:
    """softmax's input = scale · q·k, changed by terms and selects. `batch` is what queries and keys share."""

    q: Operand
    k: Operand
    batch: Label
    queries: Label
    contracted: Label
    scale: Factor
    terms: tuple[Term, ...] = ()
    selects: tuple[Select, ...] = ()


def read(logits: Value, labels: Labels, keys: Label) -> Logits:
    """What `logits` was made of; raises `Declined`."""
    return _Walk(keys).up(logits, labels, _ONE, 0)


class _Walk:
    def __init__(self, keys: Label) -> None:
        self.keys = keys

    def up(self, value: Value, labels: Labels, factor: Factor, depth: int, dtypes: Dtypes = ()) -> Logits:
        """`value` times `factor`, cast to `dtypes` one after the other, is what the softmax reads."""
        op = value.op
        if op is None or depth > _MAX_STEPS:
            raise Declined(Reason.NO_PRODUCT)
        if value.escapes or len(live_readers(value)) != 1:
            raise _unless_product_above(value, Reason.LOGITS_USED)
        kind = packet(op)
        if products.is_product(op):
            return self._product(op, labels, factor, depth)
        pulled = axes.pull(value, labels)
        if pulled is not None:
            source, source_labels = pulled
            if source.dtype != value.dtype:
                dtypes = (value.dtype, *dtypes)
            return self.up(source, source_labels, factor, depth + 1, dtypes)
        if kind in (aten.mul, aten.div):
            return self._scaled(op, labels, factor, depth, dtypes)
        if kind is aten.neg:
            return self.up(op.args[0], labels, factor.times(Factor(-1.0)), depth + 1, dtypes)
        if kind in (aten.add, aten.sub, aten.rsub):
            return self._added(op, labels, factor, depth, dtypes)
        if kind in (aten.masked_fill, aten.where):
            return self._selected(op, labels, factor, depth, dtypes)
        raise _unless_product_above(value, Reason.UNKNOWN_OP, f"{kind or op.target}".removeprefix("aten."))

    def _scaled(self, op: Op, labels: Labels, factor: Factor, depth: int, dtypes: Dtypes) -> Logits:
        x, y = op.args[:2]
        divides = packet(op) is aten.div
        if op.kwargs.get("rounding_mode") is not None:
            raise _unless_product_above(op.outputs[0], Reason.UNKNOWN_OP, "rounded division")
        is_logits_sized = isinstance(x, Value) and len(x.shape) == len(labels)
        if not divides and (not is_logits_sized or (isinstance(y, Value) and reaches_product(y))):
            x, y = y, x
        by = terms.number_of(y)
        if by is not None and by != 0:
            return self.up(x, labels, factor.times(Factor(1 / by if divides else by)), depth + 1, dtypes)
        if isinstance(x, Value) and isinstance(y, Value) and len(x.shape) == len(labels):
            tensor = Operand(y, axes.unbroadcast(labels, y.shape), read_at=op.time)
            if not terms.varies(tensor, self.keys):
                x_labels = axes.unbroadcast(labels, x.shape)
                return self.up(x, x_labels, factor.times(Factor(1.0, ((tensor, divides),))), depth + 1, dtypes)
        raise _unless_product_above(op.outputs[0], Reason.UNKNOWN_OP, "product with a tensor over the keys")

    def _added(self, op: Op, labels: Labels, factor: Factor, depth: int, dtypes: Dtypes) -> Logits:
        kind = packet(op)
        first, second = op.args[:2]
        alpha = op.kwargs.get("alpha", op.args[2] if len(op.args) > 2 else 1)
        if not isinstance(alpha, (int, float)):
            raise _unless_product_above(op.outputs[0], Reason.UNKNOWN_OP, "symbolic alpha")
        signs = {aten.add: (1.0, alpha), aten.sub: (1.0, -alpha), aten.rsub: (-alpha, 1.0)}[kind]
        addends = [(first, factor.times(Factor(signs[0]))), (second, factor.times(Factor(signs[1])))]
        failure: Declined | None = None
        for (main, main_factor), (other, other_factor) in (addends, addends[::-1]):
            if not isinstance(main, Value) or not _has_shape(main, op.outputs[0]):
                continue
            if not isinstance(other, Value) and other != 0:
                continue
            try:
                above = self.up(main, axes.unbroadcast(labels, main.shape), main_factor, depth + 1, dtypes)
            except Declined as declined:
                if failure is None or failure.reason is Reason.NO_PRODUCT:
                    failure = declined
                continue
            if not isinstance(other, Value):
                return above
            operand = Operand(other, axes.unbroadcast(labels, other.shape), read_at=op.time)
            return dataclasses.replace(above, terms=(Term(operand, other_factor, depth), *above.terms))
        raise failure or _unless_product_above(op.outputs[0], Reason.UNKNOWN_OP, "sum with a number")

    def _selected(self, op: Op, labels: Labels, factor: Factor, depth: int, dtypes: Dtypes) -> Logits:
        if packet(op) is aten.masked_fill:
            x, mask, fill = op.args
            keeps = False
        else:
            mask, x, fill = op.args
            keeps = True
            if not (isinstance(x, Value) and reaches_product(x)):
                x, fill, keeps = fill, x, False
        if not isinstance(x, Value) or not reaches_product(x):
            raise Declined(Reason.NO_PRODUCT)
        number = terms.number_of(fill)
        if number is None:
            raise Declined(Reason.FILL_NOT_CONSTANT)
        if factor.tensors:
            raise Declined(Reason.UNKNOWN_OP, "a tensor scales masked logits")
        above = self.up(x, axes.unbroadcast(labels, x.shape), factor, depth + 1, dtypes)
        operand = Operand(mask, axes.unbroadcast(labels, mask.shape), read_at=op.time)
        fill = number * factor.number
        for dtype in dtypes:  # the lowest float64 becomes -inf in float32
            fill = float(torch.tensor(fill, dtype=dtype).item())
        select = Select(operand, keeps, fill, depth)
        return dataclasses.replace(above, selects=(select, *above.selects))

    def _product(self, op: Op, labels: Labels, factor: Factor, depth: int) -> Logits:
        """The keys' axis must come from one side alone, the queries' from the other."""
        product = products.product(op, labels)
        added: tuple[Term, ...] = ()
        if product.addend is not None and product.beta != 0:
            addend = Operand(product.addend, axes.unbroadcast(labels, product.addend.shape), read_at=op.time)
            added = (Term(addend, factor.times(Factor(product.beta)), depth),)
        left = terms.operand(product.lhs, product.lhs_labels, op.time)
        right = terms.operand(product.rhs, product.rhs_labels, op.time)
        keys = set(flat(self.keys))
        if keys <= set(flat(*product.rhs_labels)) and not keys & set(flat(*product.lhs_labels)):
            q, k, q_labels, k_labels = left, right, product.lhs_labels, product.rhs_labels
        elif keys <= set(flat(*product.lhs_labels)) and not keys & set(flat(*product.rhs_labels)):
            q, k, q_labels, k_labels = right, left, product.rhs_labels, product.lhs_labels
        else:
            raise Declined(Reason.SOFTMAX_AXIS if products.multiplies_activations(op) else Reason.NO_PRODUCT)
        whole = flat(self.keys) in [flat(label) for label in k_labels]
        if not products.multiplies_activations(op) and not whole:
            raise Declined(Reason.NO_PRODUCT)
        in_k = set(flat(*k_labels))
        queries = tuple(atom for atom in flat(*q_labels, self.keys) if atom not in in_k)
        contracted = set(flat(product.contracted))
        batch = tuple(atom for atom in flat(*labels) if atom not in queries and atom not in keys | contracted)
        scale = factor.times(Factor(product.alpha))
        return Logits(q, k, batch, queries, product.contracted, scale, added)


def _has_shape(addend: Value, total: Value) -> bool:
    """Only an addend of full size can be the product; the others are broadcast to it."""
    return len(addend.shape) == len(total.shape) and all(
        axes.same_size(a, b) for a, b in zip(addend.shape, total.shape, strict=True)
    )


def _unless_product_above(value: Value, reason: Reason, detail: str = "") -> Declined:
    """Only logits are worth a reason: a softmax of something else is no attention."""
    return Declined(reason, detail) if reaches_product(value) else Declined(Reason.NO_PRODUCT)
