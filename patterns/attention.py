"""From a softmax to a `Site` or a `Refusal`.

`logits` walks up from what the softmax reads to the product of queries and keys, `values` down from the
probabilities to the product with the values, `terms` sorts what was passed by the axes it varies over. Here the
three are put together, and what must hold before anything is replaced is checked.
"""

from __future__ import annotations

import logging
import math

import torch

from trifast_inductor.kernels.triangle_attention import validation
from trifast_inductor.patterns import axes, logits, narrowing, scaling, sdpa, terms, values
from trifast_inductor.patterns.axes import Label, aten, flat, packet
from trifast_inductor.patterns.logits import Logits
from trifast_inductor.patterns.products import is_input
from trifast_inductor.patterns.recording import Op, Reading, Size
from trifast_inductor.patterns.site import Declined, Factor, Operand, Reason, Refusal, Roles, Site
from trifast_inductor.patterns.values import Weighted

log = logging.getLogger(__name__)

_ANCHORS = {aten._softmax, aten._safe_softmax, aten.scaled_dot_product_attention}


def find(reading: Reading) -> list[Site | Refusal]:
    """One entry for every softmax whose result is used, in the order of the graph."""
    return [_look_at(op, reading) for op in reading.ops if op.is_live and packet(op) in _ANCHORS]


def _look_at(anchor: Op, reading: Reading) -> Site | Refusal:
    try:
        if packet(anchor) is aten.scaled_dot_product_attention:
            site = _assemble(anchor, reading, *sdpa.read(anchor))
            if not site.biases or not flat(site.roles.r):
                raise Declined(Reason.PLAIN_ATTENTION, "no rows share a bias")
        else:
            site = _assemble(anchor, reading, *_around(anchor))
        _check(site, reading)
    except Declined as declined:
        return Refusal(anchor.outputs[0], declined.reason, declined.detail)
    except Exception as error:
        log.warning("a softmax could not be read; it is compiled as it is", exc_info=True)
        return Refusal(anchor.outputs[0], Reason.UNREADABLE, type(error).__name__)
    return site


def _around(softmax: Op) -> tuple[Logits, Weighted, Label]:
    read, probabilities = softmax.args[0], softmax.outputs[0]
    labels = axes.fresh_labels(read)
    keys = labels[softmax.args[1]]
    if len(read.shape) >= 4 and is_input(read):
        raise Declined(Reason.GRAPH_BREAK)
    if not keys:
        raise Declined(Reason.SOFTMAX_AXIS, "the axis has size 1")
    above = logits.read(read, labels, keys)
    below = values.read(probabilities, labels, keys)
    return above, below, keys


def _assemble(anchor: Op, reading: Reading, above: Logits, below: Weighted, keys: Label) -> Site:
    kinds = terms.sort(above.terms, above.selects, above.batch, above.queries, keys)
    q, k, scale, dtype = narrowing.operands(above, below.v)
    q, q_scale, q_writes = scaling.unscaled(q, below.ends_at, reading)
    k, k_scale, k_writes = scaling.unscaled(k, below.ends_at, reading)
    return Site(
        softmax=anchor.outputs[0],
        q=q,
        k=k,
        v=below.v,
        out=below.out,
        biases=kinds.biases,
        key_terms=kinds.key_terms,
        masks=kinds.masks,
        scale=scale.times(Factor(q_scale * k_scale)),
        key_term_first=kinds.key_term_first,
        masked_rows_are_zero=below.zeroes_nan or packet(anchor) is aten._safe_softmax,
        roles=Roles(
            b=kinds.b,
            r=kinds.r,
            h=kinds.h,
            i=kinds.i,
            j=flat(keys),
            c=flat(above.contracted),
            d=flat(below.head),
        ),
        dtype=dtype,
        ends_at=below.ends_at,
        undone_writes=tuple(dict.fromkeys((*q_writes, *k_writes))),
    )


def _check(site: Site, reading: Reading) -> None:
    """What must hold before anything is replaced."""
    terms = (*site.biases, *site.key_terms)
    factors = (site.scale, *(term.factor for term in terms))
    inputs = [site.q, site.k, site.v, *(term.operand for term in terms), *(part.operand for part in site.masks.all)]
    inputs += [tensor for factor in factors for tensor, _ in factor.tensors]
    for operand in inputs:
        if reading.written_between(operand.value, operand.read_at, site.ends_at, ignoring=site.undone_writes):
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
    if not (terms or site.masks.all):
        raise Declined(Reason.PLAIN_ATTENTION)
    if not math.isfinite(site.scale.number):
        raise Declined(Reason.UNKNOWN_OP, "the scale is not finite")


def _check_device(device: torch.device, dtype: torch.dtype) -> None:
    if device.type not in validation.DEVICE_TYPES:
        raise Declined(Reason.DEVICE, device.type)
    if validation.needs_triton(device, dtype) and not validation.triton_works():
        raise Declined(Reason.NO_TRITON)


def _size_of(label: Label, operand: Operand) -> Size:
    """The extent of a label that labels one axis of the operand; 1 when it labels none."""
    sizes = zip(operand.labels, operand.value.shape, strict=True)
    return next((size for axis, size in sizes if label and flat(axis) == flat(label)), 1)
