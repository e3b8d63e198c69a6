"""What happens while a graph is re-run, written down: every ATen call, on values instead of tensors.

A `Value` is one version of one tensor: an in-place write makes a new Value for the tensor written and a new,
unexplained one for every other view of its storage, so a stale alias can never be mistaken for what it once held.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from trifast_inductor.patterns.nodes import OPAQUE, example_of

Size = int | torch.SymInt
# The target of an `Op` that stands for an alias of something written in place.
REREAD = "reread after a write"


@dataclasses.dataclass(eq=False)
class Value:
    """One version of one tensor. `nodes` are the user's nodes that returned exactly this version.

    The shape is that of the version: `transpose_` changes that of the tensor.
    """

    tensor: torch.Tensor
    op: Op | None
    time: int
    nodes: list[fx.Node] = dataclasses.field(default_factory=list)
    readers: list[Op] = dataclasses.field(default_factory=list)
    escapes: bool = False

    def __post_init__(self) -> None:
        self.shape: tuple[Size, ...] = tuple(self.tensor.shape)

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
        return [] if self.target in OPAQUE.values() else self.reads


def _collect(x: Any, kind: type, found: list[Any]) -> None:
    """Everything of a kind in the lists and tuples that ATen takes and returns; pytree would be slower."""
    if isinstance(x, kind):
        found.append(x)
    elif isinstance(x, (tuple, list)):
        for part in x:
            _collect(part, kind, found)


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Recorder(TorchDispatchMode):
    """Writes down every ATen call made under it, on Values instead of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.writes: dict[int, list[int]] = {}
        self.time = 0
        self.input_storages: set[int] = set()
        self._current: dict[int, Value] = {}
        self._by_storage: dict[int, list[torch.Tensor]] = {}
        self._is_paused = False

    def value_of(self, tensor: torch.Tensor) -> Value:
        """The current version of a tensor; one never seen is an input."""
        value = self._current.get(id(tensor))
        return value if value is not None else self.add_input(tensor)

    def knows(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._current

    def add_input(self, tensor: torch.Tensor) -> Value:
        self.input_storages.add(storage_of(tensor))
        return self._bind(tensor, None)

    def _bind(self, tensor: torch.Tensor, op: Op | None) -> Value:
        if id(tensor) not in self._current:
            self._by_storage.setdefault(storage_of(tensor), []).append(tensor)
        value = Value(tensor, op, self.time)
        self._current[id(tensor)] = value
        return value

    def note_change(self, storage: int) -> None:
        """Something may have changed this memory now."""
        self.writes.setdefault(storage, []).append(self.time)

    def note_write(self, tensor: torch.Tensor, op: Op | None) -> None:
        """Every other alias of what was written holds something new from here on."""
        storage = storage_of(tensor)
        self.note_change(storage)
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


class Whole(TorchFunctionMode):
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

    `results` is the same before it was put into Values, and for all nodes; `writes` says for each storage when it may
    have changed; `bodies` are the graphs of regions that were read through, `unread` the nodes that had to be taken as
    inputs, `input_storages` the memory of all inputs.
    """

    ops: list[Op]
    writes: dict[int, list[int]]
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
        times = [time for time in self.writes.get(value.storage, ()) if start < time <= end]
        ignored = {op.time for node in ignoring if (op := self.outputs_of[node].op) is not None}
        return not ignored.issuperset(times)
