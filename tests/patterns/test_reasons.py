"""Every reason is triggered by a test, and documented in docs/patterns.md with what to do."""

from pathlib import Path

import pytest
import torch

import trifast_inductor
from trifast_inductor.errors import DeclinedError
from trifast_inductor.kernels.triangle_attention import validation
from trifast_inductor.patterns import axes, canonical, recording, terms
from trifast_inductor.patterns.site import Declined, Operand, Reason

from .near_misses import NEAR_MISSES, Softclamp
from .page import render
from .spellings import C, H, MatmulInPlace, Projections, inputs

# The near misses trigger theirs in test_attention.py; these need an environment of their own, below.
BY_ENVIRONMENT = {
    Reason.DTYPE,
    Reason.DEVICE,
    Reason.NO_TRITON,
    Reason.UNDECIDED_SIZES,
    Reason.VMAP,
    Reason.UNREADABLE,
}


def reasons(model: torch.nn.Module, *args: torch.Tensor, **options: object) -> set[str]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(**options):
        return {row.reason for row in trifast_inductor.explain(model, *args).rows}


def test_every_reason_has_a_trigger() -> None:
    assert {reason for _, reason in NEAR_MISSES} | BY_ENVIRONMENT == set(Reason)


def test_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch multiplies and exponentiates no other float dtype; were there one, it would be left alone."""
    monkeypatch.setattr(validation, "DTYPES", (torch.float32, torch.bfloat16))
    x, mask = inputs(MatmulInPlace, dtype=torch.float64)
    assert reasons(MatmulInPlace().double(), x, mask) == {"dtype"}


def test_device() -> None:
    x, mask = inputs(MatmulInPlace)
    assert reasons(MatmulInPlace().to("meta"), x.to("meta"), mask.to("meta")) == {"device"}


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "needs_triton", lambda device, dtype: True)
    monkeypatch.setattr(validation, "triton_works", lambda: False)
    assert reasons(MatmulInPlace(), *inputs(MatmulInPlace)) == {"no-triton"}


def test_undecided_sizes() -> None:
    """The keys arrive in pairs, and nothing says that an unknown number of them fills the bias."""

    class CutByData(Projections):
        def forward(self, x, mask):
            kept = int(mask[0, 0].sum().item())
            torch._check(kept <= x.shape[1])
            torch._check(kept >= 2)
            q, k, v = (t.transpose(2, 3) for t in self.heads(x))
            k, v = k[..., :kept, :], v[..., :kept, :]
            a = q @ k.mT + self.bias(x).permute(0, 3, 1, 2)[:, None, :, :, :kept]
            return self.gated((a.softmax(-1) @ v).transpose(2, 3).flatten(-2), x)

    found = reasons(CutByData(), *inputs(CutByData), capture_scalar_outputs=True)
    assert found <= {"undecided-sizes", ""}
    value = recording.Value(torch.empty(C, H), None, 0)
    operand = Operand(value, axes.fresh_labels(value))
    with pytest.raises(Declined) as declined:
        terms.without_copies(operand, known=())
    assert declined.value.reason is Reason.UNDECIDED_SIZES


def test_vmap() -> None:
    """Compiled as it is, and right: one softmax, named by its line."""

    class OverSamples(MatmulInPlace):
        def forward(self, x, mask):
            return torch.func.vmap(super().forward)(x, mask)

    model = OverSamples()
    x, mask = (t[None].expand(2, *t.shape) for t in inputs(MatmulInPlace))
    torch._dynamo.reset()
    (row,) = trifast_inductor.explain(model, x, mask).rows
    assert row.reason == "vmap"
    assert "spellings.py" in row.location
    torch.testing.assert_close(torch.compile(model, backend="trifast")(x, mask), model(x, mask))


def test_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: torch.fx.Graph) -> None:
        raise RuntimeError("no reading today")

    monkeypatch.setattr(canonical, "read", fail)
    assert reasons(MatmulInPlace(), *inputs(MatmulInPlace)) == {"unreadable"}


def test_strict_says_the_same() -> None:
    """`strict=True` raises with the location and the text of the report."""
    x, mask = inputs(Softclamp)
    torch._dynamo.reset()
    (row,) = trifast_inductor.explain(Softclamp(), x, mask).rows
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"near_misses\.py") as raised:
        torch.compile(Softclamp(), backend="trifast", options={"strict": True})(x, mask)
    causes = [raised.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    assert any(isinstance(cause, DeclinedError) or DeclinedError.__name__ in str(cause) for cause in causes)
    assert row.message in str(raised.value)


def test_page_is_up_to_date() -> None:
    """`python -m tests.patterns.page` writes it anew."""
    page = Path(__file__).parents[2] / "docs" / "patterns.md"
    assert page.read_text(encoding="utf-8") == render()
