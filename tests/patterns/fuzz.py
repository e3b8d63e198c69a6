"""Random attention-like modules: eager against the rewritten graph, in float64, outputs and gradients.

`make fuzz` runs ten thousand of them and prints what became of each; `test_fuzz.py` runs a few with every suite.
A valid one must be rewritten; a mutated one must be declined or right; nothing may be wrong or crash.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import itertools
import logging
import multiprocessing
import sys
import time
import traceback
import warnings
from collections.abc import Iterator

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

from trifast_inductor.explain import Looked

from .mutations import MUTATIONS, Mutated
from .spellings import inputs
from .variations import (
    ANY_ORDER,
    BIASES,
    CONTRACTIONS,
    LOSSY_SOFTMAXES,
    MASKS,
    NODES,
    ORDERS,
    SCALE_PLACES,
    SCALES,
    SOFTMAXES,
    Composed,
    Recipe,
)

# Additive masks reach 1e10, where float64 is spaced 2e-6; a wrong axis is off by 1e-2 and more.
TOLERANCE = 2e-5
FAILURES = ("missed", "wrong", "crashed", "eager crashed")  # the last is a fault of what was drawn
OUTCOMES = ("rewritten", "declined rightly", "mutated and right", "torch crashed", *FAILURES)


@dataclasses.dataclass(frozen=True)
class Case:
    recipe: Recipe
    mutation: type[Mutated] | None
    B: int
    N: int
    trains: bool
    dynamic: bool
    seed: int

    def __str__(self) -> str:
        mutation = self.mutation.__name__ if self.mutation else "valid"
        mode = f"B={self.B} N={self.N} trains={self.trains} dynamic={self.dynamic} seed={self.seed}"
        return f"{mutation}: {self.recipe} ({mode})"


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[str, ...], bool]:
    """A layout of the logits, and whether only einsum can make it."""
    batch = draw(st.permutations("brh"))
    folds = draw(st.sampled_from([(1, 1, 1), (1, 1, 1), (2, 1), (1, 2), (3,)]))
    letters = iter(batch)
    groups = ["".join(itertools.islice(letters, size)) for size in folds]
    if draw(st.booleans()):
        return (*groups, "i", "j"), False
    return tuple(draw(st.permutations([*groups, "i", "j"]))), True


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layout, only_einsum = draw(layouts())
    contractions = ANY_ORDER if only_einsum else tuple(CONTRACTIONS)
    recipe = Recipe(
        node=draw(st.sampled_from(NODES)),
        layout=layout,
        contraction=draw(st.sampled_from(contractions)),
        values=draw(st.sampled_from(contractions)),
        scale=draw(st.sampled_from(list(SCALES))),
        scale_place=draw(st.sampled_from(SCALE_PLACES)),
        bias=draw(st.sampled_from(list(BIASES))),
        mask=draw(st.sampled_from(list(MASKS))),
        outer_mask=draw(st.booleans()),
        inf=draw(st.sampled_from([1e4, 1e6, 1e9, 1e10])),
        order=draw(st.sampled_from(ORDERS)),
        softmax=draw(st.sampled_from(list(SOFTMAXES))),
        moved_by=draw(st.sampled_from(["torch", "einops"])),
        shuffle=draw(st.integers(0, 999)),
    )
    if not recipe.is_possible:
        recipe = dataclasses.replace(recipe, outer_mask=False, order=ORDERS[0])
    hypothesis.assume(recipe.is_possible)
    mutation = draw(st.one_of(st.none(), st.sampled_from(MUTATIONS)))
    return Case(
        recipe,
        mutation,
        B=draw(st.integers(1, 3)),
        N=draw(st.integers(2, 7)),
        trains=draw(st.booleans()) and (mutation is None or mutation.trains),
        dynamic=draw(st.integers(0, 3)) == 0,
        seed=draw(st.integers(0, 99)),
    )


def outcome(case: Case) -> tuple[str, str]:
    """One of `OUTCOMES`, and what went wrong."""
    torch._dynamo.reset()
    torch.manual_seed(case.seed)
    model = (case.mutation or Composed)(case.recipe).double()
    x, mask = inputs(Composed, B=case.B, N=case.N, dtype=torch.float64)
    if "-inf" in case.recipe.mask or case.recipe.softmax in LOSSY_SOFTMAXES:
        mask[..., :1] = True
        mask[:, :1] = True
    # Every tenth also goes through AOTAutograd, which drops the old chain.
    backend = "aot_eager" if case.seed % 10 == 0 else "eager"
    looked = Looked(backend)
    try:
        expected = results(copy.deepcopy(model), x, mask, case)
    except Exception:
        return "eager crashed", traceback.format_exc(limit=-3)
    try:
        actual = results(torch.compile(model, backend=looked, dynamic=case.dynamic), x, mask, case)
    except Exception:
        text = traceback.format_exc(limit=-3)
        torch._dynamo.reset()
        try:
            results(torch.compile(model, backend=backend, dynamic=case.dynamic), x, mask, case)
        except Exception:
            # Seen in torch 2.13: AOTAutograd's view of einops.einsum's result, with another memory order than eager's.
            return "torch crashed", text
        return "crashed", text
    off = {name: _distance(actual[name], want) for name, want in expected.items()}
    was_rewritten = sum(row.rewritten for row in looked.rows)
    wrong = {name: distance for name, distance in off.items() if not distance < TOLERANCE}
    if wrong:
        return "wrong", f"rewritten {was_rewritten}, off by {wrong}"
    if case.mutation is not None:
        return ("mutated and right" if was_rewritten else "declined rightly"), ""
    if was_rewritten != 1:
        return "missed", "; ".join(row.message for row in looked.rows)
    return "rewritten", ""


def _distance(actual: Tensor, expected: Tensor) -> float:
    """Relative to the largest; NaN and infinity must stand at the same places."""
    if actual.shape != expected.shape or not torch.equal(actual.isfinite(), expected.isfinite()):
        return float("inf")
    finite = expected.isfinite()
    if not finite.any():
        return 0.0
    return float((actual - expected)[finite].abs().max() / expected[finite].abs().max().clamp(min=1.0))


def results(model: torch.nn.Module, x: Tensor, mask: Tensor, case: Case) -> dict[str, Tensor]:
    """Outputs and, in training, all gradients."""
    torch.manual_seed(case.seed)
    x = x.clone().requires_grad_(case.trains)
    with torch.set_grad_enabled(case.trains):
        out = model(x, mask)
    outs = out if isinstance(out, tuple) else (out,)
    found = {f"out {position}": o.detach() for position, o in enumerate(outs)}
    if not case.trains:
        return found
    loss = sum((o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outs)
    loss.backward()
    found["x"] = x.grad
    parameters = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters()}
    return found | {name: grad for name, grad in parameters.items() if grad is not None}


def run(examples: int, seed: int) -> tuple[collections.Counter[str], list[str]]:
    """Draw and judge; failures are gathered, not raised."""
    counts: collections.Counter[str] = collections.Counter()
    failures: list[str] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(cases())
    def judge(case: Case) -> None:
        result, text = outcome(case)
        counts[result] += 1
        if result in FAILURES:
            failures.append(f"{result}: {case}\n    {text}")

    with _quiet_on_one_thread():
        judge()
    return counts, failures


@contextlib.contextmanager
def _quiet_on_one_thread() -> Iterator[None]:
    threads, disabled = torch.get_num_threads(), logging.root.manager.disable
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        torch.set_num_threads(threads)


def _run_star(arguments: tuple[int, int]) -> tuple[collections.Counter[str], list[str]]:
    return run(*arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start, portion = time.monotonic(), 100
    portions = [(portion, options.seed + n) for n in range(-(-options.examples // portion))]
    counts: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    # A worker is replaced now and then: Dynamo keeps something of every module it has seen.
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=5) as pool:
        for some_counts, some_failures in pool.imap_unordered(_run_star, portions):
            counts += some_counts
            failures += some_failures
            for failure in some_failures:
                print(f"\n{failure}", flush=True)
            done = ", ".join(f"{counts[name]} {name}" for name in OUTCOMES)
            print(f"\r{sum(counts.values())} modules in {time.monotonic() - start:.0f} s: {done}", end="", flush=True)
    print()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
