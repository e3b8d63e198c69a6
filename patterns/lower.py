"""A `Site` written into the user's graph: views, one op call, views back.

The old chain is left where it is: nothing reads it any more, and AOTAutograd removes it together with its in-place
writes, which erasing by hand cannot do safely while an alias may be read later.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols
from torch.utils import _pytree as pytree

from trifast_inductor.kernels.triangle_attention import op as triangle_attention_op
from trifast_inductor.patterns import axes, scaling
from trifast_inductor.patterns.axes import Extent, Label, Labels, aten, flat
from trifast_inductor.patterns.nodes import example_of
from trifast_inductor.patterns.recording import REREAD, Op, Reading, Value
from trifast_inductor.patterns.site import Declined, Factor, MaskPart, Operand, Reason, Site, Term


class Lowering:
    """The nodes written for one site; `undo` takes them out again."""

    def __init__(self, site: Site, graph: fx.Graph, reading: Reading, fake_mode: FakeTensorMode) -> None:
        self.site = site
        self.graph = graph
        self.reading = reading
        self.fake_mode = fake_mode
        self.replaced = site.out.value.nodes[0]
        self.written: list[fx.Node] = []
        self.result: fx.Node | None = None
        self.retargeted: dict[fx.Node, Any] = {}
        self._sizes: dict[Extent, fx.Node] = {}

    def apply(self) -> None:
        """Write the nodes and hand them to every reader of the old result; all or nothing."""
        try:
            with self.graph.inserting_before(self.replaced):
                self.result = self._write()
        except Exception:
            self.undo()
            raise
        self.replaced.replace_all_uses_with(self.result, propagate_meta=False)
        for node in self.site.undone_writes:
            self.retargeted[node] = node.target
            node.target = scaling.out_of_place(node) or node.target

    def undo(self) -> None:
        for node, target in self.retargeted.items():
            node.target = target
        if self.result is not None:
            self.result.replace_all_uses_with(self.replaced)
        for node in reversed(self.written):
            self.graph.erase_node(node)
        self.written.clear()

    def restore_strides(self) -> None:
        """Copy the result into the memory order that eager gives it, for readers that depend on it.

        Raises `Declined` where Inductor could not compile such a copy.
        """
        result = self.result
        assert result is not None
        eager = self.site.out.value.tensor.stride()
        order = sorted(range(len(eager)), key=eager.__getitem__, reverse=True)
        readers = list(result.users)
        with self.graph.inserting_before(self.replaced):
            copy = self._call(aten.permute.default, result, order)
            copy = self._call(aten.clone.default, copy, memory_format=torch.contiguous_format)
            _check_channels(example_of(copy))
            copy = self._call(aten.permute.default, copy, [order.index(dim) for dim in range(len(order))])
        for reader in readers:
            reader.replace_input_with(result, copy)
        self.result = copy

    def _write(self) -> fx.Node:
        site, roles = self.site, self.site.roles
        q = self._arranged(site.q, (roles.b, roles.r, roles.i, roles.h, roles.c), site.dtype)
        q = self._times(q, site.scale, (roles.b, roles.r, roles.i, roles.h, ()))
        if example_of(q).dtype != site.dtype:
            q = self._call(aten.to.dtype, q, site.dtype)
        k = self._arranged(site.k, (roles.b, roles.r, roles.j, roles.h, roles.c), site.dtype)
        v = self._arranged(site.v, (roles.b, roles.r, roles.j, roles.h, roles.d), site.dtype)
        bias = self._bias()
        key_bias = self._contiguous(self._sum(site.key_terms, (roles.b, roles.r, roles.j)))
        key_mask = self._contiguous(self._mask(site.masks.keys, (roles.b, roles.r, roles.j)))
        if key_bias is not None and key_mask is not None:  # only with -inf, which no addend changes
            key_bias, key_mask = self._call(aten.masked_fill.Scalar, key_bias, key_mask, -math.inf), None
        attention = self._call(
            triangle_attention_op.triangle_attention,
            *(q, k, v, bias, key_bias, key_mask),
            *(site.scale.number, site.masks.fill, site.key_term_first),
            *((True,) if site.masked_rows_are_zero else ()),
        )
        out = self._call(operator.getitem, attention, 0)
        masked_queries = self._mask(site.masks.queries, (roles.b, roles.r, roles.i, (), ()))
        if masked_queries is not None:
            mean = self._call(aten.mean.dim, v, [2], True)
            out = self._call(aten.where.self, masked_queries, mean, out)
        return self._back(out)

    def _bias(self) -> fx.Node | None:
        """All pair biases in one, with -inf where a pair mask fills with it."""
        roles = self.site.roles
        groups = (roles.b, roles.h, roles.i, roles.j)
        bias, mask = self._sum(self.site.biases, groups), self._mask(self.site.masks.pairs, groups)
        if mask is None:
            return bias
        if bias is None:
            return self._call(aten.where.Scalar, mask, -math.inf, 0.0)
        return self._call(aten.masked_fill.Scalar, bias, mask, -math.inf)

    def _sum(self, terms: Sequence[Term], groups: tuple[Label, ...]) -> fx.Node | None:
        total: fx.Node | None = None
        for term in terms:
            node = self._arranged(term.operand, groups)
            if not example_of(node).dtype.is_floating_point:
                node = self._call(aten.to.dtype, node, torch.float32)
            if term.factor.number != 1.0:
                node = self._call(aten.mul.Tensor, node, term.factor.number)
            node = self._times(node, term.factor, groups)
            total = node if total is None else self._call(aten.add.Tensor, total, node)
        return total

    def _times(self, node: fx.Node, factor: Factor, groups: tuple[Label, ...]) -> fx.Node:
        for tensor, divides in factor.tensors:
            by = self._arranged(tensor, groups)
            node = self._call(aten.div.Tensor if divides else aten.mul.Tensor, node, by)
        return node

    def _mask(self, parts: Sequence[MaskPart], groups: tuple[Label, ...]) -> fx.Node | None:
        """True where any of the parts fills."""
        union: fx.Node | None = None
        for part in parts:
            node = self._arranged(part.operand, groups)
            if not part.fills_where:
                node = self._call(aten.logical_not.default, node)
            union = node if union is None else self._call(aten.logical_or.default, union, node)
        return union

    def _contiguous(self, node: fx.Node | None) -> fx.Node | None:
        """A key term copied into plain order, as one N² pointwise op that fuses with what makes the mask.

        AOTAutograd bakes the strides of a saved tensor into the backward as numbers when Inductor chooses others
        than it had traced, which it does for a transposed mask of an ending node; under dynamic shapes the next
        size then fails (seen on torch 2.11).
        """
        if node is None:
            return None
        example = example_of(node)
        wanted: Any = 1
        for size, stride in zip(reversed(example.shape), reversed(example.stride()), strict=True):
            if not axes.same_size(stride, wanted):
                return self._call(aten.clone.default, node, memory_format=torch.contiguous_format)
            wanted = wanted * size
        return node

    def _arranged(self, operand: Operand, groups: tuple[Label, ...], dtype: torch.dtype | None = None) -> fx.Node:
        """The operand with one axis for each group of atoms, broadcast over those it lacks."""
        node = self._node_of(operand.value, self.site.ends_at)
        for cast in (*operand.casts, *([dtype] if dtype is not None else [])):
            if example_of(node).dtype != cast:
                node = self._call(aten.to.dtype, node, cast)
        return self._laid_out(node, operand.labels, groups)

    def _back(self, out: fx.Node) -> fx.Node:
        """From [B, R, I, H, D] to the axes of the result that is replaced."""
        roles = self.site.roles
        groups = (roles.b, roles.r, roles.i, roles.h, roles.d)
        if set(flat(*self.site.out.labels)) != set(flat(*groups)):
            raise Declined(Reason.UNDECIDED_SIZES, "the result has other axes than the logits")
        node = self._laid_out(out, groups, self.site.out.labels)
        dtype = self.site.out.value.dtype
        return node if example_of(node).dtype == dtype else self._call(aten.to.dtype, node, dtype)

    def _laid_out(self, node: fx.Node, labels: Labels, groups: Sequence[Label]) -> fx.Node:
        """Axes of the given labels as one axis a group, expanded over atoms they lack; views wherever memory allows.

        An axis of one element serves where one is wanted, so that most operands need a single node: every node
        costs the compile as much as a node of the user's.
        """
        labels = tuple(flat(label) for label in labels)
        groups = [flat(group) for group in groups]
        if not set(flat(*labels)).issubset(flat(*groups)):
            raise Declined(Reason.UNDECIDED_SIZES, "an axis has no role")
        axes_now: list[axes.Atom | None] = [label[0] if label else None for label in labels]
        if any(len(label) > 1 for label in labels):
            axes_now = list(flat(*labels))
            node = self._call(aten.view.default, node, [self._size(atom.size) for atom in flat(*labels)])
        merges = any(len(group) > 1 for group in groups)
        wanted = list(flat(*groups)) if merges else [group[0] if group else None for group in groups]
        node = self._permuted(node, axes_now, wanted)
        missing = {atom for atom in wanted if atom is not None and atom not in axes_now}
        if missing:
            node = self._call(
                aten.expand.default, node, [self._size(atom.size) if atom in missing else -1 for atom in wanted]
            )
        return self._call(aten.reshape.default, node, [self._extent_of(group) for group in groups]) if merges else node

    def _permuted(
        self, node: fx.Node, axes_now: Sequence[axes.Atom | None], wanted: Sequence[axes.Atom | None]
    ) -> fx.Node:
        """The axes in the wanted order, with axes of one element where nothing holds the wanted atom."""
        ones = [dim for dim, atom in enumerate(axes_now) if atom is None]
        places = [place for place, atom in enumerate(wanted) if atom is None or atom not in axes_now]
        served = dict(zip(places, ones, strict=False))
        superfluous, lacking = ones[len(served) :], places[len(served) :]
        if superfluous:
            node = self._call(aten.squeeze.dims, node, superfluous)
        order = [
            served[place] if place in served else axes_now.index(atom)
            for place, atom in enumerate(wanted)
            if place not in lacking
        ]
        order = [dim - sum(gone < dim for gone in superfluous) for dim in order]
        if order != sorted(order):
            node = self._call(aten.permute.default, node, order)
        for place in lacking:
            node = self._call(aten.unsqueeze.default, node, place)
        return node

    def _extent_of(self, group: Label) -> Any:
        size: Any = 1
        for atom in group:
            factor = self._size(atom.size)
            if isinstance(size, int) and isinstance(factor, int):
                size *= factor
            else:
                size = factor if size == 1 else self._call(operator.mul, size, factor)
        return size

    def _size(self, size: Extent) -> int | fx.Node:
        """A size as a number, or as the node that gives it."""
        if isinstance(size, int):
            return size
        if size not in self._sizes:
            self._sizes[size] = self._node_of_size(size)
        return self._sizes[size]

    def _node_of_size(self, size: Extent) -> fx.Node:
        for node in self.graph.nodes:
            if node is self.replaced:
                break
            example = example_of(node)
            if isinstance(example, torch.SymInt) and axes.extent(example) == size:
                return node
            if isinstance(example, torch.Tensor):
                for dim, extent in enumerate(example.shape):
                    if axes.extent(extent) == size:
                        return self._call(aten.sym_size.int, node, dim)
        raise Declined(Reason.UNDECIDED_SIZES, f"no tensor has the size {size}")

    # Nodes

    def _node_of(self, value: Value, until: int) -> fx.Node:
        """The user's node that holds a value, or, for a value inside an opaque call, the ATen ops that make it."""
        if value.nodes:
            return value.nodes[0]
        op = value.op
        if op is not None and op.target == REREAD:
            raise Declined(Reason.INPUT_OVERWRITTEN)
        if op is None or not isinstance(op.target, torch._ops.OpOverload) or _has_effects(op):
            raise Declined(Reason.UNREADABLE, "an input is made inside an opaque call")
        for source in op.reads:
            if self.reading.written_between(source, op.time, until):
                raise Declined(Reason.INPUT_OVERWRITTEN)

        def argument(x: Any) -> Any:
            if isinstance(x, Value):
                return self._node_of(x, until)
            return self._size(axes.extent(x)) if isinstance(x, torch.SymInt) else x

        args, kwargs = pytree.tree_map(argument, (op.args, op.kwargs), is_leaf=lambda x: isinstance(x, Value))
        node = self._call(op.target, *args, **kwargs)
        if len(op.outputs) > 1:
            node = self._call(operator.getitem, node, op.outputs.index(value))
        return node

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A node with everything that later passes and caches expect of one."""
        node = self.graph.call_function(target, args, kwargs)
        self.written.append(node)
        example_args, example_kwargs = fx.node.map_arg((args, kwargs), example_of)
        # Without gradients: hooks on saved tensors, a checkpoint's around the whole model among them, are the user's.
        with torch.no_grad(), self.fake_mode:
            example = target(*example_args, **example_kwargs)
        if torch.is_grad_enabled() and _any_requires_grad((example_args, example_kwargs)):
            pytree.tree_map_only(torch.Tensor, _require_grad, example)
        for key in ("example_value", "val"):
            if key in self.replaced.meta:
                node.meta[key] = example
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in self.replaced.meta:
                node.meta[key] = self.replaced.meta[key]
        return node


def _check_channels(copy: torch.Tensor) -> None:
    """Ask what Inductor of torch 2.11 asks of a copy, and fails on where only the data know the answer."""
    from torch._inductor import ir

    if not free_unbacked_symbols(copy) or hasattr(ir, "is_contiguous_for_memory_format_or_false"):  # torch 2.13
        return
    try:
        copy.is_contiguous(memory_format=torch.channels_last)
        copy.is_contiguous(memory_format=torch.channels_last_3d)
    except GuardOnDataDependentSymNode as error:
        raise Declined(Reason.UNDECIDED_SIZES, "this torch cannot copy the result") from error


def _any_requires_grad(given: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(given))


def _require_grad(example: torch.Tensor) -> None:
    if example.is_floating_point():
        example.requires_grad_()


def _has_effects(op: Op) -> bool:
    return any(argument.is_write for argument in op.target._schema.arguments) or (
        torch.Tag.nondeterministic_seeded in op.target.tags
    )
