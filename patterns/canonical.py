"""A graph re-read as ATen: what every node computes, said in one small dialect.

Torch spells one thing in many ways (method, function, operator, in-place, einsum, einops). Re-running the graph's
nodes on fake tensors under a dispatch mode turns all of them, opaque Python calls included, into a few dozen ATen
overloads: einsum and matmul become `bmm` between views, autocast becomes explicit casts, dropout that is off
vanishes. The reading is thrown away after matching; the user's graph is what gets edited.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from trifast_inductor.patterns import nodes
from trifast_inductor.patterns.recording import Op, Reading, Recorder, Value, Whole, storage_of

log = logging.getLogger(__name__)

# Nodes that only switch a global state which the reading holds still: gradients are off throughout.
_SKIPPED_STATE = {"_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode", "inference_mode"}


def read(graph: fx.Graph) -> Reading | None:
    """Re-run the nodes of a graph on their own fake tensors; None when it holds no tensors to run on."""
    fake_mode = nodes.fake_mode_of(graph)
    if fake_mode is None:
        return None
    with nodes.under(fake_mode), Recorder() as recorder, Whole(recorder):
        return _Rerun(graph, fake_mode, recorder).run()


class _Rerun:
    def __init__(self, graph: fx.Graph, fake_mode: FakeTensorMode, recorder: Recorder) -> None:
        self.graph = graph
        self.fake_mode = fake_mode
        self.recorder = recorder
        self.env: dict[fx.Node, Any] = {}
        self.unread: list[fx.Node] = []
        self.roots: list[Value] = []
        self.bodies: list[fx.Graph] = []
        self.given_to_vmap: set[int] = set()
        self.is_as_recorded = True

    def run(self) -> Reading:
        self._look_for_changed_shapes(self.graph)
        outputs_of: dict[fx.Node, Value] = {}
        with nodes.autocast_left_as_found() as regions:
            for node in self.graph.nodes:
                if node.op == "output":
                    self._escape(node)
                    continue
                result = self.env[node] = self._evaluate(node, regions)
                if isinstance(result, torch.Tensor):
                    value = self.recorder.value_of(result)
                    value.nodes.append(node)
                    outputs_of[node] = value
        self._mark_live()
        recorder = self.recorder
        return Reading(
            recorder.ops, recorder.writes, outputs_of, self.env, self.unread, self.bodies, recorder.input_storages
        )

    def _look_for_changed_shapes(self, graph: fx.Graph) -> None:
        """A tensor that changes its shape in place was recorded with the shape that it has at the end."""
        self.is_as_recorded &= not any(map(nodes.changes_shape_in_place, graph.nodes))

    def _through(self, node: fx.Node, body: fx.Graph) -> Any:
        """The results of a region, re-run node by node. None of its nodes stands for a value of the outer graph."""
        self._look_for_changed_shapes(body)
        name = getattr(node.target, "__name__", "")
        arguments = fx.node.map_arg(node.args[nodes.BODY_AT[name] + 1 :], self.env.__getitem__)
        placeholders = [inner for inner in body.nodes if inner.op == "placeholder"]
        self.env.update(zip(placeholders, arguments, strict=True))
        with nodes.autocast_left_as_found() as regions:
            if name == "wrap_with_autocast":
                regions.append(torch.amp.autocast_mode._enter_autocast(*node.args[: nodes.BODY_AT[name]]))
            for inner in body.nodes:
                if inner.op not in ("placeholder", "output"):
                    self.env[inner] = self._evaluate(inner, regions)
        self.bodies.append(body)
        return fx.node.map_arg(body.output_node().args[0], self.env.__getitem__)

    def _evaluate(self, node: fx.Node, regions: list[Any]) -> Any:
        if node.op in ("placeholder", "get_attr"):
            return nodes.example_of(node) if nodes.is_only_a_weight(node) else self._input(node)
        if nodes.name_of(node) in _SKIPPED_STATE:
            return None
        if nodes.is_autocast(node):
            return nodes.switch_autocast(node, self.env, regions)
        if node.meta.get("unbacked_bindings"):
            # A size that only the data know: run again, it would be another, of which nothing is known.
            self._escape(node)
            return self._input(node)
        body = nodes.region_body(node)
        if body is None and not nodes.can_rerun(node):
            return self._unread(node)
        whole = nodes.OPAQUE[nodes.base_name(node)] if nodes.is_projection(node) else None
        known = whole or self._plain(node)
        if known is not None and self.is_as_recorded and not self.recorder.knows(nodes.example_of(node)):
            return self._as_recorded(node, known)
        view = self._view(node) if self.is_as_recorded else None
        if view is not None:
            return view
        try:
            if whole is not None:
                return self.recorder.run_whole(whole, *nodes.arguments(node, self.env))
            return nodes.call(node, self.env) if body is None else self._through(node, body)
        except Exception as error:
            log.debug("%s cannot be re-run and is taken as an input: %s", node, error)
            return self._unread(node)

    def _as_recorded(self, node: fx.Node, target: Any) -> Any:
        """The result that the tracer recorded; running these again, taken apart, is most of a reading."""
        result = nodes.example_of(node)
        args, kwargs = nodes.arguments(node, self.env)
        self.recorder.record(target, args, kwargs, result)
        return result

    def _view(self, node: fx.Node) -> Any:
        """The result that the tracer recorded, if it is a view of what this reading has as its source."""
        source = self.env.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        result = nodes.example_of(node)
        if not isinstance(source, FakeTensor) or not isinstance(result, FakeTensor) or self.recorder.knows(result):
            return None
        if result.dtype != source.dtype or storage_of(result) != storage_of(source):
            return None
        call = nodes.view_call(node, source, result)
        if call is None:
            return None
        self.recorder.record(*call, {}, result)
        return result

    def _plain(self, node: fx.Node) -> Any:
        """The ATen op that a node is, where neither autocast nor promotion changes a dtype."""
        target = nodes.PLAIN.get(node.target)
        if target is None or node.kwargs or len(node.args) > 2:  # torch.add(x, alpha, y) has a third
            return None
        given = [self.env.get(argument) for argument in node.args if isinstance(argument, fx.Node)]
        tensors = [*given, nodes.example_of(node)]
        if not isinstance(node.args[0], fx.Node) or not all(isinstance(t, FakeTensor) for t in tensors):
            return None
        if any(t.dtype != tensors[-1].dtype for t in tensors):
            return None
        if target is nodes.aten.matmul.default and any(t.dim() < 3 for t in tensors):  # a Linear in disguise
            return None
        return target

    def _input(self, node: fx.Node) -> Any:
        example = nodes.example_of(node)
        if example is None and node.op == "get_attr":
            example = nodes.attribute(node.graph, str(node.target))
        return pytree.tree_map(self._as_input, example)

    def _as_input(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or nodes.is_batched(leaf):
            return None if isinstance(leaf, torch.Tensor) else leaf
        with torch.utils._python_dispatch._disable_current_modes():
            is_fake = isinstance(leaf, FakeTensor)
            fake = (leaf if is_fake else self.fake_mode.from_tensor(leaf, static_shapes=True)).detach()
        self.recorder.add_input(fake)
        return fake

    def _unread(self, node: fx.Node) -> Any:
        """Take a node's recorded result as an input; whatever it was given may be kept or written."""
        self.unread.append(node)
        self.recorder.time += 1
        self._escape(node)
        given = {
            storage_of(leaf)
            for argument in node.all_input_nodes
            for leaf in pytree.tree_leaves(self.env.get(argument))
            if isinstance(leaf, torch.Tensor)
        }
        if nodes.is_of_vmap(node):  # one such node may write what an earlier one was given
            self.given_to_vmap |= given
            given = self.given_to_vmap
        for storage in given:
            self.recorder.note_change(storage)
        return self._input(node)

    def _escape(self, node: fx.Node) -> None:
        for argument in node.all_input_nodes:
            for leaf in pytree.tree_leaves(self.env.get(argument)):
                if isinstance(leaf, torch.Tensor):
                    value = self.recorder.value_of(leaf)
                    value.escapes = True
                    self.roots.append(value)

    def _mark_live(self) -> None:
        """An op lives if something outside the graph can see its effect."""
        waiting: list[Op | None] = [value.op for value in self.roots]
        waiting += [op for op in self.recorder.ops if self._writes_to_input(op)]
        while waiting:
            op = waiting.pop()
            if op is not None and not op.is_live:
                op.is_live = True
                waiting.extend(value.op for value in op.reads)

    def _writes_to_input(self, op: Op) -> bool:
        return isinstance(op.target, torch._ops.OpOverload) and any(
            argument.is_write and isinstance(arg, Value) and arg.storage in self.recorder.input_storages
            for argument, arg in zip(op.target._schema.arguments, op.args, strict=False)
        )
