"""Graphs as `torch.compile` hands them over: rewritten and run, or as a short text of what in them still matters."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.testing import EagerAndRecordGraphs

from trifast_inductor.patterns.nodes import example_of
from trifast_inductor.rewrite import rewrite_all


def rewriting(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend: the pass, then AOTAutograd without code generation: what the rewrite means, quickly."""
    rewrite_all(gm)
    return torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)


def gradients(model: torch.nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of the first input and of all parameters that have one."""
    first = inputs[0].clone().requires_grad_()
    out = model(first, *inputs[1:])
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    found = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters()}
    return {"out": out.detach(), "input": first.grad, **{n: g for n, g in found.items() if g is not None}}


def captured(model: Callable[..., Any], *args: Any, **options: Any) -> fx.GraphModule:
    """The one graph of a model."""
    torch._dynamo.reset()
    recorder = EagerAndRecordGraphs()
    torch.compile(model, backend=recorder, **options)(*args)
    (gm,) = recorder.graphs
    return gm


def outline(graph: fx.Graph) -> str:
    """A line for every node that the output depends on: its op, its tensors and numbers, its shape."""
    names: dict[fx.Node, str] = {}
    lines = []
    live = _read_by_output(graph)
    for node in graph.nodes:
        if node not in live or node.op == "output":
            continue
        example = example_of(node)
        if node.op in ("placeholder", "get_attr"):
            names[node] = f"arg{sum(name.startswith('arg') for name in names.values())}"
            continue
        names[node] = f"%{len(lines)}"
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: _Name(names[n]))
        text = ", ".join([*map(repr, arguments[0]), *(f"{key}={value!r}" for key, value in arguments[1].items())])
        shape = f" : {list(example.shape)}" if isinstance(example, torch.Tensor) else ""
        lines.append(f"{names[node]} = {_target(node)}({text}){shape}")
    return "\n".join(lines)


class _Name(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))


def _read_by_output(graph: fx.Graph) -> set[fx.Node]:
    (output,) = (node for node in graph.nodes if node.op == "output")
    live, stack = set(), [output]
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack += node.all_input_nodes
    return live
