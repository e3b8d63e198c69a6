"""What would be rewritten in a model, and why the rest would not."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from trifast_inductor.errors import FactoryError
from trifast_inductor.report import Report, Row
from trifast_inductor.rewrite import rewrite_all


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Run a model once with its triangle attention replaced and report on every softmax.

    Args:
        model: a module or function; one that is compiled already is unwrapped.
        args, kwargs: what to call it with. Shapes, dtypes, train() and grad mode decide what is found.

    Returns:
        A `Report`: `str()` is a table, `to_dict()` plain data.

    The graphs run without code generation, so this takes seconds where compiling takes minutes. It does not depend on
    compile caches, unlike the counters.
    """
    looked = Looked("aot_eager")
    torch.compile(getattr(model, "_orig_mod", model), backend=looked)(*args, **kwargs)
    return Report(tuple(looked.rows), looked.graphs)


class Looked:
    """A backend that rewrites, keeps what was found, and leaves the running to another backend."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        # By compile: an attempt that Dynamo starts over replaces the one before.
        self._found: dict[Any, list[Row]] = {}

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self._found[torch._guards.CompileContext.current_compile_id()] = rewrite_all(gm)
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend(self._backend)(gm, example_inputs)
        return compiled

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self._found.values() for row in rows]

    @property
    def graphs(self) -> int:
        return len(self._found)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m trifast_inductor explain PACKAGE.MODULE:FACTORY`; 1 under --strict when something was declined."""
    parser = argparse.ArgumentParser(
        prog="python -m trifast_inductor explain",
        description="Report on every softmax of a model: rewritten or declined, where, and why.",
    )
    parser.add_argument(
        "factory",
        metavar="PACKAGE.MODULE:FACTORY",
        help="a function without arguments that returns (model, args) or (model, args, kwargs)",
    )
    parser.add_argument("--json", action="store_true", help="print plain data")
    parser.add_argument("--inference", action="store_true", help="model.eval() and no gradients")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a site was declined")
    options = parser.parse_args(arguments)
    try:
        model, args, kwargs = _made_by(options.factory)
    except FactoryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.inference and isinstance(model, torch.nn.Module):
        model.eval()
    with torch.set_grad_enabled(not options.inference):
        report = explain(model, *args, **kwargs)
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    return 1 if options.strict and report.declined else 0


def _made_by(path: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Call `package.module:factory`; what it made."""
    module_name, _, name = path.partition(":")
    if not (module_name and name):
        raise FactoryError(f"the factory must be PACKAGE.MODULE:FACTORY, got {path!r}: write a colon between the two")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise FactoryError(f"{module_name} cannot be imported: {error}: run this where its source lies") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise FactoryError(f"{module_name} has no function {name!r}: it needs one that returns (model, args)")
    made = factory()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not callable(made[0]):
        raise FactoryError(f"{path}() must return (model, args) or (model, args, kwargs), got {type(made).__name__}")
    model, args, *rest = made
    if not isinstance(args, (tuple, list)):
        raise FactoryError(f"{path}() must return its args as a tuple, got {type(args).__name__}: write (x,) for one")
    return model, tuple(args), dict(*rest)
