"""Labels on axes, carried through layout ops in both directions.

An axis of a tensor is labelled by the atoms it is made of, outermost first: `(b, r)` for rows folded into the batch,
`()` for an axis of size 1. An atom that meets a reshape which cuts through it is split, everywhere at once. An axis
that a tensor was broadcast along simply is not among the labels of the tensor before the broadcast: that is how a
bias that was expanded or repeated over rows is known for what it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.functions import FloorDiv

from trifast_inductor.patterns.recording import Op, Size, Value

aten = torch.ops.aten
Extent: TypeAlias = "int | sympy.Expr"


class Atom:
    """One indivisible index. `parts` are set when it turns out to be a product."""

    def __init__(self, size: Extent) -> None:
        self.size = size
        self.parts: tuple[Atom, ...] | None = None

    def split(self, outer: Extent, inner: Extent) -> tuple[Atom, Atom]:
        parts = (Atom(outer), Atom(inner))
        self.parts = parts
        return parts


Label = tuple[Atom, ...]
Labels = tuple[Label, ...]


def extent(size: Size) -> Extent:
    """A size as an int or a polynomial of symbols, so that equality and factors are decided by sympy."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    exact = expr.replace(lambda e: isinstance(e, FloorDiv), _exact_quotient)
    return int(exact) if exact.is_Integer else exact


def _exact_quotient(floor: Any) -> Any:
    """`(n*n)//n` is n; a quotient that leaves a remainder stays as it is."""
    quotient = sympy.cancel(floor.args[0] / floor.args[1])
    return quotient if sympy.denom(quotient) == 1 else floor


def quotient(a: Extent, b: Extent) -> Extent | None:
    """a / b when it is provably whole."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b != 0 and a % b == 0 else None
    if b == 0:
        return None
    q = sympy.cancel(sympy.sympify(a) / b)
    if sympy.denom(q) != 1:
        return None
    return int(q) if q.is_Integer else q


def same_size(a: Size, b: Size) -> bool:
    """Provably equal; no guard is added."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(extent(a) == extent(b) or statically_known_true(a == b))


def is_one(size: Size) -> bool:
    return isinstance(size, int) and size == 1


def flat(*labels: Label) -> Label:
    """The atoms of some labels in order, splits applied."""
    atoms: list[Atom] = []
    for label in labels:
        for atom in label:
            atoms += flat(atom.parts) if atom.parts is not None else (atom,)
    return tuple(atoms)


def fresh(size: Size) -> Label:
    return () if is_one(size) else (Atom(extent(size)),)


def fresh_labels(value: Value) -> Labels:
    return tuple(fresh(size) for size in value.shape)


def regroup(labels: Labels, shape: Iterable[Size]) -> Labels | None:
    """The labels of the same elements, in the same order, under another shape; None if it cannot be decided."""
    return _cut(flat(*labels), [extent(size) for size in shape])


def _cut(atoms: Label, extents: Sequence[Extent]) -> Labels | None:
    """Deal a row of atoms out to axes of the given extents, splitting an atom where an axis ends inside it."""
    queue = list(atoms)
    axes: list[Label] = []
    for missing in extents:
        label: list[Atom] = []
        while missing != 1:
            if not queue:
                return None
            atom = queue.pop(0)
            rest = quotient(missing, atom.size)
            if rest is None:
                inner = quotient(atom.size, missing)
                if inner is None:
                    return None
                atom, remainder = atom.split(missing, inner)
                queue.insert(0, remainder)
                rest = 1
            label.append(atom)
            missing = rest
        axes.append(tuple(label))
    return None if queue else tuple(axes)


def unbroadcast(labels: Labels, shape: Sequence[Size]) -> Labels:
    """Labels of an operand of the given shape which is broadcast to a result that has these labels."""
    aligned = labels[len(labels) - len(shape) :]
    return tuple(() if is_one(size) else label for label, size in zip(aligned, shape, strict=True))


_RESHAPES = {aten.view, aten._unsafe_view, aten.unsqueeze, aten.squeeze, aten.reshape, aten._reshape_alias}
_COPIES = {aten.clone, aten.alias, aten._to_copy, aten.lift_fresh, aten.lift_fresh_copy, aten.lift}


