"""Every spelling is rewritten and agrees with eager; every near miss is left alone, with its reason."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import trifast_inductor
from trifast_inductor.patterns.site import Reason

from .graphs import gradients, rewriting
from .near_misses import NEAR_MISSES, NearMiss
from .spellings import SPELLINGS, Projections, inputs

pytestmark = pytest.mark.usefixtures("compiled_afresh")


@pytest.mark.parametrize("B", [1, 2])
def test_a_result_that_einsum_returns_as_it_is(B: int) -> None:
    """Where B is 1 the strides of that axis are einsum's choice, and not those of the op."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        a = torch.einsum("brihd,brjhd->brhij", q * 0.3, k) + bias[:, None]
        return torch.einsum("brhij,brjhd->brihd", a.softmax(-1), v)

    q, k, v = torch.randn(3, B, 5, 6, 2, 8)
    bias = torch.randn(B, 2, 6, 6)
    expected = attend(q, k, v, bias)
    actual = torch.compile(attend, backend=rewriting)(q, k, v, bias)
    assert counters["trifast"] == {"rewritten": 1}
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.__name__)
def test_spelling_is_rewritten_and_agrees(spelling: type[Projections], dynamic: bool) -> None:
    """Outputs and all gradients in float64, where nothing hides behind rounding.

    1e-6: beside a mask of -1e9 float64 is spaced 1.2e-7, so wholly masked rows keep that much of eager's rounding.
    """
    model = spelling().double()
    x, mask = inputs(spelling, dtype=torch.float64)
    expected = gradients(copy.deepcopy(model), x, mask)
    compiled = torch.compile(model, backend=rewriting, dynamic=dynamic)
    actual = {name.removeprefix("_orig_mod."): value for name, value in gradients(compiled, x, mask).items()}
    assert counters["trifast"]["rewritten"] == 1
    assert counters["trifast"]["declined"] == 0
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=1e-6,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("size", [1, 2, 17])
def test_sizes_of_one_and_odd_sizes(size: int) -> None:
    """B = 1 is the usual inference case: an axis of size 1 must not decide any role."""
    for spelling in SPELLINGS:
        torch._dynamo.reset()
        model = spelling().double()
        x, mask = inputs(spelling, B=1, N=size, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, backend=rewriting)(x, mask), model(x, mask))


@pytest.mark.parametrize(("near_miss", "reason"), NEAR_MISSES, ids=lambda x: getattr(x, "__name__", None))
def test_near_miss_is_left_alone(near_miss: type[NearMiss], reason: Reason) -> None:
    model = near_miss().double()
    x, mask = inputs(near_miss, dtype=torch.float64)
    with torch.set_grad_enabled(near_miss.trains):
        torch.manual_seed(1)
        expected = copy.deepcopy(model)(x, mask)
        report = trifast_inductor.explain(model, x, mask)
        torch.manual_seed(1)
        torch._dynamo.reset()
        actual = torch.compile(model, backend=rewriting)(x, mask)
    assert {row.reason for row in report.rows} == {reason.slug}
    assert report.rewritten == counters["trifast"]["rewritten"] == 0
    assert all(reason.sentence in row.message and reason.way_out in row.message for row in report.rows)
    if reason is not Reason.DROPOUT:  # its noise is drawn in another order
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_dropout_that_is_off_is_no_obstacle() -> None:
    class DropoutOff(NearMiss):
        def probabilities(self, a: Tensor) -> Tensor:
            return torch.nn.functional.dropout(a.softmax(-1), p=0.3, training=self.training)

    report = trifast_inductor.explain(DropoutOff().eval(), *inputs(DropoutOff))
    assert (report.rewritten, report.declined) == (1, 0)


