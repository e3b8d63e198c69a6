"""Who is timed: one entry for each implementation of the same function, each given the axes that it likes."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trifast_inductor.bench.case import Attend, Case, as_called

OURS = ("ours", "ours-compiled")


@dataclass(frozen=True)
class Peer:
    """An implementation. `axes` is the order of q, k, v and the result; `load` gives the function for a case."""

    name: str
    axes: str
    load: Callable[[Case], Attend]
    backend: str | None = None  # torch.compile's, for those that are compiled
    package: str | None = None  # which has to be installed
    needs_cuda: bool = False

    def absent(self, device: torch.device) -> str | None:
        """Why it cannot run here, if so."""
        if self.needs_cuda and device.type != "cuda":
            return "needs a CUDA device"
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return None

    def build(self, case: Case) -> Callable[..., Any]:
        """What is called with an `InputSet`'s arguments; compiled anew, so that no shape becomes dynamic."""
        run = as_called(self.load(case), case, self.axes)
        if self.backend is None:
            return run
        torch._dynamo.reset()
        return torch.compile(run, backend=self.backend, dynamic=False)


def _eager(case: Case) -> Attend:
    """OpenFold's spelling: the bias and the mask are added in place to the logits, all in the inputs' dtype."""
    scale = case.D**-0.5

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        logits = torch.matmul(q * scale, k.transpose(-1, -2))  # [B, R, H, I, J]
        logits += bias[:, None]
        if mask is not None:
            logits += torch.where(mask, -1e9, 0.0).to(q.dtype)[:, :, None, None]
        return torch.matmul(torch.softmax(logits, -1), v)

    return attend


def _ours(case: Case) -> Attend:
    from trifast_inductor import triangle_attention

    return triangle_attention


def _sdpa(case: Case) -> Attend:
    """Rows folded into the batch; with a mask its sum with the bias has to be written out, N³."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        B, R, *_ = q.shape
        added = bias[:, None]
        if mask is not None:
            added = added.masked_fill(mask[:, :, None, None], _fill(q.dtype))
        added = added.expand(B, R, *added.shape[2:]).flatten(0, 1)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=added)
        return out.unflatten(0, (B, R))

    return attend


def _fill(dtype: torch.dtype) -> float:
    """-1e9, or what float16 has for it."""
    return -1e9 if dtype != torch.float16 else -6e4


def _flex(case: Case) -> Attend:
    """FlexAttention with bias and mask captured in `score_mod`."""
    from torch.nn.attention.flex_attention import flex_attention

    fill = _fill(case.dtype)
    # At D=64 its own choice on Hopper, 128 by 128, takes more shared memory than there is once a bias is captured.
    options: Any = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64} if case.D == 64 else None

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        B, R, *_ = q.shape
        one_bias = bias[0] if B == 1 else None
        row_mask = None if mask is None else mask.flatten(0, 1)

        def score_mod(score: Tensor, row: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            score = score + (bias[row // R, h, i, j] if one_bias is None else one_bias[h, i, j])
            return score if row_mask is None else torch.where(row_mask[row, j], fill, score)

        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        out: Any = flex_attention(q, k, v, score_mod=score_mod, kernel_options=options)
        return out.unflatten(0, (B, R))

    return attend


def _trifast(case: Case) -> Attend:
    call = importlib.import_module("trifast").triangle_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:  # it has no call without one
            mask = torch.zeros((q.shape[0], *q.shape[2:4]), dtype=torch.bool, device=q.device)
        return call(q, k, v, bias, mask)

    return attend


def _cuequivariance(case: Case) -> Attend:
    call = importlib.import_module("cuequivariance_torch").triangle_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        kept = None if mask is None else ~mask[:, :, None, None]
        return call(q, k, v, bias[:, None], kept)

    return attend


PEERS = {
    peer.name: peer
    for peer in (
        Peer("ours", "bhrid", _ours),
        Peer("ours-compiled", "brhid", _eager, backend="trifast"),
        Peer("eager", "brhid", _eager),
        Peer("inductor", "brhid", _eager, backend="inductor"),
        Peer("sdpa", "brhid", _sdpa),
        Peer("sdpa-compiled", "brhid", _sdpa, backend="inductor"),
        Peer("flex", "brhid", _flex, backend="inductor", needs_cuda=True),
        Peer("trifast", "bhrid", _trifast, package="trifast", needs_cuda=True),
        Peer("cuequivariance", "brhid", _cuequivariance, package="cuequivariance_torch", needs_cuda=True),
    )
}
