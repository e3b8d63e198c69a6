"""Addends and masks sorted by the axes they vary over, and with them the roles of the axes.

| varies over | is |
|---|---|
| query and key | a pair bias; the batch axes it lacks are rows |
| key, perhaps batch and rows, no gradient | a key term |
| a sum, or a product of masks, of smaller things | each of them |
| row, query and key | as large as the logits: declined |
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import guard_scalar

from trifast_inductor.patterns import axes, masks
from trifast_inductor.patterns.axes import Atom, Label, Labels, aten, flat, packet
from trifast_inductor.patterns.recording import Value
from trifast_inductor.patterns.site import Declined, Factor, MaskPart, Masks, Operand, Reason, Select, Term


def number_of(x: Any) -> float | None:
    """The Python number that an argument is, or that a tensor is known to hold everywhere."""
    if isinstance(x, bool):
        return None
    if isinstance(x, (int, float)):
        return float(x)
    if isinstance(x, (torch.SymInt, torch.SymFloat)):
        # As in inductor, a number that decides how code is made is guarded on. One read from data has no hint.
        return float(guard_scalar(x)) if x.node.has_hint() else None
    if not isinstance(x, Value):
        return None
    constant = getattr(x.tensor, "constant", None)
    if constant is not None and constant.numel() == 1:
        return float(constant.item())
    kind = packet(x.op)
    if kind in (aten.full, aten.full_like, aten.new_full, aten.scalar_tensor, aten.fill):
        assert x.op is not None
        position = 0 if kind is aten.scalar_tensor else 2 if kind is aten.new_full else 1
        number = number_of(x.op.args[position])
        # A fill value that does not fit is rounded when it is stored.
        return None if number is None else float(torch.tensor(number, dtype=x.dtype).item())
    if kind in (aten.zeros, aten.zeros_like, aten.new_zeros):
        return 0.0
    if kind in (aten.ones, aten.ones_like, aten.new_ones):
        return 1.0
    if kind is aten.detach and x.op is not None:
        return number_of(x.op.args[0])
    pulled = axes.pull(x, axes.fresh_labels(x))
    return number_of(pulled[0]) if pulled is not None else None


def operand(value: Value, labels: Labels, read_at: int) -> Operand:
    """The nearest tensor of the user's graph from which `value` differs by layout and casts only."""
    start = Operand(value, labels, read_at=read_at)
    for candidate in _upwards(start):
        if candidate.value.nodes:
            return candidate
    return start


def _upwards(operand: Operand) -> list[Operand]:
    """`operand` and everything above it that differs by layout and casts only, nearest first."""
    found = [operand]
    while (op := found[-1].value.op) is not None:
        last = found[-1]
        pulled = axes.pull(last.value, last.labels)
        if pulled is None:
            break
        source, labels = pulled
        casts = last.casts
        if source.dtype != last.value.dtype:
            casts = (last.value.dtype, *casts)
        found.append(Operand(source, labels, casts, min(last.read_at, op.time)))
    return found


def without_copies(operand: Operand, known: Label) -> Operand:
    """The nearest source in which nothing is repeated: a bias before it was expanded over the rows."""
    candidates = _upwards(operand)
    sources = [o for o in candidates if o.atoms <= set(flat(known))]
    if not sources:
        raise Declined(Reason.UNDECIDED_SIZES)
    fewest = min(len(o.atoms) for o in sources)
    smallest = [o for o in sources if len(o.atoms) == fewest]
    return next((o for o in smallest if o.value.nodes), smallest[0])


@dataclasses.dataclass(frozen=True)
class Sorted:
    biases: tuple[Term, ...]
    key_terms: tuple[Term, ...]
    masks: Masks
    key_term_first: bool
    b: Label
    r: Label
    h: Label
    i: Label


@dataclasses.dataclass(frozen=True)
class _Fill:
    """One part of one select."""

    part: MaskPart
    value: float
    depth: int

    @property
    def atoms(self) -> frozenset[Atom]:
        return self.part.atoms


def sort(terms: tuple[Term, ...], selects: tuple[Select, ...], batch: Label, queries: Label, keys: Label) -> Sorted:
    """Give every term its kind and every atom its role, or decline.

    `batch`, `queries` and `keys` are the axes of the logits; queries may turn out to hold rows that the keys lack.
    """
    known = (*batch, *queries, *keys)
    leaves = [leaf for term in terms for leaf in _split(term, known)]
    fills = [fill for select in selects for fill in _fills(select, queries, keys, known)]

    # Only now are the atoms as fine as they get: reading the terms may have split some.
    queries, keys = flat(queries), flat(keys)
    # Of one query there is no axis to vary over, and an addend for each key that needs a gradient is a pair bias.
    over_keys = [t for t in leaves if _meet(t.atoms, keys)]
    pairs = [t for t in over_keys if (_meet(t.atoms, queries) if queries else t.requires_grad)]
    pair_fills = [f for f in fills if _meet(f.atoms, keys) and _meet(f.atoms, queries)]
    paired = _atoms(*pairs, *pair_fills)
    i = tuple(atom for atom in queries if atom in paired) if paired else queries
    batch = (*flat(batch), *(atom for atom in queries if atom not in i))
    if any(fill.value != -math.inf for fill in pair_fills):
        raise Declined(Reason.PAIR_SELECT)

    key_terms: list[Term] = []
    for term in leaves:
        if term in pairs:
            continue
        if _meet(term.atoms, keys) and not term.requires_grad:
            key_terms.append(term)
        elif term.atoms <= paired | set(i) | set(keys):
            pairs.append(term)
        elif _meet(term.atoms, keys):
            raise Declined(Reason.TERM_NEEDS_GRADIENT)
        else:
            raise Declined(Reason.QUERY_TERM)
    query_fills = [f for f in fills if f not in pair_fills and _meet(f.atoms, i)]
    key_fills = [f for f in fills if f not in pair_fills and f not in query_fills]
    selected = _masks(key_fills, pair_fills, query_fills, pairs, key_terms)

    over_pairs = _atoms(*pairs, *pair_fills)
    pair_atoms = [*(t.atoms for t in pairs), *(f.atoms for f in pair_fills)]
    if over_pairs and over_pairs >= set(batch) and over_pairs not in pair_atoms:
        # Only together are they as large as the logits: one of them lacks the rows.
        raise Declined(Reason.FULL_TERM)
    masked = _atoms(*key_terms, *key_fills, *query_fills) - set(keys) - set(i)

    b = tuple(atom for atom in batch if atom in over_pairs and atom in masked)
    r = tuple(atom for atom in batch if atom not in over_pairs)
    h = tuple(atom for atom in batch if atom in over_pairs and atom not in masked)
    if not over_pairs:
        r, h = tuple(a for a in batch if a in masked), tuple(a for a in batch if a not in masked)
    elif not masked:
        # Without a mask nothing tells heads from batches, and nothing depends on it.
        b, h = h[:-1], h[-1:]
    first = _key_term_first(pairs, key_terms, key_fills)
    return Sorted(tuple(pairs), tuple(key_terms), selected, first, b, r, h, i)


