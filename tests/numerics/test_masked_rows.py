"""Wholly masked rows: as eager in every spelling, and the page says what that is."""

import pytest
import torch
from torch._dynamo.utils import counters

from . import page
from .masked_rows import DTYPES, SPELLINGS, AllSpellings, inputs, rewritten, run

pytestmark = pytest.mark.usefixtures("compiled_afresh")

# Its own quantum is 32 at -65504, so that eager loses a bias that comes after; see docs/numerics.md.
KNOWN = {("float16", "`masked_fill(finfo.min) + bias`")}
ROWS_LOST = {
    "one row": [[False, True, False], [False, False, False]],
    "a batch": [[False, False, False], [True, True, True]],
    "all": [[True, True, True], [True, True, True]],
}


def assert_as_eager(dtype, compiled, lost, device="cpu"):
    """Values too, of masked rows and others: NaN at the same places, the rest within a few roundings."""
    leaves, kept = inputs(DTYPES[dtype], torch.tensor(ROWS_LOST[lost]), device)
    both = zip(run(AllSpellings(), leaves, kept), run(compiled, leaves, kept), strict=True)
    tolerance = 16 * torch.finfo(DTYPES[dtype]).eps
    for spelling, (eager, ours) in zip(SPELLINGS, both, strict=True):
        if (dtype, spelling) not in KNOWN:
            for name, value in eager.items():
                torch.testing.assert_close(
                    ours[name],
                    value,
                    rtol=tolerance,
                    atol=tolerance,
                    equal_nan=True,
                    msg=lambda text, place=(spelling, name): f"{place}: {text}",
                )


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_spelling_is_as_eager(dtype):
    compiled = torch.compile(AllSpellings(), backend=rewritten)
    for lost in ROWS_LOST:
        assert_as_eager(dtype, compiled, lost)
    assert counters["trifast"] == {"rewritten": len(SPELLINGS)}


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_no_gradient_passes_that_eager_stops(dtype):
    for spelling, eager, ours in zip(SPELLINGS, *page.rows(dtype), strict=True):
        assert (eager == ours) == ((dtype, spelling) not in KNOWN), spelling


def test_the_page_says_what_is_measured():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.in_page(text) == page.render(), "run python -m tests.numerics.page"


def test_through_inductor():
    """What `backend="trifast"` generates around the op, in float32."""
    compiled = torch.compile(AllSpellings(), backend="trifast")
    assert_as_eager("float32", compiled, "one row")
    assert_as_eager("float32", compiled, "all")
    assert counters["trifast"] == {"rewritten": len(SPELLINGS)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_on_a_gpu(dtype):
    compiled = torch.compile(AllSpellings(), backend="trifast")
    for lost in ROWS_LOST:
        assert_as_eager(dtype, compiled, lost, "cuda")
    assert counters["trifast"] == {"rewritten": len(SPELLINGS)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_page_holds_for_a_gpu(dtype):
    """The kernels behind the same graph; eager on the CPU beside them."""
    lost = torch.tensor(ROWS_LOST["all"])
    on_cpu, on_gpu = (inputs(DTYPES[dtype], lost, device) for device in ("cpu", "cuda"))
    eager = run(AllSpellings(), *on_cpu)
    ours = run(torch.compile(AllSpellings(), backend=rewritten), *on_gpu)
    for spelling, a, b in zip(SPELLINGS, eager, ours, strict=True):
        if (dtype, spelling) not in KNOWN:
            for name, value in a.items():
                assert torch.equal(b[name].isnan().cpu(), value.isnan()), (spelling, name)
                assert bool(b[name].any()) == bool(value.any()), (spelling, name)


def test_the_page_tells_rows_apart():
    """The classification itself: three different lines among float32's, so that "the same" says something."""
    eager, _ = page.rows("float32")
    assert {row.out for row in eager} == {"mean of v", "NaN", "0"}
    assert {row.q for row in eager} == {"yes", "NaN", "0"}
    assert {row.bias for row in eager} == {"yes", "NaN", "0"}
