"""A graph re-read as ATen: what every node computes, said in one small dialect.

Torch spells one thing in many ways (method, function, operator, in-place, einsum, einops). Re-running the graph's
nodes on fake tensors under a dispatch mode turns all of them, opaque Python calls included, into a few dozen ATen
overloads: einsum and matmul become `bmm` between views, autocast becomes explicit casts, dropout that is off
vanishes. The reading is thrown away after matching; the user's graph is what gets edited.

A `Value` is one version of one tensor: an in-place write makes a new Value for the tensor written and a new,
unexplained one for every other view of its storage, so a stale alias can never be mistaken for what it once held.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

log = logging.getLogger(__name__)

Size = int | torch.SymInt
# The target of an `Op` that stands for an alias of something written in place.
REREAD = "reread after a write"


@dataclasses.dataclass(eq=False)
class Value:
    """One version of one tensor. `nodes` are the user's nodes that returned exactly this version."""

    tensor: torch.Tensor
    op: Op | None
    time: int
    nodes: list[fx.Node] = dataclasses.field(default_factory=list)
    readers: list[Op] = dataclasses.field(default_factory=list)
    escapes: bool = False

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def storage(self) -> int:
        return storage_of(self.tensor)

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is wanted: as the user's graph says, else if any input of the op wants one."""
        for node in self.nodes:
            example = example_of(node)
            if isinstance(example, torch.Tensor):
                return example.requires_grad
        return self.op is not None and any(value.requires_grad for value in self.op.reads)


