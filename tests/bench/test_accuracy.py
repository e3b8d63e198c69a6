"""The float64 that everything is held against, and what each peer that runs here is off by."""

import pytest
import torch

from tests.bench.conftest import CPU, small
from trifast_inductor.bench import accuracy
from trifast_inductor.bench.accuracy import Exact, exact_fits
from trifast_inductor.bench.case import Case, draw
from trifast_inductor.bench.peers import PEERS
from trifast_inductor.kernels.triangle_attention import reference


@pytest.mark.parametrize("name", ["ours", "eager", "sdpa", "sdpa-compiled"])
@pytest.mark.parametrize("mask", ["padding", "random", "none"])
def test_peers_agree_with_float64(name: str, mask: str, case: Case) -> None:
    case = small(layout=case.layout, mask=mask)
    peer = PEERS[name]
    inputs = draw(case, peer.axes, CPU, seed=0)
    out = peer.build(case)(*inputs.arguments)
    gradients = torch.autograd.grad(out, inputs.leaves, inputs.grad_out)
    forward, backward, worst = Exact(case, CPU).errors((out.detach(), *gradients), peer.axes)
    assert 0 < forward < 1e-6
    assert 0 < backward < 1e-5
    assert worst in ("dq", "dk", "dv", "dbias", "dgate")


def test_chunks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    whole = Exact(case, CPU).results
    monkeypatch.setattr(accuracy, "_ROW_BYTES", 4 * 8 * case.B * case.H * case.N**2)
    for a, b in zip(whole, Exact(case, CPU).results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_it_is_the_definition_of_the_op() -> None:
    case = small()
    x = draw(case, "brihd", CPU, seed=0)
    q, k, v, bias = (t.detach().double() for t in x.leaves)
    out, *_ = reference.forward(q, k, v, bias, None, x.mask, case.D**-0.5, -1e9, False)
    torch.testing.assert_close(Exact(case, CPU).results[0], out)


def test_a_wrong_result_is_named(case: Case) -> None:
    exact = Exact(case, CPU)
    results = [t.clone() for t in exact.results]
    results[3] *= 1.5
    forward, backward, worst = exact.errors(tuple(results), "brihd")
    assert (forward, worst) == (0.0, "dv")
    assert backward == pytest.approx(0.5)
    results[0][0] = float("nan")
    assert exact.errors(tuple(results), "brihd")[0] == float("inf")


def test_large_sizes_are_not_worth_it_on_a_cpu() -> None:
    assert exact_fits(small(N=64, H=4, D=32, B=1), CPU)
    assert not exact_fits(small(N=1024, H=4, D=32, B=1), CPU)
