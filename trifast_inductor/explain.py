"""What would be rewritten in a model, and why the rest would not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

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
    # By compile: an attempt that Dynamo starts over replaces the one before.
    rows: dict[Any, list[Row]] = {}

    def look(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        rows[torch._guards.CompileContext.current_compile_id()] = rewrite_all(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)

    torch.compile(getattr(model, "_orig_mod", model), backend=look)(*args, **kwargs)
    return Report(tuple(row for found in rows.values() for row in found), len(rows))
