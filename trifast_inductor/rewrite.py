"""The pass object: runs the patterns over one graph, counts, logs, and gives compile caches its uuid."""

from __future__ import annotations

import collections
import functools
import glob
import json
import logging
import weakref
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.virtualized import V
from torch._logging._internal import trace_structured

from trifast_inductor.errors import DeclinedError
from trifast_inductor.kernels.triangle_attention import op, validation
from trifast_inductor.patterns import attention, canonical, nodes, recheck
from trifast_inductor.patterns.lower import Lowering
from trifast_inductor.patterns.recording import Reading
from trifast_inductor.patterns.site import Declined, Reason, Refusal, Site
from trifast_inductor.report import Row, declined_row, location_of, row_of

log = logging.getLogger(__name__)
GraphPass = Callable[[fx.Graph], None]


@functools.cache
def sources_hash() -> bytes:
    """Every source file of the package: what a compiled artifact was rewritten with."""
    package = Path(__file__).parent
    # Path.rglob does not go through links, and in a checkout kernels and patterns are links.
    return get_hash_for_files(tuple(sorted(glob.glob(f"{glob.escape(str(package))}/**/*.py", recursive=True))))


class TriangleAttentionPass(CustomGraphPass):  # type: ignore[misc]  # inductor is untyped here
    """Replace every triangle attention of a pre-grad graph by the fused op.

    `before` is a pass that was there already and keeps running, first. `packages_kernels` puts the Triton kernel into
    what AOTInductor makes for CUDA, instead of a call by name; see docs/recipes/aot_inductor.md. On torch 2.11 the
    instance is pickled into the cache key, so everything that changes the result is an attribute.
    """

    def __init__(
        self, *, strict: bool = False, before: GraphPass | None = None, packages_kernels: bool = False
    ) -> None:
        self.strict = strict
        self.before = before
        self.packages_kernels = packages_kernels
        self.sources = sources_hash().hex()

    def __call__(self, graph: fx.Graph) -> None:
        if self.before is not None:
            self.before(graph)
        rows = rewrite(graph, strict=self.strict, packages_kernels=self.packages_kernels)
        if any(row.rewritten for row in rows):
            # Not before: importing inductor's lowerings asks for the GPUs, after which a process cannot fork.
            from trifast_inductor.kernels.triangle_attention import inductor

            inductor.install()

    def uuid(self) -> Any | None:
        if self.before is None:
            return (self.sources, self.strict, self.packages_kernels)
        uuid = getattr(self.before, "uuid", lambda: None)()
        return None if uuid is None else (uuid, self.sources, self.strict, self.packages_kernels)


def rewrite(graph: fx.Graph, *, strict: bool = False, packages_kernels: bool = False) -> list[Row]:
    """Rewrite a graph in place and say what was done; never fails, unless `strict` and something was declined."""
    try:
        rows, read_through = _rewrite(graph, packages_kernels) if _mentions_softmax(graph) else ([], [])
    except Exception:
        log.warning("the graph could not be read; it is compiled as it is", exc_info=True)
        rows, read_through = [declined_row(Reason.UNREADABLE, "an exception, which the log shows")], []
    rows = _settled(graph, rows, read_through)
    _count(rows)
    _log(rows)
    left_alone = [row for row in rows if not row.rewritten and row.looks_like_attention]
    if strict and left_alone:
        raise DeclinedError("\n".join(f"{row.location}: {row.message}" for row in left_alone))
    return rows


def rewrite_all(gm: fx.GraphModule) -> list[Row]:
    """Rewrite a module and the bodies that it holds, where no inductor visits them: bodies first, as it does."""
    rows = []
    for module in reversed(list(gm.modules())):
        if isinstance(module, fx.GraphModule):
            rows += rewrite(module.graph)
            module.recompile()
    return rows


# Opaque calls, einops' and einx's among them, may hold a softmax of their own; torch's functions show theirs.
_TRANSPARENT_MODULES = ("torch", "_operator", "builtins", "math")


def _mentions_softmax(graph: fx.Graph) -> bool:
    for node in graph.nodes:
        if _is_softmax(node) or _is_flex_attention(node) or "scaled_dot_product" in _name_of(node):
            return True
        if node.op == "call_function":
            module = getattr(node.target, "__module__", None) or "torch"
            if module.partition(".")[0] not in _TRANSPARENT_MODULES:
                return True
            body = nodes.region_body(node)
            if body is not None and _mentions_softmax(body):
                return True
    return False


def _is_softmax(node: fx.Node) -> bool:
    if node.op == "call_module" and node.graph.owning_module is not None:
        return "softmax" in type(node.graph.owning_module.get_submodule(str(node.target))).__name__.lower()
    return node.op in ("call_function", "call_method") and "softmax" in _name_of(node)


def _is_flex_attention(node: fx.Node) -> bool:
    return node.target is torch.ops.higher_order.flex_attention


