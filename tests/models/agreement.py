"""One comparison for every published model: compiled against eager, outputs and every gradient.

Both are measured against the same modules in float64, and the compiled one may be at most twice as far off as
eager, plus one rounding.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.afresh import without_cached_graphs
from trifast_inductor.testing import assert_within_budget

BACKEND = "trifast"
SIZES = C, HEAD_DIM, HEADS = 128, 32, 4
N = 17
KEPT = (N, 12, 0)  # tokens of each sequence that are no padding: rows with all, some and none of their keys


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    masked: bool
    training: bool
    autocast: bool = False

    def __str__(self) -> str:
        dtype = "autocast" if self.autocast else str(self.dtype).removeprefix("torch.")
        return f"{dtype}-{'mask' if self.masked else 'no_mask'}-{'training' if self.training else 'inference'}"


# Each pair of dtype, mask and mode once; all twelve take minutes of C++ compilation, and are for a GPU.
COVERING = [
    Case(torch.float32, masked=True, training=True),
    Case(torch.bfloat16, masked=False, training=True),
    Case(torch.float32, masked=True, training=True, autocast=True),
    Case(torch.bfloat16, masked=True, training=False),
    Case(torch.float32, masked=False, training=False),
]
ALL = [
    Case(dtype, masked, training, autocast)
    for dtype, autocast in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True))
    for masked in (True, False)
    for training in (True, False)
]
every_case = pytest.mark.parametrize("case", ALL if torch.cuda.is_available() else COVERING, ids=str)


class BothNodes(nn.Module):
    """A starting and an ending node on the same pair representation, so that one compilation serves both."""

    def __init__(self, starting: nn.Module, ending: nn.Module, **options: Any) -> None:
        super().__init__()
        self.starting, self.ending, self.options = starting, ending, options

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.starting(x, mask=mask, **self.options), self.ending(x, mask=mask, **self.options)


def token_mask() -> Tensor:
    """int64 `[B, N]`, 1 where a token is kept."""
    return (torch.arange(N) < torch.tensor(KEPT)[:, None]).long()


def pair_mask() -> Tensor:
    """float `[B, N, N]`, 1 where both tokens are kept."""
    kept = token_mask().float()
    return kept[:, :, None] * kept[:, None, :]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers that want their gradient, the same on every device and whatever the default dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).requires_grad_()


def node_inputs(case: Case, mask: Tensor) -> dict[str, Tensor]:
    """What `BothNodes` is called with."""
    x = {"x": drawn(len(KEPT), N, N, C)}
    return {**x, "mask": mask} if case.masked else x


def assert_agrees(
    model: nn.Module, inputs: Mapping[str, Tensor], case: Case, device: str, *, sites: int, declined: int = 0
) -> None:
    """Compile the model, its weights redrawn: so many sites rewritten and declined, and the budget kept."""
    _redraw(model)
    model = model.to(device, case.dtype).train(case.training)
    inputs = {name: _cast(tensor, device, case.dtype) for name, tensor in inputs.items()}
    eager = _results(model, model, inputs, case)
    with _float64_by_default():
        double = _in_float64(model)
        exact = _results(double, double, inputs, replace(case, dtype=torch.float64, autocast=False))

    torch._dynamo.reset()
    counters.clear()
    with without_cached_graphs():
        compiled = _results(torch.compile(model, backend=BACKEND), model, inputs, case)

    found = dict(counters["trifast"])
    assert (found.get("rewritten", 0), found.get("declined", 0)) == (sites, declined), found
    for name in eager:
        _assert_within_budget(name, compiled[name], eager[name], exact[name])


def _redraw(model: nn.Module) -> None:
    """Models start with output projections at 0 and gates at 1, where a broken attention would pass."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise / weight.shape[-1] ** 0.5)
            else:
                weight.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))


def _cast(tensor: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    wanted = dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(device, wanted).requires_grad_(tensor.requires_grad)


@contextmanager
def _float64_by_default() -> Iterator[None]:
    """einx casts Python numbers to the default dtype; the lowest float64 is -inf in float32."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def _in_float64(model: nn.Module) -> nn.Module:
    """The same weights in float64, the masking constant scaled along.

    Added to a logit, 1e9 rounds it away in float32 but not in float64. Scaled by the ratio of the two
    roundings it does so in both, and rows without a key are uniform in both.
    """
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if hasattr(module, "inf"):
            module.inf *= torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps
    return model


def _results(call: Callable[..., Any], model: nn.Module, inputs: Mapping[str, Tensor], case: Case) -> dict[str, Tensor]:
    """Outputs by position and, in training, the gradients of all parameters and inputs by name."""
    device = next(model.parameters()).device.type
    inputs = {name: _cast(tensor, device, case.dtype) for name, tensor in inputs.items()}
    with torch.set_grad_enabled(case.training), torch.autocast(device, torch.bfloat16, enabled=case.autocast):
        outputs = call(**inputs)
    results = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    if case.training:
        leaves = dict(model.named_parameters())
        leaves.update((name, tensor) for name, tensor in inputs.items() if tensor.requires_grad)
        # In bfloat16 precision the cotangents are the same numbers in every run.
        cotangents = [drawn(*output.shape, seed=2).detach().bfloat16().to(output) for output in outputs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        results.update((f"gradient of {name}", g) for name, g in zip(leaves, gradients, strict=True))
    return results


def _assert_within_budget(name: str, got: Tensor, eager: Tensor, exact: Tensor) -> None:
    assert (got.dtype, got.stride()) == (eager.dtype, eager.stride()), name
    off = (eager - exact).norm() / exact.norm()
    assert off < 0.1, f"{name}: eager itself is off by {off:.2f} of float64, which would allow anything"
    # 4: gradients of vectors (of a layer norm, of a gate's bias), each a sum of B·N·N terms that inductor adds in its
    # own order; with plain inductor, on a CPU in float32, the largest error among them is up to 2.8 times eager's.
    assert_within_budget(got, eager, exact, name=name, times=4.0 if got.ndim == 1 else 2.0)
