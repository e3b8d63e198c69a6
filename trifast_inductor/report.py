"""What the pass did to each softmax: rows, and the table a person reads."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import fx

from trifast_inductor.kernels.triangle_attention.op import implementation
from trifast_inductor.patterns.axes import Label, flat
from trifast_inductor.patterns.recording import Value
from trifast_inductor.patterns.site import Reason, Refusal, Site

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
UNKNOWN_LOCATION = "unknown location"
_TORCH = str(Path(torch.__file__).parent)


@dataclasses.dataclass(frozen=True)
class Row:
    """One softmax.

    `sizes` maps the roles B, R, H, I, J, D to their sizes when it was rewritten; `kernel` is what runs there:
    "triton" on CUDA, "torch" (a few rows at a time) for CPU tensors and float64.
    """

    rewritten: bool
    location: str
    sizes: dict[str, str] = dataclasses.field(default_factory=dict)
    dtype: str = ""
    bias: str = ""
    mask: str = ""
    kernel: str = ""
    reason: str = ""
    message: str = ""
    looks_like_attention: bool = True

    def __str__(self) -> str:
        if not self.rewritten:
            return f"declined: {self.message}"
        sizes = " ".join(f"{role}={size}" for role, size in self.sizes.items())
        return f"{sizes} {self.dtype}, bias: {self.bias}, mask: {self.mask}, kernel: {self.kernel}"


def row_of(found: Site | Refusal) -> Row:
    if isinstance(found, Refusal):
        return declined_row(found.reason, found.detail, location(found.softmax))
    roles = found.roles
    by_name = {"B": roles.b, "R": roles.r, "H": roles.h, "I": roles.i, "J": roles.j, "D": roles.d}
    return Row(
        rewritten=True,
        location=location(found.softmax),
        sizes={name: _size(label) for name, label in by_name.items()},
        dtype=str(found.dtype).removeprefix("torch."),
        bias="none" if not found.biases else "pair" if len(found.biases) == 1 else f"{len(found.biases)} terms",
        mask=_mask(found),
        kernel=implementation(found.q.value.tensor.device, found.dtype),
    )


def declined_row(reason: Reason, detail: str = "", location: str = UNKNOWN_LOCATION) -> Row:
    return Row(
        rewritten=False,
        location=location,
        reason=reason.slug,
        message=reason.message(detail),
        looks_like_attention=reason.looks_like_attention,
    )


def _mask(site: Site) -> str:
    kinds = []
    if site.key_terms:
        kinds.append("additive")
    if site.masks.keys:
        kinds.append(f"select {site.masks.fill:g}")
    if site.masks.pairs:
        kinds.append("pairs -inf")
    if site.masks.queries:
        kinds.append("queries")
    return ", ".join(kinds) or "none"


def _size(label: Label) -> str:
    sizes = [str(atom.size) for atom in flat(label)]
    return "*".join(sizes) if sizes else "1"


def location(value: Value) -> str:
    """`file:line (function)` of the user's code, from the nearest node that knows."""
    places = (location_of(node) for node in _nearest_nodes(value))
    return next((place for place in places if place != UNKNOWN_LOCATION), UNKNOWN_LOCATION)


def location_of(node: fx.Node) -> str:
    """`file:line (function)` of the user's code that made a node."""
    frames = [frame.groupdict() for frame in _FRAME.finditer(node.meta.get("stack_trace") or "")]
    if not frames:
        return UNKNOWN_LOCATION
    users = [frame for frame in frames if not frame["file"].startswith(_TORCH)]
    return "{file}:{line} ({function})".format(**(users or frames)[-1])


def _nearest_nodes(value: Value) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    queue, seen = [value], set[int]()
    while queue and len(nodes) < 4 and len(seen) < 64:
        current = queue.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        nodes += current.nodes
        queue += [out for op in current.readers for out in op.outputs]
    return nodes


@dataclasses.dataclass(frozen=True)
class Report:
    """Every softmax of a model, in the order in which its graphs were compiled."""

    rows: tuple[Row, ...]
    graphs: int

    @property
    def rewritten(self) -> int:
        return sum(row.rewritten for row in self.rows)

    @property
    def declined(self) -> int:
        return sum(row.looks_like_attention and not row.rewritten for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {
            "graphs": self.graphs,
            "rewritten": self.rewritten,
            "declined": self.declined,
            "sites": [dataclasses.asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        lines = []
        for (status, place, text), count in self._counted():
            times = f"{count} x " if count > 1 else ""
            lines += [f"{times}{status}  {place}", f"    {text}"]
        others = len(self.rows) - self.rewritten - self.declined
        summary = (
            f"{self.rewritten} rewritten, {self.declined} declined, {others} other softmax in {self.graphs} graph"
            + ("s" if self.graphs != 1 else "")
        )
        return "\n".join([*lines, summary])

    def _counted(self) -> list[tuple[tuple[str, str, str], int]]:
        """Equal rows once, with their number: a stack of blocks repeats itself."""
        counts: dict[tuple[str, str, str], int] = {}
        for row in self.rows:
            status = "rewritten" if row.rewritten else "declined" if row.looks_like_attention else "not ours"
            key = (status, row.location, str(row))
            counts[key] = counts.get(key, 0) + 1
        return list(counts.items())