def test_own_output_strides_are_kept_where_they_leave_the_graph() -> None:
    """The op writes [B, R, I, H, D]; a result that is returned as it is gets eager's memory order."""

    class ReturnsHeads(NearMiss):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = (t.transpose(2, 3) for t in self.heads(x))
            o = self.biased(self.logits(q, k), x, mask).softmax(-1) @ v
            return o.view(-1, o.shape[-1]), o

    model, (x, mask) = ReturnsHeads(), inputs(ReturnsHeads)
    expected = model(x, mask)
    actual = torch.compile(model, backend=rewriting)(x, mask)
    assert counters["trifast"]["rewritten"] == 1
    for got, want in zip(actual, expected, strict=True):
        assert got.stride() == want.stride()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_failing_reading_leaves_the_graph_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from trifast_inductor.patterns import canonical

    def fail(graph):
        raise RuntimeError("no reading today")

    monkeypatch.setattr(canonical, "read", fail)
    model, (x, mask) = SPELLINGS[0](), inputs(SPELLINGS[0])
    torch.testing.assert_close(torch.compile(model, backend=rewriting)(x, mask), model(x, mask))
    assert counters["trifast"] == {"declined": 1, f"declined: {Reason.UNREADABLE.slug}": 1}


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT + bias, -1) @ v


def _query_turned(x: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    q = torch.nn.functional.linear(x, torch.eye(8, dtype=x.dtype))
    q.transpose_(2, 3)
    return _attend(q, k, v, bias)


def _alias_turned(x: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    q = x * 2
    q.add_(1).transpose_(2, 3)
    return _attend(q, k, v, bias)


def _logits_turned_twice(x: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    logits = x.transpose(2, 3) @ k.mT + bias
    logits.transpose_(-1, -2)
    probabilities = torch.softmax(logits, -2)
    probabilities.transpose_(-1, -2)
    return probabilities @ v


def _bias_unsqueezed(x: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    whole = bias.squeeze(1).clone()
    whole.unsqueeze_(1)
    return _attend(x.transpose(2, 3), k, v, whole)


@pytest.mark.parametrize("N", [2, 5])  # as many keys as heads, where a mistaken axis has the right size
@pytest.mark.parametrize("attend", [_query_turned, _alias_turned, _logits_turned_twice, _bias_unsqueezed])
def test_tensors_that_change_their_shape_in_place(attend: Callable[..., Tensor], N: int) -> None:
    x = torch.randn(2, 3, N, 2, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 3, 2, N, 8, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(2, 1, 2, N, N, dtype=torch.float64)
    actual = torch.compile(attend, backend=rewriting)(x, k, v, bias)
    assert counters["trifast"] == {"rewritten": 1}
    torch.testing.assert_close(actual, attend(x, k, v, bias))


LETTERS = {"batch": "B", "row": "R", "head": "H", "query": "I", "key": "J", "channel": "D", "row and head": "RH"}


@pytest.mark.parametrize("axis", LETTERS)
@pytest.mark.parametrize("spelling", ["matmul", "einsum"])
def test_one_of_each(spelling: str, axis: str) -> None:
    """An axis of size 1 takes no role from another.

    Of one key there is no softmax to speak of; of one channel einsum multiplies, and no contraction is left to find.
    """
    B, R, H, I, J, D = (1 if letter in LETTERS[axis] else n for n, letter in enumerate("BRHIJD", start=2))

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        if spelling == "matmul":
            a = q.transpose(2, 3) @ k.permute(0, 1, 3, 4, 2) + bias[:, None] + mask[:, :, None, None]
            return a.softmax(-1) @ v.transpose(2, 3)
        a = torch.einsum("brihd,brjhd->brhij", q, k) + bias.unsqueeze(1) + mask[:, :, None, None]
        return torch.einsum("brhij,brjhd->brhid", a.softmax(-1), v)

    def given() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = (B, R, I, H, D), (B, R, J, H, D), (B, R, J, H, D), (B, H, I, J)
        tensors = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
        kept = torch.rand(B, R, J, generator=generator) > 0.3
        return [*(t.requires_grad_() for t in tensors), torch.where(kept, 0.0, -1e4).double()]

    expected, actual = given(), given()
    attend(*expected).square().sum().backward()
    out = torch.compile(attend, backend=rewriting)(*actual)
    out.square().sum().backward()
    is_attention = axis != "key" and (spelling, axis) != ("einsum", "channel")
    assert counters["trifast"] == ({"rewritten": 1} if is_attention else {})
    for ours, eager in zip(actual[:4], expected[:4], strict=True):
        torch.testing.assert_close(ours.grad, eager.grad)
    torch.testing.assert_close(out, attend(*expected))
