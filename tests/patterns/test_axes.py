"""Labels through layout ops, with numbers and with symbols."""

import pytest
import sympy
import torch

from trifast_inductor.patterns import axes, canonical
from trifast_inductor.patterns.axes import Atom, flat


def atoms(*sizes):
    return [Atom(size) for size in sizes]


def test_regroup_folds_and_unfolds() -> None:
    b, r, h = atoms(2, 3, 5)
    folded = axes.regroup(((b,), (r,), (h,)), (6, 5))
    assert folded == ((b, r), (h,))
    assert axes.regroup(folded, (2, 1, 3, 5)) == ((b,), (), (r,), (h,))


def test_regroup_splits_an_atom_once_and_everywhere() -> None:
    (folded,) = atoms(6)
    ((outer,), (inner,)) = axes.regroup(((folded,),), (2, 3))
    assert (outer.size, inner.size) == (2, 3)
    assert flat((folded,)) == (outer, inner)


def test_regroup_declines_what_does_not_divide() -> None:
    assert axes.regroup(tuple((a,) for a in atoms(4, 3)), (6, 2)) is None
    assert axes.regroup(((atoms(4)[0],),), (4, 2)) is None


def test_symbolic_factors() -> None:
    n, m = sympy.symbols("n m", positive=True, integer=True)
    assert axes.quotient(4 * n * m, n) == 4 * m
    assert axes.quotient(n, m) is None
    assert axes.quotient(6, 4) is None


class RepeatedBias(torch.nn.Module):
    """The same bias, repeated over r = 3 rows and folded into the batch of 2 in six ways."""

    def forward(self, bias):
        return [
            bias.unsqueeze(1).expand(-1, 3, -1, -1).reshape(6, 4, 5),
            bias.repeat_interleave(3, dim=0),
            bias[:, None].repeat(1, 3, 1, 1).flatten(0, 1),
            torch.broadcast_to(bias.view(2, 1, 20), (2, 3, 20)).reshape(6, 4, 5),
            bias.unsqueeze(1).tile((1, 3, 1, 1)).view(6, 4, 5),
            torch.stack([bias] * 1, 1).expand(2, 3, 4, 5).contiguous().view(6, 4, 5),
        ]


@pytest.mark.parametrize("way", range(6))
def test_repeats_are_seen_through(way: int) -> None:
    from .graphs import captured

    gm = captured(RepeatedBias(), torch.randn(2, 4, 5))
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    value = canonical.read(gm.graph).outputs_of[output.args[0][way]]
    labels = (tuple(folded := atoms(6)), tuple(atoms(4)), tuple(atoms(5)))
    while (pulled := axes.pull(value, labels)) is not None:
        value, labels = pulled
    assert value.op is None
    outer, _ = flat(folded)
    assert outer.size == 2
    assert flat(labels[0]) == (outer,)