def _name_of(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _rewrite(graph: fx.Graph, packages_kernels: bool) -> tuple[list[Row], list[fx.Graph]]:
    """What became of each softmax, and the bodies of regions whose softmaxes are among them."""
    fake_mode = nodes.fake_mode_of(graph)
    before = canonical.read(graph)
    if before is None or fake_mode is None:
        return [declined_row(Reason.UNREADABLE, "its nodes carry no example values")], []
    found = attention.find(before)
    lowered: dict[int, Lowering] = {}
    try:
        for index, site in enumerate(found):
            if isinstance(site, Site):
                lowering = Lowering(site, graph, before, fake_mode)
                refusal = _lower(lowering)
                if refusal is None:
                    lowered[index] = lowering
                else:
                    found[index] = refusal
        failure = _failure(graph, before, lowered.values())
        if failure is not None:
            _undo(lowered)
            for index, lowering in lowered.items():
                found[index] = Refusal(lowering.site.softmax, failure.reason, failure.detail)
        if packages_kernels and V.aot_compilation:
            _package(lowered.values())
    except BaseException:
        _undo(lowered)
        raise
    rows = [row_of(each) for each in found]
    for node in before.unread:
        if _is_softmax(node) and nodes.is_of_vmap(node):
            rows.append(declined_row(Reason.VMAP, location=location_of(node)))
        elif _is_softmax(node):
            rows.append(declined_row(Reason.UNREADABLE, "the softmax cannot be re-run", location_of(node)))
        elif _is_flex_attention(node):
            rows.append(declined_row(Reason.ALREADY_FUSED, location=location_of(node)))
    return rows, before.bodies


def _lower(lowering: Lowering) -> Refusal | None:
    """Write one site into the graph, or leave the graph as it is and say why."""
    softmax = lowering.site.softmax
    try:
        lowering.apply()
    except Declined as declined:
        return Refusal(softmax, declined.reason, declined.detail)
    except Exception as error:
        log.warning("a site could not be lowered; it is compiled as it is", exc_info=True)
        return Refusal(softmax, Reason.UNREADABLE, f"its replacement cannot be written: {type(error).__name__}")
    return None


def _undo(lowered: dict[int, Lowering]) -> None:
    # The last first: a site may read nodes, of sizes above all, that an earlier one wrote.
    for lowering in reversed(lowered.values()):
        lowering.undo()


def _package(lowered: Iterable[Lowering]) -> None:
    """Where a package is made ahead of time, call the op that lets the kernel itself into the package."""
    calls = [node for lowering in lowered for node in lowering.written if node.target is op.triangle_attention]
    for node in calls:
        q = nodes.example_of(node.all_input_nodes[0])
        zeroes_rows = len(node.args) > 9  # which the packaged op does not do
        if q.device.type == "cuda" and validation.needs_triton(q.device, q.dtype) and not zeroes_rows:
            from trifast_inductor.kernels.triangle_attention import packaged

            node.target = packaged.triangle_attention


def _failure(graph: fx.Graph, before: Reading, lowered: Collection[Lowering]) -> Declined | None:
    """Why the rewritten graph cannot stay; its results get eager's strides where a reader depends on them."""
    if not lowered or _runs_as_before(graph, before, lowered):
        return None
    try:
        for lowering in lowered:
            lowering.restore_strides()
    except Declined as declined:
        return declined
    if _runs_as_before(graph, before, lowered):
        return None
    return Declined(Reason.UNREADABLE, "the rewritten graph does not run")


def _runs_as_before(graph: fx.Graph, before: Reading, lowered: Iterable[Lowering]) -> bool:
    results = {lowering.result: lowering.replaced for lowering in lowered if lowering.result is not None}
    return recheck.runs_as_read(graph, before, results)


# Refusals in bodies that export cut out of a program, until the graph around them has been read. Inductor visits a
# body before that graph, which may read through it and find the rest of the attention.
_held: weakref.WeakKeyDictionary[fx.Graph, list[Row]] = weakref.WeakKeyDictionary()


def _settled(graph: fx.Graph, rows: list[Row], read_through: list[fx.Graph]) -> list[Row]:
    """The rows that are final: of a body cut out by export what was rewritten, and else those held of its bodies."""
    if _held and graph.owning_module is not None:
        for module in graph.owning_module.children():
            if isinstance(module, fx.GraphModule):
                held = _held.pop(module.graph, [])
                rows = rows if module.graph in read_through else rows + held
    if rows and _is_cut_out(graph):
        _held[graph] = [row for row in rows if not row.rewritten]
        return [row for row in rows if row.rewritten]
    return rows


def _is_cut_out(graph: fx.Graph) -> bool:
    """Export marks the program that it returns; the bodies inside carry no marks."""
    exported = any("val" in node.meta and "example_value" not in node.meta for node in graph.nodes)
    return exported and not getattr(graph.owning_module, "meta", {})


# For each compile of Dynamo's that is under way: which attempt at it was counted last, and what that counted.
_counted: weakref.WeakKeyDictionary[Any, tuple[int, collections.Counter[str]]] = weakref.WeakKeyDictionary()


def _count(rows: list[Row]) -> None:
    """Add to the counters; Dynamo may start a compile over, and then only the last attempt counts."""
    added: collections.Counter[str] = collections.Counter()
    for row in rows:
        if row.rewritten:
            added["rewritten"] += 1
        elif row.looks_like_attention:
            added.update(("declined", f"declined: {row.reason}"))
    counters["trifast"].update(added)
    context = torch._guards.CompileContext.try_get()
    if context is None:
        return
    attempt, earlier = _counted.get(context, (context.attempt, collections.Counter()))
    if context.attempt != attempt:
        counters["trifast"].subtract(earlier)
        earlier = collections.Counter()
    _counted[context] = (context.attempt, earlier + added)


def _log(rows: list[Row]) -> None:
    if not rows:
        return
    rewritten = sum(row.rewritten for row in rows)
    left_alone = sum(row.looks_like_attention and not row.rewritten for row in rows)
    log.info("triangle_attention: %d rewritten, %d declined of %d softmax", rewritten, left_alone, len(rows))
    for row in rows:
        if not row.rewritten:
            log.debug("triangle_attention: %s: %s", row.location, row)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "trifast_sites", "encoding": "json"},
        payload_fn=lambda: json.dumps([{"location": row.location, "what": str(row)} for row in rows]),
    )
