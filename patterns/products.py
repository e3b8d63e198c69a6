"""The contractions that attention is made of, in one form however they were spelled.

`bmm`, `mm`, `baddbmm` and `addmm` are what einsum, tensordot and products under autocast come down to; a plain matmul
is read as it is, its batch axes broadcast; `(a * b).sum(dim)` is the same by broadcasting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from trifast_inductor.patterns import axes
from trifast_inductor.patterns.axes import Label, Labels, aten, packet
from trifast_inductor.patterns.recording import Op, Value

MATRIX_PRODUCTS = {aten.matmul, aten.bmm, aten.mm, aten.baddbmm, aten.addmm}


@dataclasses.dataclass(frozen=True)
class Product:
    """`result = beta · addend + alpha · Σ_contracted lhs · rhs`, the labels being those of each operand's axes."""

    lhs: Value
    lhs_labels: Labels
    rhs: Value
    rhs_labels: Labels
    contracted: Label
    alpha: float = 1.0
    beta: float = 0.0
    addend: Value | None = None


def is_product(op: Op | None) -> bool:
    return packet(op) in MATRIX_PRODUCTS or multiplied(op) is not None


def multiplied(op: Op | None) -> Op | None:
    """The multiplication that a sum over one axis contracts; None when `op` is no such sum."""
    if op is None or packet(op) is not aten.sum or len(op.args) < 2 or not op.args[1] or len(op.args[1]) != 1:
        return None
    source = op.args[0]
    if not isinstance(source, Value) or source.op is None or packet(source.op) is not aten.mul:
        return None
    factors = source.op.args[:2]
    both = all(isinstance(factor, Value) and len(factor.shape) == len(source.shape) for factor in factors)
    return source.op if both and source.dtype.is_floating_point else None


def product(op: Op, labels: Labels) -> Product:
    """A contraction, given the labels of its result."""
    multiplication = multiplied(op)
    if multiplication is not None:
        return _broadcast_product(op, multiplication, labels)
    lhs, rhs = op.args[-2:]
    *batch, m, n = labels
    contracted = axes.fresh(lhs.shape[-1])
    product = Product(
        lhs,
        axes.unbroadcast((*batch, m, contracted), lhs.shape),
        rhs,
        axes.unbroadcast((*batch, contracted, n), rhs.shape),
        contracted,
    )
    if packet(op) not in (aten.baddbmm, aten.addmm):
        return product
    alpha, beta = float(op.kwargs.get("alpha", 1)), float(op.kwargs.get("beta", 1))
    return dataclasses.replace(product, alpha=alpha, beta=beta, addend=op.args[0])


def weighted(op: Op, lhs: Value, lhs_labels: Labels) -> tuple[Product, Labels] | None:
    """A contraction read from its left operand down: the product and the labels of its result.

    `lhs` may be either side. For the broadcast form `op` is the sum, and `lhs` a factor of what it sums.
    """
    multiplication = multiplied(op)
    if multiplication is not None:
        first, second = multiplication.args[:2]
        rhs = second if first is lhs else first
        dim = op.args[1][0] % len(lhs_labels)
        whole = tuple(
            axes.fresh(size) if axes.is_one(own) and not label else label
            for label, own, size in zip(lhs_labels, lhs.shape, multiplication.outputs[0].shape, strict=True)
        )
        keeps = len(op.args) > 2 and op.args[2]
        result = (*whole[:dim], *(((),) if keeps else ()), *whole[dim + 1 :])
        return Product(lhs, lhs_labels, rhs, axes.unbroadcast(whole, rhs.shape), whole[dim]), result
    if packet(op) not in MATRIX_PRODUCTS or not _is_bare(op):
        return None
    first, second = op.args[-2:]
    other = second if first is lhs else first
    *own_batch, _, _ = lhs_labels
    batch = _broadcast_batch(own_batch, lhs, op.outputs[0])
    if first is lhs:
        *_, m, contracted = lhs_labels
        n = axes.fresh(other.shape[-1])
        right = axes.unbroadcast((*batch, contracted, n), other.shape)
    else:
        *_, contracted, n = lhs_labels
        m = axes.fresh(other.shape[-2])
        right = axes.unbroadcast((*batch, m, contracted), other.shape)
    return Product(lhs, lhs_labels, other, right, contracted), (*batch, m, n)