@dataclasses.dataclass(eq=False)
class Op:
    """One ATen call: `args` and `kwargs` hold Values where the call had tensors."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Value]
    time: int
    is_live: bool = False

    @functools.cached_property
    def reads(self) -> list[Value]:
        found: list[Value] = []
        _collect((*self.args, *self.kwargs.values()), Value, found)
        return found

    @property
    def inputs(self) -> list[Value]:
        """What the op is computed from, as far as a pattern may look: not through a Linear or a LayerNorm."""
        return [] if self.target in _OPAQUE.values() else self.reads


def _collect(x: Any, kind: type, found: list[Any]) -> None:
    """Everything of a kind in the lists and tuples that ATen takes and returns; pytree would be slower."""
    if isinstance(x, kind):
        found.append(x)
    elif isinstance(x, (tuple, list)):
        for part in x:
            _collect(part, kind, found)


@dataclasses.dataclass(frozen=True)
class Write:
    """Something may have changed the storage at this time."""

    storage: int
    time: int


def example_of(node: fx.Node) -> Any:
    """What the tracer recorded for a node: Dynamo writes `example_value`, export writes `val`."""
    return node.meta.get("example_value", node.meta.get("val"))


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Recorder(TorchDispatchMode):
    """Writes down every ATen call made under it, on Values instead of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.writes: list[Write] = []
        self.time = 0
        self.input_storages: set[int] = set()
        self._current: dict[int, Value] = {}
        self._by_storage: dict[int, list[torch.Tensor]] = {}
        self._is_paused = False

    def value_of(self, tensor: torch.Tensor) -> Value:
        """The current version of a tensor; one never seen is an input."""
        value = self._current.get(id(tensor))
        return value if value is not None else self.add_input(tensor)

    def add_input(self, tensor: torch.Tensor) -> Value:
        self.input_storages.add(storage_of(tensor))
        return self._bind(tensor, None)

    def _bind(self, tensor: torch.Tensor, op: Op | None) -> Value:
        if id(tensor) not in self._current:
            self._by_storage.setdefault(storage_of(tensor), []).append(tensor)
        value = Value(tensor, op, self.time)
        self._current[id(tensor)] = value
        return value

    def note_write(self, tensor: torch.Tensor, op: Op | None) -> None:
        """Every other alias of what was written holds something new from here on."""
        storage = storage_of(tensor)
        self.writes.append(Write(storage, self.time))
        for alias in self._by_storage.get(storage, []):
            if alias is not tensor:
                stale = self._current[id(alias)]
                inputs = (stale, self._current[id(tensor)])
                reread = Op(REREAD, inputs, {}, [], self.time)
                reread.outputs.append(self._bind(alias, reread))
                self.ops.append(reread)
                for value in inputs:
                    value.readers.append(reread)

    def _as_value(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return self.value_of(x)
        return type(x)(map(self._as_value, x)) if type(x) in (tuple, list) else x

    def record(self, func: Any, args: Any, kwargs: Any, result: Any) -> Op:
        self.time += 1
        named = {name: self._as_value(x) for name, x in kwargs.items()}
        op = Op(func, self._as_value(tuple(args)), named, [], self.time)
        for value in op.reads:
            value.readers.append(op)
        results: list[torch.Tensor] = []
        _collect(result, torch.Tensor, results)
        op.outputs += [self._bind(out, op) for out in results]
        self.ops.append(op)
        return op

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        if not torch._C._dispatch_has_kernel(func.name()):  # questions about a tensor: its device, its sizes
            return func(*args, **kwargs)
        with self:
            decomposed = func.decompose(*args, **kwargs)
        if decomposed is not NotImplemented:
            return decomposed
        result = func(*args, **kwargs)
        self._write_down(func, args, kwargs, result)
        return result

    def run_whole(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op that is read as one thing, whatever it is made of."""
        self._is_paused = True
        try:
            result = func(*args, **kwargs)
        finally:
            self._is_paused = False
        self._write_down(func, args, kwargs, result)
        return result

    def _write_down(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        op = self.record(func, args, kwargs, result)
        for argument, written in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(written, torch.Tensor):
                self.note_write(written, op)


class _Whole(TorchFunctionMode):
    """Attention called by name is one op, before autograd's dispatch takes it apart."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            func = torch.ops.aten.scaled_dot_product_attention.default
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            return self.recorder.run_whole(func, args, kwargs)
        return func(*args, **kwargs)


@dataclasses.dataclass
class Reading:
    """The whole graph, read. `outputs_of[node]` is the Value a user's node returned.

    `results` is the same before it was put into Values, and for all nodes; `bodies` are the graphs of regions that
    were read through, `unread` the nodes that had to be taken as inputs, `input_storages` the memory of all inputs.
    """

    ops: list[Op]
    writes: list[Write]
    outputs_of: dict[fx.Node, Value]
    results: dict[fx.Node, Any]
    unread: list[fx.Node]
    bodies: list[fx.Graph]
    input_storages: set[int]

    @property
    def end(self) -> int:
        """The time of the last op."""
        return self.ops[-1].time if self.ops else 0

    def written_between(self, value: Value, start: int, end: int, ignoring: Sequence[fx.Node] = ()) -> bool:
        """Whether the storage of a value may have changed after `start` and up to `end`, some nodes aside."""
        ignored = {op.time for node in ignoring if (op := self.outputs_of[node].op) is not None}
        return any(w.storage == value.storage and start < w.time <= end and w.time not in ignored for w in self.writes)


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    for node in graph.nodes:
        for leaf in pytree.tree_leaves(example_of(node)):
            if isinstance(leaf, FakeTensor):
                return leaf.fake_mode
    return None


# Nodes that only switch a global state which the reading holds still: gradients are off throughout.
_SKIPPED_STATE = {"_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode", "inference_mode"}


def region_body(node: fx.Node) -> fx.Graph | None:
    """The graph that a node runs as a part of its own, under another autocast or gradient mode; None for the rest.

    Export cuts such a region out into a body of its own, so an attention may lie on both sides of the cut:
    OpenFold's softmax is alone in an autocast region.
    """
    position = _BODY_AT.get(getattr(node.target, "__name__", "")) if node.op == "call_function" else None
    if position is None or len(node.args) <= position:
        return None
    body = node.args[position]
    if not isinstance(body, fx.Node) or body.op != "get_attr":
        return None
    module = _attribute(node.graph, str(body.target))
    return module.graph if isinstance(module, fx.GraphModule) else None


# Where among its arguments such a call has its body; those of the body follow.
_BODY_AT = {"wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1}


def _attribute(graph: fx.Graph, path: str) -> Any:
    found: Any = graph.owning_module
    for part in path.split("."):
        found = getattr(found, part)
    return found


def read(graph: fx.Graph) -> Reading | None:
    """Re-run the nodes of a graph on their own fake tensors; None when it holds no tensors to run on."""
    fake_mode = fake_mode_of(graph)
    if fake_mode is None:
        return None
    with _under(fake_mode), Recorder() as recorder, _Whole(recorder):
        return _Rerun(graph, fake_mode, recorder).run()


@contextlib.contextmanager
def _under(fake_mode: FakeTensorMode) -> Iterator[None]:
    """Where nodes are re-run: on fake tensors, with no gradients, and leaving no guard behind."""
    with contextlib.ExitStack() as stack:
        if fake_mode.shape_env is not None:
            stack.enter_context(fake_mode.shape_env.suppress_guards())
            stack.enter_context(fake_mode.shape_env.ignore_fresh_unbacked_symbols())
        stack.enter_context(torch.no_grad())
        # With symbolic sizes matmul and its like are taken apart by rules written in Python.
        stack.enter_context(enable_python_dispatcher())
        stack.enter_context(fake_mode)
        yield


def runs_as_read(graph: fx.Graph, reading: Reading, stands_for: Mapping[fx.Node, fx.Node]) -> bool:
    """Whether a rewritten graph still runs, and all that leaves it has the strides that it had.

    Args:
        reading: of the graph before.
        stands_for: the nodes written in the place of others, with what they replace.

    Only what a changed layout reaches is run again, until the layouts are the old ones.
    """
    fake_mode = fake_mode_of(graph)
    assert fake_mode is not None
    changed: dict[fx.Node, Any] = {}
    seen: set[fx.Node] = set()
    with _under(fake_mode), _autocast_left_as_found() as regions:
        for node in graph.nodes:
            if not seen.issuperset(node.all_input_nodes):
                return False
            seen.add(node)
            if node in stands_for:
                result = _detached(example_of(node))
            elif node not in reading.results and node.op != "output":  # written for a site, and run then
                continue
            elif _is_autocast(node):
                reading.results[node] = _switch_autocast(node, reading.results, regions)
                continue
            elif changed.keys().isdisjoint(node.all_input_nodes):
                continue
            elif node in reading.unread or not _can_rerun(node):
                return False
            else:
                try:
                    result = _call(node, collections.ChainMap(changed, reading.results))
                except Exception as error:
                    log.debug("%s does not run on what the rewrite gives it: %s", node, error)
                    return False
            if not _same_layout(result, reading.results[stands_for.get(node, node)]):
                changed[node] = result
    return True


def _detached(example: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, example)


def _same_layout(a: Any, b: Any) -> bool:
    leaves, structure = pytree.tree_flatten(a)
    others, other_structure = pytree.tree_flatten(b)
    return structure == other_structure and all(map(_same_leaf, leaves, others))


def _same_leaf(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if (a.dtype, a.device, a.dim()) != (b.dtype, b.device, b.dim()):
            return False
        sizes = zip((*a.shape, *a.stride()), (*b.shape, *b.stride()), strict=True)
        return all(statically_known_true(size == other) for size, other in sizes)
    if isinstance(a, (int, torch.SymInt)) and isinstance(b, (int, torch.SymInt)):
        return statically_known_true(a == b)
    return bool(a is b or (type(a) is type(b) and a == b))


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

    def run(self) -> Reading:
        outputs_of: dict[fx.Node, Value] = {}
        with _autocast_left_as_found() as regions:
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

    def _through(self, node: fx.Node, body: fx.Graph) -> Any:
        """The results of a region, re-run node by node. None of its nodes stands for a value of the outer graph."""
        name = getattr(node.target, "__name__", "")
        arguments = fx.node.map_arg(node.args[_BODY_AT[name] + 1 :], self.env.__getitem__)
        placeholders = [inner for inner in body.nodes if inner.op == "placeholder"]
        self.env.update(zip(placeholders, arguments, strict=True))
        with _autocast_left_as_found() as regions:
            if name == "wrap_with_autocast":
                regions.append(torch.amp.autocast_mode._enter_autocast(*node.args[: _BODY_AT[name]]))
            for inner in body.nodes:
                if inner.op not in ("placeholder", "output"):
                    self.env[inner] = self._evaluate(inner, regions)
        self.bodies.append(body)
        return fx.node.map_arg(body.output_node().args[0], self.env.__getitem__)

    def _evaluate(self, node: fx.Node, regions: list[Any]) -> Any:
        if node.op in ("placeholder", "get_attr"):
            return example_of(node) if _is_only_a_weight(node) else self._input(node)
        if _name_of(node) in _SKIPPED_STATE:
            return None
        if _is_autocast(node):
            return _switch_autocast(node, self.env, regions)
        if node.meta.get("unbacked_bindings"):
            # A size that only the data know: run again, it would be another, of which nothing is known.
            self._escape(node)
            return self._input(node)
        body = region_body(node)
        if body is None and not _can_rerun(node):
            return self._unread(node)
        if _is_projection(node):
            return self._as_recorded(node, _OPAQUE[_base_name(node)])
        if _base_name(node) == "matmul" and self._is_plain_product(node):
            return self._as_recorded(node, torch.ops.aten.matmul.default)
        try:
            return _call(node, self.env) if body is None else self._through(node, body)
        except Exception as error:
            log.debug("%s cannot be re-run and is taken as an input: %s", node, error)
            return self._unread(node)

    def _as_recorded(self, node: fx.Node, target: Any) -> Any:
        """The result that the tracer recorded; running these again, taken apart, is most of a reading."""
        result = example_of(node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.env.__getitem__)
        self.recorder.record(target, args, kwargs, result)
        return result

    def _is_plain_product(self, node: fx.Node) -> bool:
        """Two stacks of matrices in one dtype: neither a Linear in disguise nor cast by autocast."""
        given = [self.env.get(argument) for argument in node.args if isinstance(argument, fx.Node)]
        tensors = [*given, example_of(node)]
        if len(given) != 2 or node.kwargs or not all(isinstance(t, FakeTensor) for t in tensors):
            return False
        return all(t.dim() >= 3 and t.dtype == tensors[0].dtype for t in tensors)

    def _input(self, node: fx.Node) -> Any:
        example = example_of(node)
        if example is None and node.op == "get_attr":
            example = _attribute(node.graph, str(node.target))
        return pytree.tree_map(self._as_input, example)

    def _as_input(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or _is_batched(leaf):
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
        if _is_of_vmap(node):  # one such node may write what an earlier one was given
            self.given_to_vmap |= given
            given = self.given_to_vmap
        self.recorder.writes += [Write(storage, self.recorder.time) for storage in given]
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


def _name_of(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _can_rerun(node: fx.Node) -> bool:
    """Tensor functions only: a call without a recorded result may have effects outside the graph."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator) or _is_of_vmap(node):
        return False
    return example_of(node) is not None or getattr(node.target, "__module__", "") == "_operator"


# What no pattern looks through, by the name of the node.
_OPAQUE = {"linear": torch.ops.aten.linear.default, "layer_norm": torch.ops.aten.layer_norm.default}


def _is_of_vmap(node: fx.Node) -> bool:
    """Opens or closes a level of torch.func, or works on its tensors, which have no memory of their own to speak of."""
    if getattr(node.target, "__module__", "") == "torch._functorch.predispatch":
        return True
    return any(_is_batched(example_of(part)) for part in (node, *node.all_input_nodes))


def _is_batched(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x)


def _base_name(node: fx.Node) -> str:
    return _name_of(node).removesuffix(".default")


def _is_projection(node: fx.Node) -> bool:
    """A LayerNorm, or a Linear whose weight comes into the graph, so that it is no product of activations."""
    if _base_name(node) not in _OPAQUE or not isinstance(example_of(node), FakeTensor):
        return False
    if _base_name(node) == "layer_norm":
        return True
    weight = node.args[1] if len(node.args) > 1 else None
    return isinstance(weight, fx.Node) and weight.op in ("placeholder", "get_attr")


def _is_only_a_weight(node: fx.Node) -> bool:
    """An input that only projections read, and not as what they project: it is taken as it is."""
    return isinstance(example_of(node), FakeTensor) and all(
        _is_projection(user) and user.args and user.args[0] is not node and user.op == "call_function"
        for user in node.users
    )


def _call(node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _is_autocast(node: fx.Node) -> bool:
    return _name_of(node) in ("_enter_autocast", "_exit_autocast")


def _switch_autocast(node: fx.Node, env: Mapping[fx.Node, Any], regions: list[Any]) -> Any:
    if _name_of(node) == "_enter_autocast":
        regions.append(torch.amp.autocast_mode._enter_autocast(*node.args, **node.kwargs))
        return regions[-1]
    (entered,) = node.all_input_nodes
    region = env[entered]
    regions.remove(region)
    torch.amp.autocast_mode._exit_autocast(region)
    return None


@contextlib.contextmanager
def _autocast_left_as_found() -> Iterator[list[Any]]:
    """Regions that the graph enters and, being one piece of a larger program, never leaves are left for it."""
    regions: list[Any] = []
    try:
        yield regions
    finally:
        while regions:
            torch.amp.autocast_mode._exit_autocast(regions.pop())