def packet(op: Op | None) -> Any:
    """`aten.add` for any overload, in place or not; None for an input."""
    target = getattr(op, "target", None)
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name.removeprefix("aten::")
    if name.endswith("_") and not name.endswith("__"):
        return getattr(aten, name[:-1], target.overloadpacket)
    return target.overloadpacket


def is_copy(op: Op | None) -> bool:
    """The same numbers in the same places, perhaps in another dtype."""
    if op is None or packet(op) not in _COPIES:
        return False
    return op.inputs[0].tensor.device == op.outputs[0].tensor.device


def _permutation(op: Op, rank: int) -> list[int] | None:
    kind = packet(op)
    order = list(range(rank))
    if kind is aten.permute:
        return [dim % rank for dim in op.args[1]]
    if kind is aten.transpose:
        a, b = op.args[1] % rank, op.args[2] % rank
        order[a], order[b] = order[b], order[a]
        return order
    if kind is aten.t:
        return order[::-1]
    return None


def pull(value: Value, labels: Labels) -> tuple[Value, Labels] | None:
    """One layout op upwards: what it read and the labels of that; None when it is no layout op."""
    op = value.op
    if op is None or not op.args:
        return None
    kind = packet(op)
    if kind in (aten.cat, aten.stack) and len(op.inputs) == 1:  # what einops' pack makes of one tensor
        regrouped = regroup(labels, op.inputs[0].shape)
        return None if regrouped is None else (op.inputs[0], regrouped)
    source = op.args[0]
    if not isinstance(source, Value):
        return None
    if is_copy(op):
        return source, labels
    if kind in _RESHAPES:
        regrouped = regroup(labels, source.shape)
        return None if regrouped is None else (source, regrouped)
    order = _permutation(op, len(source.shape))
    if order is not None:
        unpermuted: list[Label] = [()] * len(order)
        for position, dim in enumerate(order):
            unpermuted[dim] = labels[position]
        return source, tuple(unpermuted)
    if kind is aten.expand:
        return source, unbroadcast(labels, source.shape)
    if kind is aten.repeat:
        unrepeated = _unrepeated(source, value, labels)
        return None if unrepeated is None else (source, unrepeated)
    if kind in (aten.select, aten.unbind):
        dim = (op.args[1] if len(op.args) > 1 else 0) % len(source.shape)
        return source, (*labels[:dim], fresh(source.shape[dim]), *labels[dim:])
    if kind in (aten.slice, aten.split, aten.split_with_sizes, aten.narrow):
        return source, _cut_labels(source, value, labels)
    return None


def _cut_labels(source: Value, value: Value, labels: Labels) -> Labels:
    """An axis that was cut is another index before the cut."""
    return tuple(
        label if same_size(before, after) else fresh(before)
        for label, before, after in zip(labels, source.shape, value.shape, strict=True)
    )


def _unrepeated(source: Value, value: Value, labels: Labels) -> Labels | None:
    """`repeat` puts the copies outside: an axis of r copies of n is (r, n), and the source has the n."""
    inner: list[Label] = []
    for label, after, before in zip(labels[::-1], value.shape[::-1], source.shape[::-1], strict=False):
        if same_size(after, before):
            inner.append(label)
            continue
        copies = quotient(extent(after), extent(before))
        halves = None if copies is None else _cut(flat(label), (copies, extent(before)))
        if halves is None:
            return None
        inner.append(halves[1])
    return tuple(inner[::-1])


def push(op: Op, labels: Labels) -> Labels | None:
    """One layout op downwards: the labels of its result, given those of what it read."""
    out = op.outputs[0]
    kind = packet(op)
    if is_copy(op):
        return labels
    if kind in _RESHAPES:
        return regroup(labels, out.shape)
    order = _permutation(op, len(labels))
    if order is not None:
        return tuple(labels[dim] for dim in order)
    if kind in (aten.expand, aten.slice):
        source = op.inputs[0]
        unchanged = len(source.shape) == len(out.shape) and all(
            same_size(a, b) for a, b in zip(source.shape, out.shape, strict=True)
        )
        return labels if unchanged else None
    return None
