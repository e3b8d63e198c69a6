"""Triangle attention as models spell it, small; all written for these tests.

Each module takes (x `[B, N, N, C]`, mask `[B, N, N]`): float 0/1 for additive masks, bool True = kept for selects.
"""

import math

import torch
from torch import Tensor, nn

C, H, D = 16, 2, 8


class Projections(nn.Module):
    """LayerNorm, q, k, v, bias, gate and output, alike in all spellings."""

    mask_dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.bias = nn.Linear(C, H, bias=False)
        self.q, self.k, self.v = (nn.Linear(C, H * D, bias=False) for _ in range(3))
        self.gate, self.out = nn.Linear(C, H * D), nn.Linear(H * D, C)

    def gated(self, o: Tensor, x: Tensor) -> Tensor:
        """o: `[B, N, N, H·D]`."""
        return self.out(torch.sigmoid(self.gate(x)) * o)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as `[B, N, N, H, D]`."""
        q, k, v = (p(x).view(*x.shape[:-1], H, D) for p in (self.q, self.k, self.v))
        return q, k, v


class MatmulInPlace(Projections):
    """OpenFold and its descendants: in-place scale and adds, additive mask, heads second."""

    ending = False

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.ending:
            x, mask = x.transpose(-2, -3), mask.transpose(-1, -2)
        x = self.norm(x)
        mask_bias = (1e9 * (mask - 1))[..., :, None, None, :]
        pair_bias = self.bias(x).permute(0, 3, 1, 2).unsqueeze(-4)
        q, k, v = (t.transpose(-2, -3) for t in self.heads(x))
        q /= math.sqrt(D)
        a = torch.matmul(q, k.permute(0, 1, 2, 4, 3))
        a += mask_bias
        a += pair_bias
        a = nn.functional.softmax(a, -1)
        o = torch.matmul(a, v).transpose(-2, -3)
        o = self.gated(o.reshape(*o.shape[:-2], -1), x)
        return o.transpose(-2, -3) if self.ending else o


class MatmulInPlaceEnding(MatmulInPlace):
    """The same around the ending node, by transposing the pair tensor."""

    ending = True


class EinsumHeadsLast(Projections):
    """RoseTTAFold-like: logits [b, i, j, k, h], softmax over dim -2, select mask, float32 softmax."""

    mask_dtype = torch.bool

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        a = torch.einsum("bijhd,bikhd->bijkh", q, k) * D**-0.5
        a = a + self.bias(x).unsqueeze(1)
        a = a.masked_fill(~mask[:, :, None, :, None], -1e9)
        a = torch.softmax(a.float(), dim=-2).to(a.dtype)
        o = torch.einsum("bijkh,bikhd->bijhd", a, v)
        return self.gated(o.flatten(-2), x)


class EinsumOtherAxis(Projections):
    """Ending node without a transpose: the other pair axis is contracted."""

    mask_dtype = torch.bool

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        a = torch.einsum("bijhd,bkjhd->bijkh", q, k) * D**-0.5
        a = a + self.bias(x).transpose(1, 2).permute(0, 2, 1, 3)[:, :, None]
        a = a.masked_fill(~mask.transpose(1, 2)[:, None, :, :, None], torch.finfo(a.dtype).min)
        o = torch.einsum("bijkh,bkjhd->bijhd", a.softmax(dim=3), v)
        return self.gated(o.flatten(-2), x)


class FoldedRows(Projections):
    """lucidrains-like: rows folded into the batch, the bias repeated over them."""

    mask_dtype = torch.bool

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        B, N = x.shape[:2]
        bias = self.bias(x).permute(0, 3, 1, 2)
        bias = bias.unsqueeze(1).expand(B, N, H, N, N).reshape(B * N, H, N, N)
        rows = x.reshape(B * N, N, C)
        q, k, v = (p(rows).view(B * N, N, H, D).transpose(1, 2) for p in (self.q, self.k, self.v))
        a = torch.einsum("bhid,bhjd->bhij", q * D**-0.5, k) + bias
        a = a.masked_fill(~mask.reshape(B * N, 1, 1, N), -torch.finfo(a.dtype).max)
        o = torch.einsum("bhij,bhjd->bhid", a.softmax(-1), v)
        return self.gated(o.transpose(1, 2).reshape(B, N, N, H * D), x)


class RepeatInterleaved(Projections):
    """The bias repeated by repeat_interleave, baddbmm with heads folded in as well."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        B, N = x.shape[:2]
        bias = self.bias(x).permute(0, 3, 1, 2).repeat_interleave(N, dim=0).reshape(B * N * H, N, N)
        q, k, v = (t.transpose(2, 3).reshape(B * N * H, N, D) for t in self.heads(x))
        a = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=D**-0.5)
        a = a.view(B, N, H, N, N) + (1e9 * (mask - 1))[:, :, None, None, :]
        o = torch.bmm(a.softmax(-1).view(B * N * H, N, N), v).view(B, N, H, N, D)
        return self.gated(o.transpose(2, 3).flatten(-2), x)


class PreSummed(Projections):
    """Mask and bias are added to each other first; scale after the product."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.transpose(2, 3) for t in self.heads(x))
        both = (1e9 * (mask - 1))[:, :, None, None, :] + self.bias(x).permute(0, 3, 1, 2)[:, None]
        a = (q @ k.mT).mul(D**-0.5) + both
        o = nn.Softmax(dim=-1)(a) @ v
        return self.gated(o.transpose(2, 3).flatten(-2), x)


class BiasAfterSelect(Projections):
    """The bias is added to logits that are masked already."""

    mask_dtype = torch.bool

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.transpose(2, 3) for t in self.heads(x))
        a = torch.where(mask[:, :, None, None, :], q @ k.transpose(-1, -2) / D**0.5, -1e9)
        a = a + self.bias(x).permute(0, 3, 1, 2)[:, None]
        o = a.softmax(-1) @ v
        return self.gated(o.transpose(2, 3).flatten(-2), x)


class NoMask(Projections):
    """Pair bias alone."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.transpose(2, 3) for t in self.heads(x))
        a = self.bias(x).permute(0, 3, 1, 2)[:, None] + q @ k.mT * D**-0.5
        o = a.softmax(-1).contiguous() @ v
        return self.gated(o.transpose(2, 3).flatten(-2), x)


class SinglePairBias(Projections):
    """One representation row with a pair bias: no rows at all."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t[:, 0].transpose(1, 2) for t in self.heads(x))
        a = q @ k.mT * D**-0.5 + self.bias(x).permute(0, 3, 1, 2)
        a = a + (1e9 * (mask[:, 0] - 1))[:, None, None, :]
        o = (a.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        return self.gated(o[:, None].expand(-1, x.shape[1], -1, -1), x)


SPELLINGS: list[type[Projections]] = [
    MatmulInPlace,
    MatmulInPlaceEnding,
    EinsumHeadsLast,
    EinsumOtherAxis,
    FoldedRows,
    RepeatInterleaved,
    PreSummed,
    BiasAfterSelect,
    NoMask,
    SinglePairBias,
]


def inputs(
    spelling: type[Projections], B: int = 2, N: int = 12, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """x and an outer-product mask in which one sequence is padded, so that whole rows are masked."""
    x = torch.randn(B, N, N, C, dtype=dtype)
    kept = torch.ones(B, N)
    kept[-1, N - N // 3 :] = 0
    mask = kept[:, :, None] * kept[:, None, :]
    return x, mask.to(torch.bool if spelling.mask_dtype is torch.bool else dtype)
