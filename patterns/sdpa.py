"""`scaled_dot_product_attention` whose mask holds a pair bias: the sum that it is given need never be expanded."""

from __future__ import annotations

import math
from typing import Any

from trifast_inductor.patterns import axes, terms
from trifast_inductor.patterns.axes import Label, flat
from trifast_inductor.patterns.logits import Logits
from trifast_inductor.patterns.recording import Op, Value
from trifast_inductor.patterns.site import Declined, Factor, Operand, Reason, Select, Term
from trifast_inductor.patterns.values import Weighted

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


def read(op: Op) -> tuple[Logits, Weighted, Label]:
    """Both products of one call, and its key axis; raises `Declined`."""
    options: dict[str, Any] = {**_DEFAULTS, **dict(zip(_NAMES, op.args, strict=False)), **op.kwargs}
    q, k, v = options["query"], options["key"], options["value"]
    mask = options["attn_mask"]
    if options["dropout_p"] != 0:
        raise Declined(Reason.DROPOUT)
    if mask is None and not options["is_causal"]:
        raise Declined(Reason.PLAIN_ATTENTION)
    if options["is_causal"]:
        raise Declined(Reason.PAIR_SELECT, "is_causal")
    if options["enable_gqa"]:
        raise Declined(Reason.UNKNOWN_OP, "enable_gqa")
    scale = options["scale"]
    if scale is None:
        scale = q.shape[-1] ** -0.5 if isinstance(q.shape[-1], int) else None
    if not isinstance(scale, (int, float)):
        raise Declined(Reason.UNDECIDED_SIZES, "the scale is symbolic")
    out = op.outputs[0]
    *batch, queries, head = axes.fresh_labels(out)
    keys, contracted = axes.fresh(k.shape[-2]), axes.fresh(q.shape[-1])

    def operand(value: Value, *last: Label) -> Operand:
        return terms.operand(value, axes.unbroadcast((*batch, *last), value.shape), op.time)

    added: tuple[Term, ...] = ()
    selects: tuple[Select, ...] = ()
    masking = Operand(mask, axes.unbroadcast((*batch, queries, keys), mask.shape), read_at=op.time)
    if mask.dtype.is_floating_point:
        added = (Term(masking, Factor(), 0),)
    else:
        selects = (Select(masking, True, -math.inf, 0),)
    logits = Logits(
        operand(q, queries, contracted),
        operand(k, keys, contracted),
        flat(*batch),
        flat(queries),
        contracted,
        Factor(float(scale)),
        added,
        selects,
    )
    values = operand(v, keys, head)
    if not out.nodes:
        raise Declined(Reason.UNREADABLE, "the result stays inside an opaque call")
    return logits, Weighted(values, Operand(out, (*batch, queries, head)), head, op.time, zeroes_nan=True), keys
