"""The user's nodes: what the tracer recorded for each, what kind it is, and how it is run again."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

aten = torch.ops.aten

# What no pattern looks through, by the name of the node.
OPAQUE = {"linear": aten.linear.default, "layer_norm": aten.layer_norm.default}

# What makes a new tensor by one ATen op, as an operator, a function, a method and itself.
PLAIN: dict[Any, Any] = {
    spelling: op
    for op, *spellings in (
        (aten.matmul.default, operator.matmul, torch.matmul, "matmul"),
        (aten.add.Tensor, operator.add, torch.add, "add"),
        (aten.sub.Tensor, operator.sub, torch.sub, "sub"),
        (aten.mul.Tensor, operator.mul, torch.mul, "mul"),
        (aten.div.Tensor, operator.truediv, torch.div, "div"),
        (aten.sigmoid.default, torch.sigmoid, torch.nn.functional.sigmoid, "sigmoid"),
    )
    for spelling in (op, *spellings)
}

# What gives a view and takes dims, as a function, a method and itself; and what gives a view of another shape.
_OF_DIMS: dict[Any, Any] = {
    spelling: op
    for op, *spellings in (
        (aten.transpose.int, torch.transpose, "transpose"),
        (aten.permute.default, torch.permute, "permute"),
        (aten.unsqueeze.default, torch.unsqueeze, "unsqueeze"),
    )
    for spelling in (op, *spellings)
}
_OF_SHAPE = {aten.view.default, torch.reshape, torch.flatten, "view", "reshape", "flatten", "unflatten"}


def view_call(node: fx.Node, source: torch.Tensor, result: torch.Tensor) -> tuple[Any, tuple[Any, ...]] | None:
    """The ATen view that a node is and its arguments, given that it made the result a view of the source."""
    if node.kwargs:
        return None
    if node.target in _OF_SHAPE:
        return aten.view.default, (source, list(result.shape))
    op = _OF_DIMS.get(node.target)
    dims: list[Any] = list(node.args[1:])
    if op is aten.permute.default and isinstance(dims[0], (list, tuple)):
        dims = list(dims[0])
    if op is None or not all(isinstance(dim, int) for dim in dims):
        return None
    return op, (source, dims) if op is aten.permute.default else (source, *dims)


def example_of(node: fx.Node) -> Any:
    """What the tracer recorded for a node: Dynamo writes `example_value`, export writes `val`."""
    return node.meta.get("example_value", node.meta.get("val"))


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    for node in graph.nodes:
        for leaf in pytree.tree_leaves(example_of(node)):
            if isinstance(leaf, FakeTensor):
                return leaf.fake_mode
    return None


def region_body(node: fx.Node) -> fx.Graph | None:
    """The graph that a node runs as a part of its own, under another autocast or gradient mode; None for the rest.

    Export cuts such a region out into a body of its own, so an attention may lie on both sides of the cut:
    OpenFold's softmax is alone in an autocast region.
    """
    position = BODY_AT.get(getattr(node.target, "__name__", "")) if node.op == "call_function" else None
    if position is None or len(node.args) <= position:
        return None
    body = node.args[position]
    if not isinstance(body, fx.Node) or body.op != "get_attr":
        return None
    module = attribute(node.graph, str(body.target))
    return module.graph if isinstance(module, fx.GraphModule) else None


# Where among its arguments such a call has its body; those of the body follow.
BODY_AT = {"wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1}


def attribute(graph: fx.Graph, path: str) -> Any:
    found: Any = graph.owning_module
    for part in path.split("."):
        found = getattr(found, part)
    return found


def name_of(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def can_rerun(node: fx.Node) -> bool:
    """Tensor functions only: a call without a recorded result may have effects outside the graph."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator) or is_of_vmap(node):
        return False
    return example_of(node) is not None or getattr(node.target, "__module__", "") == "_operator"


def is_of_vmap(node: fx.Node) -> bool:
    """Opens or closes a level of torch.func, or works on its tensors, which have no memory of their own to speak of."""
    if getattr(node.target, "__module__", "") == "torch._functorch.predispatch":
        return True
    return any(is_batched(example_of(part)) for part in (node, *node.all_input_nodes))


def is_batched(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x)


def changes_shape_in_place(node: fx.Node) -> bool:
    """Such as `transpose_`: the tensor stays, its sizes and strides do not."""
    packet = getattr(aten, base_name(node), None) if base_name(node).endswith("_") else None
    if packet is None or base_name(node).endswith("__"):
        return False
    return any(torch.Tag.inplace_view in getattr(packet, overload).tags for overload in packet.overloads())


def base_name(node: fx.Node) -> str:
    return name_of(node).removesuffix(".default")


def is_projection(node: fx.Node) -> bool:
    """A LayerNorm, or a Linear whose weight comes into the graph, so that it is no product of activations."""
    if base_name(node) not in OPAQUE or not isinstance(example_of(node), FakeTensor):
        return False
    if base_name(node) == "layer_norm":
        return True
    weight = node.args[1] if len(node.args) > 1 else None
    return isinstance(weight, fx.Node) and weight.op in ("placeholder", "get_attr")


def is_only_a_weight(node: fx.Node) -> bool:
    """An input that only projections read, and not as what they project: it is taken as it is."""
    return isinstance(example_of(node), FakeTensor) and all(
        is_projection(user) and user.args and user.args[0] is not node and user.op == "call_function"
        for user in node.users
    )


@contextlib.contextmanager
def under(fake_mode: FakeTensorMode) -> Iterator[None]:
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


def arguments(node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
    """What a node is given: args and kwargs."""
    return fx.node.map_arg((node.args, node.kwargs), env.__getitem__)


def call(node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = arguments(node, env)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def is_autocast(node: fx.Node) -> bool:
    return name_of(node) in ("_enter_autocast", "_exit_autocast")


def switch_autocast(node: fx.Node, env: Mapping[fx.Node, Any], regions: list[Any]) -> Any:
    if name_of(node) == "_enter_autocast":
        regions.append(torch.amp.autocast_mode._enter_autocast(*node.args, **node.kwargs))
        return regions[-1]
    (entered,) = node.all_input_nodes
    region = env[entered]
    regions.remove(region)
    torch.amp.autocast_mode._exit_autocast(region)
    return None


@contextlib.contextmanager
def autocast_left_as_found() -> Iterator[list[Any]]:
    """Regions that the graph enters and, being one piece of a larger program, never leaves are left for it."""
    regions: list[Any] = []
    try:
        yield regions
    finally:
        while regions:
            torch.amp.autocast_mode._exit_autocast(regions.pop())
