"""Whether a rewritten graph still runs and lets out what it let out before."""

from __future__ import annotations

import collections
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from trifast_inductor.patterns import nodes
from trifast_inductor.patterns.recording import Reading

log = logging.getLogger(__name__)


def runs_as_read(graph: fx.Graph, reading: Reading, stands_for: Mapping[fx.Node, fx.Node]) -> bool:
    """Whether a rewritten graph still runs, and all that leaves it has the strides that it had.

    Args:
        reading: of the graph before.
        stands_for: the nodes written in the place of others, with what they replace.

    Only what a changed layout reaches is run again, until the layouts are the old ones.
    """
    fake_mode = nodes.fake_mode_of(graph)
    assert fake_mode is not None
    changed: dict[fx.Node, Any] = {}
    seen: set[fx.Node] = set()
    with nodes.under(fake_mode), nodes.autocast_left_as_found() as regions:
        for node in graph.nodes:
            if not seen.issuperset(node.all_input_nodes):
                return False
            seen.add(node)
            if node in stands_for:
                result = _detached(nodes.example_of(node))
            elif node not in reading.results and node.op != "output":  # written for a site, and run then
                continue
            elif nodes.is_autocast(node):
                reading.results[node] = nodes.switch_autocast(node, reading.results, regions)
                continue
            elif changed.keys().isdisjoint(node.all_input_nodes):
                continue
            elif node in reading.unread or not nodes.can_rerun(node):
                return False
            else:
                try:
                    result = nodes.call(node, collections.ChainMap(changed, reading.results))
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
        if not all(statically_known_true(size == other) for size, other in zip(a.shape, b.shape, strict=True)):
            return False
        # The stride of an axis of one element leads nowhere.
        axes = zip(a.shape, a.stride(), b.stride(), strict=True)
        return all(statically_known_true(size == 1) or statically_known_true(x == y) for size, x, y in axes)
    if isinstance(a, (int, torch.SymInt)) and isinstance(b, (int, torch.SymInt)):
        return statically_known_true(a == b)
    return bool(a is b or (type(a) is type(b) and a == b))
