"""Every choice of every axis is rewritten and agrees with eager, alone; `test_fuzz.py` combines them."""

import pytest
import torch

import trifast_inductor

from .fuzz import Case, outcome
from .mutations import MUTATIONS, Mutated
from .spellings import inputs
from .variations import Composed, Recipe, each_choice


@pytest.mark.parametrize("recipe", each_choice(), ids=str)
def test_choice_is_rewritten_and_agrees(recipe: Recipe) -> None:
    assert outcome(Case(recipe, None, B=2, N=5, trains=True, dynamic=False, seed=1)) == ("rewritten", "")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_mutation_is_never_wrong(mutation: type[Mutated]) -> None:
    case = Case(Recipe(mask="masked_fill"), mutation, B=2, N=5, trains=mutation.trains, dynamic=False, seed=1)
    assert outcome(case)[0] in ("declined rightly", "mutated and right")


@pytest.mark.parametrize("softmax", ["float32 and back", "F.softmax"])
def test_upcast_of_halves_costs_nothing(softmax: str) -> None:
    """Logits made in float32 of bfloat16 queries and keys run on the halves, whose products are exact."""

    class Upcast(Composed):
        def attend(self, q, k, *rest):
            return super().attend(q.float() * 0.5, k.float(), *rest).bfloat16()

    class Downcast(Upcast):
        def changed(self, t, place):
            return t.bfloat16() if place == "probabilities" else t

    x, mask = inputs(Composed)
    with torch.no_grad():
        kept_up, narrowed = (
            trifast_inductor.explain(model(Recipe(softmax=softmax)).bfloat16(), x.bfloat16(), mask).rows[0]
            for model in (Composed, Downcast)
        )
    assert (kept_up.dtype, narrowed.dtype) == ("bfloat16", "bfloat16")
