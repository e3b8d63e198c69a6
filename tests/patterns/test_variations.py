"""Every choice of every axis is rewritten and agrees with eager, alone; `test_fuzz.py` combines them."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import trifast_inductor
from trifast_inductor.testing import assert_within_budget

from .fuzz import Case, outcome
from .graphs import rewriting
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


class Upcast(Composed):
    """Logits in float32 of queries and keys that are halves, and probabilities in the values' dtype."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        return super().attend(q.to(wide) * 0.5, k.to(wide), v, *rest)

    def changed(self, t: Tensor, place: str) -> Tensor:
        return t.to(self.q.weight.dtype) if place == "probabilities" else t


def test_upcast_of_halves_costs_nothing() -> None:
    """The products of halves are exact in float32: the op takes the halves, and is as near to float64 as eager."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    exact_model = Upcast(Recipe()).double()
    model = copy.deepcopy(exact_model).bfloat16()
    with torch.no_grad():
        for half, double in zip(model.parameters(), exact_model.parameters(), strict=True):
            double.copy_(half)
        x, mask = inputs(Composed, N=24)
        x = x.bfloat16()
        mask[..., 0] = True
        (row,) = trifast_inductor.explain(model, x, mask).rows
        assert (row.rewritten, row.dtype) == (True, "bfloat16")
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=rewriting)(x, mask)
        assert_within_budget(compiled, model(x, mask), exact_model(x.double(), mask))
