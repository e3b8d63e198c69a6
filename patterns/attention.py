"""From a softmax to a `Site` or a `Refusal`.

Walk up from what the softmax reads to the product of queries and keys, and down from the probabilities to the
product with the values, carrying axis labels. What is passed on the way (scale, addends, masks) is collected; then
`terms` sorts it by the axes it varies over, and every axis gets its role.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math

import torch

from trifast_inductor.kernels.triangle_attention import validation
from trifast_inductor.patterns import axes, terms
from trifast_inductor.patterns.axes import Label, Labels, aten, flat, packet
from trifast_inductor.patterns.canonical import Op, Reading, Size, Value
from trifast_inductor.patterns.site import (
    Declined,
    Factor,
    Operand,
    Reason,
    Refusal,
    Roles,
    Select,
    Site,
    Term,
)

_SOFTMAXES = {aten._softmax}
_PRODUCTS = {aten.bmm, aten.mm, aten.baddbmm, aten.addmm}
_MAX_STEPS = 64


def find(reading: Reading) -> list[Site | Refusal]:
    """One entry for every softmax whose result is used, in the order of the graph."""
    return [_look_at(op, reading) for op in reading.ops if op.is_live and packet(op) in _SOFTMAXES]


def _look_at(softmax: Op, reading: Reading) -> Site | Refusal:
    probabilities = softmax.outputs[0]
    try:
        return _Reader(softmax, reading).site()
    except Declined as declined:
        return Refusal(probabilities, declined.reason, declined.detail)


@dataclasses.dataclass(frozen=True)
class _Above:
    """What lies above the softmax. `q` holds the queries when `key_axis` labels an axis of `k`."""

    q: Operand
    k: Operand
    batch: Label
    queries: Label
    contracted: Label
    scale: Factor
    terms: tuple[Term, ...] = ()
    selects: tuple[Select, ...] = ()


class _Reader:
    def __init__(self, softmax: Op, reading: Reading) -> None:
        self.softmax = softmax
        self.reading = reading
        self.logits: Value = softmax.args[0]
        self.labels = axes.fresh_labels(self.logits)
        self.keys: Label = self.labels[softmax.args[1]]

    def site(self) -> Site:
        if len(self.logits.shape) >= 4 and _is_input(self.logits):
            raise Declined(Reason.GRAPH_BREAK)
        if not self.keys:
            raise Declined(Reason.SOFTMAX_AXIS, "the axis has size 1")
        above = self._up(self.logits, self.labels, Factor(), 0)
        v, out, head, ends_at = self._down()
        sorted_terms = terms.sort(above.terms, above.selects, above.batch, above.queries, self.keys)
        roles = Roles(
            b=sorted_terms.b,
            r=sorted_terms.r,
            h=sorted_terms.h,
            i=sorted_terms.i,
            j=flat(self.keys),
            c=flat(above.contracted),
            d=flat(head),
        )
        site = Site(
            softmax=self.softmax.outputs[0],
            q=above.q,
            k=above.k,
            v=v,
            out=out,
            biases=sorted_terms.biases,
            key_terms=sorted_terms.key_terms,
            select=sorted_terms.select,
            scale=above.scale,
            key_term_first=sorted_terms.key_term_first,
            roles=roles,
            dtype=_common_dtype(above.q, above.k, v),
            ends_at=ends_at,
        )
        self._check(site)
        return site

    # Up: from the logits to the product of queries and keys

    def _up(self, value: Value, labels: Labels, factor: Factor, depth: int) -> _Above:
        """`value` times `factor` is what the steps below read."""
        op = value.op
        if op is None or depth > _MAX_STEPS:
            raise Declined(Reason.NO_PRODUCT)
        if not _has_one_reader(value):
            raise self._above_a_product(value, Reason.LOGITS_USED)
        kind = packet(op)
        if kind in _PRODUCTS:
            return self._product(op, labels, factor, depth)
        pulled = axes.pull(value, labels)
        if pulled is not None:
            source, source_labels = pulled
            return self._up(source, source_labels, factor, depth + 1)
        if kind in (aten.mul, aten.div):
            return self._scaled(op, labels, factor, depth)
        if kind is aten.neg:
            return self._up(op.args[0], labels, factor.times(Factor(-1.0)), depth + 1)
        if kind in (aten.add, aten.sub, aten.rsub):
            return self._added(op, labels, factor, depth)
        if kind in (aten.masked_fill, aten.where):
            return self._selected(op, labels, factor, depth)
        raise self._above_a_product(value, Reason.UNKNOWN_OP, f"{kind or op.target}".removeprefix("aten."))

    def _above_a_product(self, value: Value, reason: Reason, detail: str = "") -> Declined:
        """Only logits are worth a reason: a softmax of something else is no attention."""
        return Declined(reason, detail) if _reaches_product(value) else Declined(Reason.NO_PRODUCT)

    def _scaled(self, op: Op, labels: Labels, factor: Factor, depth: int) -> _Above:
        x, y = op.args[:2]
        divides = packet(op) is aten.div
        if op.kwargs.get("rounding_mode") is not None:
            raise Declined(Reason.UNKNOWN_OP, "rounded division")
        is_logits_sized = isinstance(x, Value) and len(x.shape) == len(labels)
        if not divides and (not is_logits_sized or (isinstance(y, Value) and _reaches_product(y))):
            x, y = y, x
        by = terms.number_of(y)
        if by is not None and by != 0:
            return self._up(x, labels, factor.times(Factor(1 / by if divides else by)), depth + 1)
        if isinstance(y, Value) and all(axes.is_one(size) for size in y.shape) and isinstance(x, Value):
            return self._up(x, labels, factor.times(Factor(1.0, ((y, divides),))), depth + 1)
        raise self._above_a_product(op.outputs[0], Reason.UNKNOWN_OP, "product with a tensor")

    def _added(self, op: Op, labels: Labels, factor: Factor, depth: int) -> _Above:
        kind = packet(op)
        first, second = op.args[:2]
        alpha = op.kwargs.get("alpha", op.args[2] if len(op.args) > 2 else 1)
        if not isinstance(alpha, (int, float)):
            raise Declined(Reason.UNKNOWN_OP, "symbolic alpha")
        signs = {aten.add: (1.0, alpha), aten.sub: (1.0, -alpha), aten.rsub: (-alpha, 1.0)}[kind]
        addends = [(first, factor.times(Factor(signs[0]))), (second, factor.times(Factor(signs[1])))]
        failure: Declined | None = None
        for (main, main_factor), (other, other_factor) in (addends, addends[::-1]):
            if not isinstance(main, Value) or not isinstance(other, Value):
                continue
            if len(main.shape) != len(labels):
                continue
            try:
                above = self._up(main, axes.unbroadcast(labels, main.shape), main_factor, depth + 1)
            except Declined as declined:
                if failure is None or failure.reason is Reason.NO_PRODUCT:
                    failure = declined
                continue
            operand = Operand(other, axes.unbroadcast(labels, other.shape), read_at=op.time)
            return dataclasses.replace(above, terms=(Term(operand, other_factor, depth), *above.terms))
        raise failure or self._above_a_product(op.outputs[0], Reason.UNKNOWN_OP, "sum with a number")

    def _selected(self, op: Op, labels: Labels, factor: Factor, depth: int) -> _Above:
        if packet(op) is aten.masked_fill:
            x, mask, fill = op.args
            keeps = False
        else:
            mask, x, fill = op.args
            keeps = True
            if not (isinstance(x, Value) and _reaches_product(x)):
                x, fill, keeps = fill, x, False
        if not isinstance(x, Value) or not _reaches_product(x):
            raise Declined(Reason.NO_PRODUCT)
        number = terms.number_of(fill)
        if number is None:
            raise Declined(Reason.FILL_NOT_CONSTANT)
        if factor.tensors:
            raise Declined(Reason.UNKNOWN_OP, "a tensor scales masked logits")
        above = self._up(x, axes.unbroadcast(labels, x.shape), factor, depth + 1)
        operand = Operand(mask, axes.unbroadcast(labels, mask.shape), read_at=op.time)
        select = Select(operand, keeps, number * factor.number, depth)
        return dataclasses.replace(above, selects=(select, *above.selects))

    def _product(self, op: Op, labels: Labels, factor: Factor, depth: int) -> _Above:
        """bmm and mm: lhs [*, m, c], rhs [*, c, n]. The softmax axis must be all of m or all of n."""
        added: tuple[Term, ...] = ()
        lhs, rhs = op.args[-2:]
        if packet(op) in (aten.baddbmm, aten.addmm):
            addend = op.args[0]
            beta, alpha = op.kwargs.get("beta", 1), op.kwargs.get("alpha", 1)
            if beta != 0:
                operand = Operand(addend, axes.unbroadcast(labels, addend.shape), read_at=op.time)
                added = (Term(operand, factor.times(Factor(float(beta))), depth),)
            factor = factor.times(Factor(float(alpha)))
        *batch, m, n = labels
        contracted = axes.fresh(lhs.shape[-1])
        left = terms.operand(lhs, (*batch, m, contracted), op.time)
        right = terms.operand(rhs, (*batch, contracted, n), op.time)
        if flat(n) == flat(self.keys):
            return _Above(left, right, flat(*batch), m, contracted, factor, added)
        if flat(m) == flat(self.keys):
            return _Above(right, left, flat(*batch), n, contracted, factor, added)
        raise Declined(Reason.SOFTMAX_AXIS if _multiplies_activations(op) else Reason.NO_PRODUCT)

    # Down: from the probabilities to the product with the values

    def _down(self) -> tuple[Operand, Operand, Label, int]:
        """Values, result, the head axis of the values, and when the product is made."""
        value, labels = self.softmax.outputs[0], self.labels
        for _ in range(_MAX_STEPS):
            readers = _live_readers(value)
            if any(_is_dropout(op) for op in readers):
                raise Declined(Reason.DROPOUT)
            if value.escapes or len(readers) != 1:
                raise Declined(Reason.PROBABILITIES_USED if readers else Reason.NOT_CONTRACTED)
            op = readers[0]
            kind = packet(op)
            if kind in (aten.bmm, aten.mm):
                return self._weighted_sum(op, value, labels)
            pushed = axes.push(op, labels) if op.args and op.args[0] is value else None
            if pushed is None:
                if not any(_leads_to_product(out) for out in op.outputs):
                    raise Declined(Reason.NOT_CONTRACTED)
                raise Declined(Reason.UNKNOWN_OP_AFTER, f"{kind or op.target}".removeprefix("aten."))
            value, labels = op.outputs[0], pushed
        raise Declined(Reason.NOT_CONTRACTED)

    def _weighted_sum(self, op: Op, value: Value, labels: Labels) -> tuple[Operand, Operand, Label, int]:
        lhs, rhs = op.args
        if lhs is rhs:
            raise Declined(Reason.PROBABILITIES_USED)
        if lhs is value:
            *batch, m, contracted = labels
            n = head = axes.fresh(rhs.shape[-1])
            v = terms.operand(rhs, (*batch, contracted, n), op.time)
        else:
            *batch, contracted, n = labels
            m = head = axes.fresh(lhs.shape[-2])
            v = terms.operand(lhs, (*batch, m, contracted), op.time)
        if flat(contracted) != flat(self.keys):
            raise Declined(Reason.NOT_CONTRACTED)
        out, out_labels = op.outputs[0], (*batch, m, n)
        while not out.nodes:
            readers = _live_readers(out)
            pushed = axes.push(readers[0], out_labels) if len(readers) == 1 and not out.escapes else None
            if pushed is None:
                raise Declined(Reason.UNREADABLE, "the result stays inside an opaque call")
            out, out_labels = readers[0].outputs[0], pushed
        return v, Operand(out, out_labels), head, op.time

    # What must hold before anything is replaced

    def _check(self, site: Site) -> None:
        inputs = [site.q, site.k, site.v]
        inputs += [term.operand for term in (*site.biases, *site.key_terms)]
        inputs += [site.select.mask] if site.select is not None else []
        for operand in inputs:
            if self.reading.written_between(operand.value, operand.read_at, site.ends_at):
                raise Declined(Reason.INPUT_OVERWRITTEN)
        for tensor, _ in site.scale.tensors:
            if self.reading.written_between(tensor, tensor.time, site.ends_at):
                raise Declined(Reason.INPUT_OVERWRITTEN)
        if site.dtype not in validation.DTYPES:
            raise Declined(Reason.DTYPE, str(site.dtype))
        _check_device(site.q.value.tensor.device, site.dtype)
        if len(site.roles.c) > 1 or len(site.roles.d) > 1:
            raise Declined(Reason.TIED)
        c, d = _size_of(site.roles.c, site.q), _size_of(site.roles.d, site.v)
        # A symbolic head size becomes a guard here, as in any of inductor's choices.
        if not axes.same_size(c, d) or not (1 <= d <= validation.MAX_HEAD_SIZE):
            raise Declined(Reason.HEAD_SIZE, f"queries {c}, values {d}")
        if not (site.biases or site.key_terms or site.select):
            raise Declined(Reason.PLAIN_ATTENTION)
        if not math.isfinite(site.scale.number):
            raise Declined(Reason.UNKNOWN_OP, "the scale is not finite")


def _check_device(device: torch.device, dtype: torch.dtype) -> None:
    if device.type not in validation.DEVICE_TYPES:
        raise Declined(Reason.DEVICE, device.type)
    if validation.needs_triton(device, dtype) and importlib.util.find_spec("triton") is None:
        raise Declined(Reason.NO_TRITON)


def _size_of(label: Label, operand: Operand) -> Size:
    """The extent of a label that labels one axis of the operand; 1 when it labels none."""
    sizes = zip(operand.labels, operand.value.shape, strict=True)
    return next((size for axis, size in sizes if label and flat(axis) == flat(label)), 1)


def _live_readers(value: Value) -> list[Op]:
    return [op for op in value.readers if op.is_live]


def _has_one_reader(value: Value) -> bool:
    return not value.escapes and len(_live_readers(value)) == 1


def _reaches_product(value: Value, steps: int = 16) -> bool:
    """Whether some way up, through ops that keep the size, leads to a product as large."""
    op = value.op
    if op is None or steps == 0:
        return False
    if packet(op) in _PRODUCTS:
        return _multiplies_activations(op)
    return any(
        _reaches_product(source, steps - 1)
        for source in op.inputs
        if axes.same_size(source.tensor.numel(), value.tensor.numel()) and source.dtype.is_floating_point
    )


def _multiplies_activations(op: Op) -> bool:
    """False for a Linear, one side of which is a parameter: an input of the graph seen through views."""
    if packet(op) not in (aten.mm, aten.addmm):
        return True
    return not any(isinstance(arg, Value) and _is_input(arg) for arg in op.args[-2:])


def _is_input(value: Value) -> bool:
    """An input of the graph, perhaps seen through views and casts."""
    while value.op is not None:
        pulled = axes.pull(value, axes.fresh_labels(value))
        if pulled is None:
            return False
        value = pulled[0]
    return True


def _leads_to_product(value: Value, steps: int = 8) -> bool:
    if steps == 0:
        return False
    for op in _live_readers(value):
        if packet(op) in _PRODUCTS:
            if _multiplies_activations(op):
                return True
        elif any(_leads_to_product(out, steps - 1) for out in op.outputs):
            return True
    return False


def _is_dropout(op: Op) -> bool:
    """`native_dropout`, or a product with noise."""
    if packet(op) is aten.native_dropout:
        return True
    seen = [value.op for value in op.inputs]
    for _ in range(3):
        if any(packet(source) in (aten.bernoulli, aten.rand_like) for source in seen if source is not None):
            return True
        seen = [value.op for source in seen if source is not None for value in source.inputs]
    return False


def _common_dtype(q: Operand, k: Operand, v: Operand) -> torch.dtype:
    """What the op computes in: float32 wins over a half type, as eager does one product in each."""
    dtypes = {q.dtype, k.dtype, v.dtype}
    return dtypes.pop() if len(dtypes) == 1 else torch.promote_types(q.dtype, v.dtype)
