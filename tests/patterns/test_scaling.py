"""Scaling by a number becomes the op's scale; in place only when no other alias sees the write."""

import pytest
import torch
from torch import Tensor, fx

import trifast_inductor
from trifast_inductor.kernels.triangle_attention import op
from trifast_inductor.patterns.site import Reason
from trifast_inductor.rewrite import rewrite

from .graphs import captured, rewriting
from .near_misses import NearMiss
from .spellings import D, inputs


class Scaled(NearMiss):
    """`scale` is what each case does to q, and may return something else to be added to the result."""

    def scale(self, q: Tensor) -> tuple[Tensor, Tensor | float]:
        raise NotImplementedError

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.transpose(2, 3) for t in self.heads(x))
        q, extra = self.scale(q)
        p = self.probabilities(self.biased(self.logits(q, k), x, mask))
        return self.gated((p @ v).transpose(2, 3).flatten(-2), x) + extra


class OutOfPlace(Scaled):
    def scale(self, q):
        return (q * 2).contiguous() * D**-0.5, 0.0


class InPlace(Scaled):
    def scale(self, q):
        q /= 4
        return q.mul_(2), 0.0


class ReadByName(Scaled):
    """The scaled queries are read again, as themselves."""

    def scale(self, q):
        q *= 0.25
        return q, q.mean()


class ReadAsAlias(Scaled):
    """What the queries are a view of is read after the write, and sees it."""

    def scale(self, q):
        before = q.transpose(2, 3)
        q *= 0.25
        return q, before.mean()


class WrittenThroughAnAlias(Scaled):
    """A second write goes through another view: the scaled queries see that one too."""

    def scale(self, q):
        alias = q.transpose(2, 3)
        q *= 0.5
        alias.add_(0.1)
        return q, 0.0


class ByATensor(Scaled):
    """Not a number: the queries are multiplied outside the op."""

    def scale(self, q):
        return q * torch.linspace(0.1, 1, D, device=q.device, dtype=q.dtype), 0.0


def scale_of(graph: fx.Graph) -> float:
    (node,) = (n for n in graph.nodes if n.target is op.triangle_attention)
    return node.args[6]


@pytest.mark.parametrize("trains", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (OutOfPlace, 2 * D**-0.5),
        (InPlace, 0.5),
        (ReadByName, 0.25),
        (ReadAsAlias, 1.0),
        (ByATensor, 1.0),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_scale_is_folded_only_where_nothing_else_sees_it(case: type[Scaled], expected: float, trains: bool) -> None:
    torch.manual_seed(0)
    model = case().double()
    x, mask = inputs(case, dtype=torch.float64)
    with torch.set_grad_enabled(trains):
        want = model(x, mask)
        gm = captured(model, x, mask)
        (row,) = rewrite(gm.graph)
        assert row.rewritten
        assert scale_of(gm.graph) == pytest.approx(expected)
        torch._dynamo.reset()
        got = torch.compile(model, backend=rewriting)(x, mask)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_write_through_another_alias_is_declined() -> None:
    (row,) = trifast_inductor.explain(WrittenThroughAnAlias(), *inputs(WrittenThroughAnAlias)).rows
    assert row.reason == Reason.INPUT_OVERWRITTEN.slug
