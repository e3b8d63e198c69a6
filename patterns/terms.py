"""Addends and masks sorted by the axes they vary over, and with them the roles of the axes.

| varies over | is |
|---|---|
| query and key | a pair bias; the batch axes it lacks are rows |
| key, perhaps batch and rows, no gradient | a key term |
| a sum of smaller things | each of them |
| row, query and key | as large as the logits: declined |
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from trifast_inductor.patterns import axes
from trifast_inductor.patterns.axes import Atom, Label, Labels, aten, flat, packet
from trifast_inductor.patterns.canonical import Value
from trifast_inductor.patterns.site import Declined, Factor, Operand, Reason, Select, Term


def number_of(x: Any) -> float | None:
    """The Python number that an argument is, or that a tensor is known to hold everywhere."""
    if isinstance(x, bool):
        return None
    if isinstance(x, (int, float)):
        return float(x)
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
    select: Select | None
    key_term_first: bool
    b: Label
    r: Label
    h: Label
    i: Label


def sort(terms: tuple[Term, ...], selects: tuple[Select, ...], batch: Label, queries: Label, keys: Label) -> Sorted:
    """Give every term its kind and every atom its role, or decline.

    `batch`, `queries` and `keys` are the axes of the logits; queries may turn out to hold rows that the keys lack.
    """
    known = (*batch, *queries, *keys)
    leaves = [leaf for term in terms for leaf in _split(term, known)]
    if len(selects) > 1:
        raise Declined(Reason.SEVERAL_KEY_TERMS, "several selects")
    select = None
    if selects:
        select = dataclasses.replace(selects[0], mask=without_copies(selects[0].mask, known))

    # Only now are the atoms as fine as they get: reading the terms may have split some.
    queries, keys = flat(queries), flat(keys)
    pairs = [t for t in leaves if _varies(t.operand, keys) and _varies(t.operand, queries)]
    paired = {atom for t in pairs for atom in t.operand.atoms}
    i = tuple(atom for atom in queries if atom in paired) if pairs else queries
    batch = (*flat(batch), *(atom for atom in queries if atom not in i))

    key_terms: list[Term] = []
    for term in leaves:
        if term in pairs:
            continue
        if _varies(term.operand, keys) and not term.operand.value.requires_grad:
            key_terms.append(term)
        elif term.operand.atoms <= paired | set(i) | set(keys):
            pairs.append(term)
        elif _varies(term.operand, keys):
            raise Declined(Reason.TERM_NEEDS_GRADIENT)
        else:
            raise Declined(Reason.QUERY_TERM)
    over_pairs = {atom for t in pairs for atom in t.operand.atoms}
    masked = _masked(key_terms, select, i, keys)
    if any(t.factor.tensors for t in (*pairs, *key_terms)):
        raise Declined(Reason.UNKNOWN_OP, "a tensor scales the addends")
    if over_pairs >= set(batch) and any(_is_summed_over(t, batch) for t in pairs):
        raise Declined(Reason.FULL_TERM)

    b = tuple(atom for atom in batch if atom in over_pairs and atom in masked)
    r = tuple(atom for atom in batch if atom not in over_pairs)
    h = tuple(atom for atom in batch if atom in over_pairs and atom not in masked)
    if not pairs:
        r, h = tuple(a for a in batch if a in masked), tuple(a for a in batch if a not in masked)
    elif not masked:
        # Without a mask nothing tells heads from batches, and nothing depends on it.
        b, h = h[:-1], h[-1:]
    first = _key_term_first(pairs, key_terms, select)
    return Sorted(tuple(pairs), tuple(key_terms), select, first, b, r, h, i)


def _masked(key_terms: list[Term], select: Select | None, i: Label, keys: Label) -> set[Atom]:
    """The atoms, keys aside, over which the key term varies."""
    if select is None:
        return {atom for t in key_terms for atom in t.operand.atoms} - set(keys)
    if key_terms:
        raise Declined(Reason.SEVERAL_KEY_TERMS, "a select and an addend")
    atoms = set(select.mask.atoms)
    if atoms & set(i):
        raise Declined(Reason.PAIR_SELECT if atoms & set(keys) else Reason.QUERY_TERM)
    return atoms - set(keys)


def _varies(operand: Operand, label: Label) -> bool:
    return any(atom in operand.atoms for atom in flat(label))


def _is_summed_over(term: Term, batch: Label) -> bool:
    """A learned pair bias next to an addend with more axes: those are its rows, and the addend is N³."""
    return term.operand.value.requires_grad and any(atom not in term.operand.atoms for atom in batch)


def _split(term: Term, known: Label) -> list[Term]:
    """A sum is taken apart as long as a part is smaller than the whole."""
    operand = without_copies(term.operand, known)
    term = dataclasses.replace(term, operand=operand)
    op = operand.value.op
    if op is None or packet(op) not in (aten.add, aten.sub):
        return [term]
    first, second = op.args[:2]
    alpha = op.kwargs.get("alpha", 1)
    if not (isinstance(first, Value) and isinstance(second, Value) and isinstance(alpha, (int, float))):
        return [term]
    parts = []
    for value, sign in ((first, 1.0), (second, float(alpha) if packet(op) is aten.add else -float(alpha))):
        labels = axes.unbroadcast(operand.labels, value.shape)
        part = Operand(value, labels, operand.casts, min(operand.read_at, op.time))
        parts.append(Term(part, term.factor.times(Factor(sign)), term.depth))
    split = [leaf for part in parts for leaf in _split(part, known)]
    return split if any(leaf.operand.atoms < operand.atoms for leaf in split) else [term]


def _key_term_first(pairs: list[Term], key_terms: list[Term], select: Select | None) -> bool:
    """Deeper means nearer to the product, so applied earlier."""
    depths = [t.depth for t in key_terms] + ([select.depth] if select is not None else [])
    if not depths or not pairs:
        return False
    bias_depths = [t.depth for t in pairs]
    if select is not None and min(bias_depths) < select.depth < max(bias_depths):
        raise Declined(Reason.SEVERAL_KEY_TERMS, "biases before and after a select")
    return min(depths) > max(bias_depths)