def _atoms(*of: Term | _Fill) -> set[Atom]:
    return {atom for x in of for atom in x.atoms}


def varies(operand: Operand, label: Label) -> bool:
    return _meet(operand.atoms, label)


def _meet(atoms: frozenset[Atom], label: Label) -> bool:
    return any(atom in atoms for atom in flat(label))


def _fills(select: Select, queries: Label, keys: Label, known: Label) -> list[_Fill]:
    """A mask over queries and keys together is taken apart when it is a product."""
    whole = without_copies(select.mask, known)
    parts = [MaskPart(whole, not select.keeps)]
    if varies(whole, queries) and varies(whole, keys):
        parts = [
            dataclasses.replace(part, operand=without_copies(part.operand, known))
            for part in masks.parts(select.mask, not select.keeps)
        ]
    return [_Fill(part, select.fill, select.depth) for part in parts]


def _masks(
    keys: list[_Fill], pairs: list[_Fill], queries: list[_Fill], biases: list[Term], key_terms: list[Term]
) -> Masks:
    """The selects as the op can apply them, or decline."""
    values = {fill.value for fill in keys}
    if any(math.isnan(value) for value in values):
        raise Declined(Reason.FILL_NOT_CONSTANT)
    if len(values) > 1:
        raise Declined(Reason.SEVERAL_KEY_TERMS, "several fill values")
    if values and values != {-math.inf}:
        if key_terms:
            raise Declined(Reason.SEVERAL_KEY_TERMS, "a select and an addend")
        depths = [fill.depth for fill in keys]
        if any(min(depths) < term.depth < max(depths) for term in biases):
            raise Declined(Reason.SEVERAL_KEY_TERMS, "a bias between two selects")
    for fill in queries:
        earlier = [term.depth for term in (*biases, *key_terms)]
        earlier += [other.depth for other in (*keys, *pairs) if other.value != fill.value]
        if not math.isfinite(fill.value) or any(depth < fill.depth for depth in earlier):
            raise Declined(Reason.QUERY_TERM)
    return Masks(
        values.pop() if values else 0.0,
        tuple(fill.part for fill in keys),
        tuple(fill.part for fill in pairs),
        tuple(fill.part for fill in queries),
    )


def _split(term: Term, known: Label) -> list[Term]:
    """A sum is taken apart as long as a part is smaller than the whole."""
    operand = without_copies(term.operand, known)
    factor = dataclasses.replace(
        term.factor, tensors=tuple((without_copies(t, known), divides) for t, divides in term.factor.tensors)
    )
    term = Term(operand, factor, term.depth)
    total = next((o for o in _upwards(operand) if packet(o.value.op) in (aten.add, aten.sub)), None)
    if total is None:
        return [term]
    op = total.value.op
    assert op is not None
    first, second = op.args[:2]
    alpha = op.kwargs.get("alpha", 1)
    if not (isinstance(first, Value) and isinstance(second, Value) and isinstance(alpha, (int, float))):
        return [term]
    parts = []
    for value, sign in ((first, 1.0), (second, float(alpha) if packet(op) is aten.add else -float(alpha))):
        labels = axes.unbroadcast(total.labels, value.shape)
        part = Operand(value, labels, total.casts, min(total.read_at, op.time))
        parts.append(Term(part, term.factor.times(Factor(sign)), term.depth))
    split = [leaf for part in parts for leaf in _split(part, known)]
    return split if any(leaf.operand.atoms < operand.atoms for leaf in split) else [term]


def _key_term_first(pairs: list[Term], key_terms: list[Term], fills: list[_Fill]) -> bool:
    """Deeper means nearer to the product, so applied earlier."""
    depths = [t.depth for t in key_terms] + [f.depth for f in fills]
    bias_depths = [t.depth for t in pairs]
    if not depths or not bias_depths:
        return False
    needs_order = any(fill.value != -math.inf for fill in fills)
    if needs_order and any(min(bias_depths) < depth < max(bias_depths) for depth in depths):
        raise Declined(Reason.SEVERAL_KEY_TERMS, "biases before and after a select")
    return min(depths) > max(bias_depths)