def _broadcast_batch(own: Sequence[Label], operand: Value, result: Value) -> list[Label]:
    """Labels of the batch axes of a result, given those of one operand's, which may be fewer or of size 1."""
    sizes = result.shape[:-2]
    missing = len(sizes) - len(own)
    batch = [axes.fresh(size) for size in sizes[:missing]]
    for label, own_size, size in zip(own, operand.shape, sizes[missing:], strict=False):
        batch.append(axes.fresh(size) if axes.is_one(own_size) else label)
    return batch


def _is_bare(op: Op) -> bool:
    """Nothing but the product: no addend that counts, no factor."""
    has_addend = packet(op) in (aten.baddbmm, aten.addmm)
    return not has_addend or (op.kwargs.get("beta", 1) == 0 and op.kwargs.get("alpha", 1) == 1)


def _broadcast_product(op: Op, multiplication: Op, labels: Labels) -> Product:
    product = multiplication.outputs[0]
    lhs, rhs = multiplication.args[:2]
    dim = op.args[1][0] % len(product.shape)
    contracted = axes.fresh(product.shape[dim])
    keeps = len(op.args) > 2 and op.args[2]
    whole = (*labels[:dim], contracted, *labels[dim + (1 if keeps else 0) :])
    return Product(lhs, axes.unbroadcast(whole, lhs.shape), rhs, axes.unbroadcast(whole, rhs.shape), contracted)


def multiplies_activations(op: Op) -> bool:
    """False for a Linear, one side of which is a parameter: an input of the graph seen through views."""
    multiplication = multiplied(op)
    sides = multiplication.args[:2] if multiplication is not None else op.args[-2:]
    inputs = sum(isinstance(side, Value) and is_input(side) for side in sides)
    # Batched, two inputs may be queries and keys; a matrix product of two is the first Linear of a model.
    return inputs == 0 or (inputs == 2 and packet(op) not in (aten.mm, aten.addmm))


def is_input(value: Value) -> bool:
    """An input of the graph, perhaps seen through views and casts."""
    while value.op is not None:
        pulled = axes.pull(value, axes.fresh_labels(value))
        if pulled is None:
            return False
        value = pulled[0]
    return True


def reaches_product(value: Value, steps: int = 16) -> bool:
    """Whether some way up, through ops that keep the size, leads to a product as large."""
    level, seen = [value], {id(value)}
    for _ in range(steps):
        above: list[Value] = []
        for current in level:
            op = current.op
            if op is None:
                continue
            if is_product(op):
                if multiplies_activations(op):
                    return True
                continue
            for source in op.inputs:
                same = axes.same_size(source.tensor.numel(), value.tensor.numel())
                if same and source.dtype.is_floating_point and id(source) not in seen:
                    seen.add(id(source))
                    above.append(source)
        level = above
    return False


def leads_to_product(value: Value, steps: int = 8) -> bool:
    """Whether some live way down leads to a product of activations."""
    level, seen = [value], {id(value)}
    for _ in range(steps):
        below: list[Value] = []
        for current in level:
            for op in live_readers(current):
                if is_product(op):
                    if multiplies_activations(op):
                        return True
                    continue
                below += [out for out in op.outputs if id(out) not in seen]
                seen.update(id(out) for out in op.outputs)
        level = below
    return False


# What asks a tensor for its size, dtype and device, and not for its numbers.
_SHAPE_READERS = {
    *(aten.full_like, aten.zeros_like, aten.ones_like, aten.empty_like),
    *(aten.new_full, aten.new_zeros, aten.new_ones, aten.new_empty),
}


def live_readers(value: Value) -> list[Op]:
    return [op for op in value.readers if op.is_live and packet(op) not in _SHAPE_READERS]
