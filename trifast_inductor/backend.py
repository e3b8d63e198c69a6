"""`torch.compile(model, backend="trifast")`, and `register()` for every later `torch.compile`.

Both are inductor with one more pre-grad pass. AOTAutograd runs after that pass and differentiates the op that it
inserts, so training and inference take the same way.
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import fx

from trifast_inductor.errors import UnknownOptionError
from trifast_inductor.rewrite import GraphPass, TriangleAttentionPass

log = logging.getLogger(__name__)
_SLOT = "pre_grad_custom_pass"
OWN_OPTIONS = {"strict": "raise on anything that looks like triangle attention and is declined"}


def trifast(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile a graph as inductor does, with its triangle attention replaced.

    Args:
        mode: as for inductor: "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs".
        options: inductor's own options, and `strict` (bool, False).

    Raises:
        UnknownOptionError: neither inductor nor this package knows an option.
        DeclinedError: under `strict`, something that looks like triangle attention was declined.
    """
    patches: dict[str, Any] = dict(torch._inductor.list_mode_options(mode)) if mode else {}
    asked = {name.replace("-", "_"): value for name, value in (options or {}).items()}
    strict = bool(asked.pop("strict", False))
    _check_options(asked)
    patches.update(asked)
    present = patches.get(_SLOT, torch._inductor.config.pre_grad_custom_pass)
    patches[_SLOT] = _with_ours(present, strict)
    return torch._dynamo.lookup_backend("inductor")(gm, example_inputs, config_patches=patches)


def _reset() -> None:
    # Where nothing has imported it there is nothing to reset, and torch is not done with its list of backends: to
    # import inductor adds to it.
    cudagraph_trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if cudagraph_trees is not None:
        cudagraph_trees.reset_cudagraph_trees()


# A checkout that is not installed has no entry point; there, importing the package makes the name known.
if "trifast" not in torch._dynamo.list_backends(exclude_tags=()):
    torch._dynamo.register_backend(trifast, name="trifast")

trifast.reset = _reset  # type: ignore[attr-defined]  # what torch._dynamo.reset() calls on a backend


def _check_options(options: dict[str, Any]) -> None:
    known = sorted({*OWN_OPTIONS, *torch._inductor.list_options()})
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise UnknownOptionError(
                f"option {name!r} is not known to backend 'trifast'{hint} Known: {', '.join(known)}"
            )


def _with_ours(present: Any, strict: bool) -> TriangleAttentionPass:
    """Our pass, after whatever is there; a pass of ours that is there already is not run twice."""
    if isinstance(present, TriangleAttentionPass):
        return TriangleAttentionPass(strict=strict or present.strict, before=present.before)
    return TriangleAttentionPass(strict=strict, before=_as_one_pass(present))


class _InTurn:
    """Several passes as one, with a uuid when each has one (torch >= 2.13 takes lists)."""

    def __init__(self, passes: Sequence[GraphPass]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: fx.Graph) -> None:
        for run in self.passes:
            run(graph)

    def uuid(self) -> Any | None:
        uuids = tuple(getattr(run, "uuid", lambda: None)() for run in self.passes)
        return None if None in uuids else uuids


def _as_one_pass(present: Any) -> GraphPass | None:
    return _InTurn(present) if isinstance(present, (list, tuple)) else present


class Registration:
    """What `register` returns: leaving its `with` block unregisters."""

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unregister()


def register(*, strict: bool = False) -> Registration:
    """Give every later `torch.compile(model)` (backend "inductor") the rewrite, in all threads.

    A `pre_grad_custom_pass` that is set already keeps running, before ours. Calling it again changes `strict` only.

        with trifast_inductor.register():
            torch.compile(model)(x)
    """
    config = torch._inductor.config
    ours = _with_ours(config.pre_grad_custom_pass, strict)
    ours.strict = strict
    _set_for_all_threads(ours)
    return Registration()


def unregister() -> None:
    """Undo `register`; the pass that was there before stays. Graphs compiled since keep their rewrite."""
    config = torch._inductor.config
    present = config.pre_grad_custom_pass
    if isinstance(present, TriangleAttentionPass):
        before = present.before
        _set_for_all_threads(before.passes if isinstance(before, _InTurn) else before)


def _set_for_all_threads(value: Any) -> None:
    """From torch 2.12 on an assignment to a config entry is seen by the assigning thread only; its default by all.

    https://github.com/pytorch/pytorch/issues/186537
    """
    config = torch._inductor.config
    entries = getattr(config, "_config", {})
    if _SLOT in entries and hasattr(entries[_SLOT], "default"):
        entries[_SLOT].default = value
    else:
        log.warning("this torch keeps its configuration elsewhere: register() holds for the calling thread only")
    if config.pre_grad_custom_pass is not value:  # an assignment made earlier hides the default
        config.pre_grad_custom_pass = value
