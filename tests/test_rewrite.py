"""The pass over one graph: nothing is left half done, and no input makes a compile fail."""

import pytest
import torch
from torch import fx, nn
from torch._dynamo.utils import counters
from torch._inductor import ir

from trifast_inductor import rewrite as rewrite_module
from trifast_inductor.errors import DeclinedError
from trifast_inductor.patterns import canonical
from trifast_inductor.patterns.lower import Lowering
from trifast_inductor.patterns.site import Declined, Reason
from trifast_inductor.rewrite import rewrite

from .patterns.graphs import captured

pytestmark = pytest.mark.usefixtures("compiled_afresh")


def attend(q, k, v, bias):
    return torch.softmax(q @ k.mT + bias, -1) @ v


def twice(q, k, v, bias):
    return attend(attend(q, k, v, bias), k, v, bias)


def arguments(N: int = 5):
    q, k, v = (torch.randn(1, N, 2, N, 8) for _ in range(3))
    return q, k, v, torch.randn(1, 1, 2, N, N)


def fail_at(monkeypatch, method: str, call: int, error: Exception) -> None:
    """The n-th call of one of Lowering's methods raises instead of running."""
    calls = []
    original = getattr(Lowering, method)

    def failing(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == call:
            raise error
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Lowering, method, failing)


def is_as_captured(gm: fx.GraphModule) -> bool:
    gm.graph.lint()
    return "trifast_inductor" not in str(gm.graph)


class TestAllOrNothing:
    @pytest.mark.parametrize("dynamic", [False, True])
    @pytest.mark.parametrize("error", [ValueError("a bug"), Declined(Reason.UNDECIDED_SIZES)])
    def test_a_site_that_cannot_be_lowered_is_refused_alone(self, monkeypatch, error, dynamic):
        gm = captured(twice, *arguments(), dynamic=dynamic)
        fail_at(monkeypatch, "_back", 2, error)
        rows = rewrite(gm.graph)
        assert [row.rewritten for row in rows] == [True, False]
        slug = error.reason.slug if isinstance(error, Declined) else "unreadable"
        assert counters["trifast"] == {"rewritten": 1, "declined": 1, f"declined: {slug}": 1}
        assert [node.target for node in gm.graph.nodes].count(
            torch.ops.trifast_inductor.triangle_attention.default
        ) == 1
        gm.graph.lint()

    def test_an_exception_after_sites_were_lowered_undoes_them(self, monkeypatch):
        gm = captured(twice, *arguments(), dynamic=True)
        monkeypatch.setattr(rewrite_module, "_runs_as_before", lambda *_: False)
        fail_at(monkeypatch, "restore_strides", 2, ValueError("a bug"))
        rewrite(gm.graph)
        assert is_as_captured(gm)
        assert counters["trifast"] == {"declined": 1, "declined: unreadable": 1}

    def test_a_rewritten_graph_that_does_not_run_is_put_back(self, monkeypatch):
        gm = captured(twice, *arguments(), dynamic=True)
        monkeypatch.setattr(rewrite_module, "_runs_as_before", lambda *_: False)
        assert [row.reason for row in rewrite(gm.graph)] == ["unreadable", "unreadable"]
        assert is_as_captured(gm)

    def test_a_failing_reading_leaves_the_graph_alone(self, monkeypatch):
        gm = captured(twice, *arguments())
        monkeypatch.setattr(canonical, "read", lambda graph: 1 / 0)
        (row,) = rewrite(gm.graph)
        assert (row.reason, row.location) == ("unreadable", "unknown location")
        assert is_as_captured(gm)
        with pytest.raises(DeclinedError, match="could not be re-read"):
            rewrite(gm.graph, strict=True)


class TestBadInput:
    def test_no_example_values(self):
        gm = captured(attend, *arguments())
        for node in gm.graph.nodes:
            node.meta.clear()
        (row,) = rewrite(gm.graph)
        assert row.message.startswith("the graph could not be re-read as ATen (its nodes carry no example values)")
        assert is_as_captured(gm)

    def test_a_softmax_without_an_example_value(self):
        gm = captured(attend, *arguments())
        for node in gm.graph.nodes:
            if node.name == "softmax":
                node.meta.clear()
        assert [row.reason for row in rewrite(gm.graph)] == ["unreadable"]
        assert is_as_captured(gm)

    def test_a_module_call(self):
        """Dynamo inlines modules; a graph traced by torch.fx has them as calls."""

        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.over_keys = nn.Softmax(-1)

            def forward(self, q, k, v, bias):
                return self.over_keys(q @ k.transpose(-1, -2) + bias) @ v

        gm = fx.symbolic_trace(Attention())
        fake_mode = torch._subclasses.FakeTensorMode()
        for node, argument in zip(gm.graph.nodes, arguments(), strict=False):
            node.meta["example_value"] = fake_mode.from_tensor(argument)
        assert [row.reason for row in rewrite(gm.graph)] == ["unreadable"]
        assert is_as_captured(gm)

    def test_an_unknown_higher_order_operator(self):
        """Its results are inputs of what follows, and it may have written what it was given."""

        def f(q, k, v, bias):
            k = torch._higher_order_ops.wrap.wrap(torch.sin, k)
            return attend(q, k, v, bias)

        gm = captured(f, *arguments())
        assert any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in gm.graph.nodes)
        assert [row.rewritten for row in rewrite(gm.graph)] == [True]

    def test_the_logits_written_by_an_unknown_higher_order_operator(self):
        def f(q, k, v, bias):
            logits = torch._higher_order_ops.wrap.wrap(torch.sin, q @ k.mT + bias)
            return torch.softmax(logits, -1) @ v

        gm = captured(f, *arguments())
        (row,) = rewrite(gm.graph)
        assert not row.rewritten
        assert is_as_captured(gm)

    @pytest.mark.parametrize("capture", ["nonzero", "item"])
    def test_sizes_that_only_the_data_know(self, capture):
        """Rewritten, or declined with a reason, and right either way."""

        def f(q, k, v, bias, keep):
            if capture == "nonzero":
                rows = keep.nonzero().squeeze(-1)
                return attend(q[:, rows], k[:, rows], v[:, rows], bias)
            n = keep.sum().item()
            torch._check(n >= 2)
            torch._check(n <= keep.shape[0])
            return attend(*(t.narrow(1, 0, n) for t in (q, k, v)), bias)

        keep = torch.tensor([True, False, True, True, False])
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
            torch._dynamo.reset()
            compiled = torch.compile(f, backend="trifast", fullgraph=True)
            values = arguments()
            torch.testing.assert_close(compiled(*values, keep), f(*values, keep))
        declined = {"declined": 1, "declined: undecided-sizes": 1}
        copies = hasattr(ir, "is_contiguous_for_memory_format_or_false")  # from torch 2.13 on
        assert counters["trifast"] == ({"rewritten": 1} if copies or capture == "item" else declined)
