"""What each spelling of a mask makes of a row whose keys are all left out, eager beside `backend="trifast"`.

A spelling takes q, k, v `[B, R, H, N, D]`, bias `[B, 1, H, N, N]` and kept, bool `[B, R, 1, 1, N]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trifast_inductor.rewrite import rewrite

B, R, H, N, D = 2, 3, 2, 9, 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LEAVES = ("q", "k", "v", "bias")

Spelling = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def product(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, k.transpose(-1, -2)) * D**-0.5


def added(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kept: Tensor) -> Tensor:
    a = product(q, k) + bias + 1e9 * (kept.to(q.dtype) - 1)
    return a.softmax(-1) @ v


def added_before_the_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kept: Tensor) -> Tensor:
    a = product(q, k)
    a += 1e9 * (kept.to(q.dtype) - 1)
    a += bias
    return a.softmax(-1) @ v


def added_in_float32(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kept: Tensor) -> Tensor:
    a = (product(q, k) + bias).float() + 1e9 * (kept.float() - 1)
    return a.softmax(-1).to(v.dtype) @ v


def added_infinity(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kept: Tensor) -> Tensor:
    a = product(q, k) + bias + torch.zeros_like(kept, dtype=q.dtype).masked_fill(~kept, -torch.inf)
    return a.softmax(-1) @ v


def filled_with_the_least(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kept: Tensor) -> Tensor:
    a = (product(q, k) + bias).masked_fill(~kept, torch.finfo(q.dtype).min)
    return a.softmax(-1) @ v


def filled_with_the_least_before_the_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kept: Tensor) -> Tensor:
    a = product(q, k).masked_fill(~kept, torch.finfo(q.dtype).min) + bias
    return a.softmax(-1) @ v


def filled_in_float32(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kept: Tensor) -> Tensor:
    a = torch.where(kept, (product(q, k) + bias).float(), -1e9)
    return a.softmax(-1).to(v.dtype) @ v


def filled_with_infinity(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kept: Tensor) -> Tensor:
    a = (product(q, k) + bias).masked_fill(~kept, -torch.inf)
    return a.softmax(-1) @ v


def filled_and_nan_to_num(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kept: Tensor) -> Tensor:
    a = (product(q, k) + bias).masked_fill(~kept, -torch.inf)
    return a.softmax(-1).nan_to_num(0.0) @ v


def by_name(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kept: Tensor) -> Tensor:
    both = torch.zeros_like(kept, dtype=q.dtype).masked_fill(~kept, -torch.inf) + bias
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=both)


SPELLINGS: dict[str, Spelling] = {
    "`a + bias + 1e9·(mask - 1)`": added,
    "`a += 1e9·(mask - 1)`, then `a += bias`": added_before_the_bias,
    "`a.float() + 1e9·(mask - 1)`": added_in_float32,
    "`a + mask` of 0 and -inf": added_infinity,
    "`masked_fill(finfo.min)`": filled_with_the_least,
    "`masked_fill(finfo.min) + bias`": filled_with_the_least_before_the_bias,
    "`where(mask, a.float(), -1e9)`": filled_in_float32,
    "`masked_fill(-inf)`": filled_with_infinity,
    "`masked_fill(-inf)`, `nan_to_num` after the softmax": filled_and_nan_to_num,
    "SDPA, `attn_mask` of bias and -inf": by_name,
}


class AllSpellings(nn.Module):
    """Each on leaves of its own: one graph to compile for all, and a NaN of one reaches no other."""

    def forward(self, leaves: list[list[Tensor]], kept: Tensor) -> list[Tensor]:
        return [spell(*own, kept) for spell, own in zip(SPELLINGS.values(), leaves, strict=True)]


def inputs(dtype: torch.dtype, lost: Tensor, device: str = "cpu") -> tuple[list[list[Tensor]], Tensor]:
    """Leaves for every spelling, and kept keys: about two thirds, none in the rows of `lost`, bool `[B, R]`."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, R, H, N, D),) * 3 + ((B, 1, H, N, N),)
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    leaves = [[t.clone().requires_grad_() for t in drawn] for _ in SPELLINGS]
    kept = torch.rand((B, R, 1, 1, N), generator=generator) > 0.3
    kept[..., 0] = True
    return leaves, (kept & ~lost[:, :, None, None, None]).to(device)


def run(model: Callable[..., Any], leaves: list[list[Tensor]], kept: Tensor) -> list[dict[str, Tensor]]:
    """For each spelling its output and the gradients of its leaves."""
    outs = model(leaves, kept)
    found = []
    for out, own in zip(outs, leaves, strict=True):
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
        gradients = torch.autograd.grad(out, own, grad, retain_graph=True)
        found.append({"out": out.detach(), **dict(zip(LEAVES, gradients, strict=True))})
    return found


def rewritten(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
    """The pass and AOTAutograd as `backend="trifast"` has them, without inductor's C++, which takes half a minute."""
    rewrite(gm.graph, strict=True)
    gm.recompile()
    return torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)


@dataclass(frozen=True)
class Row:
    """Of wholly masked rows: the output, and whether a gradient passes through them."""

    out: str
    q: str
    k: str
    v: str
    bias: str


def describe(found: dict[str, Tensor], values: Tensor) -> Row:
    """`found` of a batch in which every row is wholly masked, so that dbias is of such rows alone."""
    gradients = {name: _gradient(found[name][-1]) for name in LEAVES}
    return Row(_output(found["out"][-1], values[-1]), **gradients)


def _output(out: Tensor, v: Tensor) -> str:
    if out.isnan().all():
        return "NaN"
    if not out.any():
        return "0"
    mean = v.float().mean(-2, keepdim=True).expand_as(out)
    return "mean of v" if torch.allclose(out.float(), mean, rtol=0.02, atol=0.02) else "weighed by the bias"


def _gradient(t: Tensor) -> str:
    if t.isnan().any():
        return "NaN"
    return "yes" if t.any() else "0"


def measured(dtype: torch.dtype, backend: Any) -> tuple[list[Row], list[Row]]:
    """Eager's rows and those of the compiled module: batch 1 is masked throughout, of batch 0 one row."""
    lost = torch.tensor([[False, True, False], [True, True, True]])
    leaves, kept = inputs(dtype, lost)
    torch._dynamo.reset()
    model = AllSpellings()
    both = (run(model, leaves, kept), run(torch.compile(model, backend=backend), leaves, kept))
    values = [own[2].detach() for own in leaves]
    eager, ours = ([describe(found, v) for found, v in zip(results, values, strict=True)] for results in both)
    return eager, ours
