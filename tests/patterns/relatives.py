"""The relatives of triangle attention that the same op serves, each as a model spells it.

`example` gives the inputs of one; the first is the one whose gradient is compared.
"""

import torch
from torch import Tensor, nn

C, S, H, D = 16, 5, 2, 8


class Relative(nn.Module):
    """Projections of a representation, and a bias from pairs."""

    seen_in = ""
    rewrites = 1
    tolerance = 1e-5

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(C, H * D, bias=False) for _ in range(3))
        self.bias, self.out = nn.Linear(C, H, bias=False), nn.Linear(H * D, C)

    def heads(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q of x, k and v of y, as `[..., H, N, D]`."""
        sources = (x, x if y is None else y, x if y is None else y)
        projections = (self.q, self.k, self.v)
        q, k, v = (p(s).unflatten(-1, (H, D)).transpose(-2, -3) for p, s in zip(projections, sources, strict=True))
        return q, k, v

    def merged(self, o: Tensor) -> Tensor:
        return self.out(o.transpose(-2, -3).flatten(-2))

    @staticmethod
    def example(B: int, N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        raise NotImplementedError


def _kept(*shape: int) -> Tensor:
    kept = torch.ones(shape)
    kept[..., -1] = 0
    return kept


class MSARowAttentionWithPairBias(Relative):
    """r is the sequence: S of them, and N residues."""

    seen_in = "OpenFold MSARowAttentionWithPairBias, AlphaFold2 Alg. 7"

    def forward(self, m: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(m)
        a = torch.matmul(q * D**-0.5, k.transpose(-1, -2))
        a = a + (1e9 * (mask - 1))[:, :, None, None, :]
        a = a + self.bias(z).permute(0, 3, 1, 2).unsqueeze(1)
        return self.merged(a.softmax(-1) @ v)

    @staticmethod
    def example(B: int, N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return torch.randn(B, S, N, C, dtype=dtype), torch.randn(B, N, N, C, dtype=dtype), _kept(B, S, N).to(dtype)


class MSAColumnAttention(Relative):
    """No bias: along the sequences of each residue, with a mask."""

    seen_in = "OpenFold MSAColumnAttention, AlphaFold2 Alg. 8"

    def forward(self, m: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(m.transpose(1, 2))
        a = q @ k.transpose(-1, -2) * D**-0.5 + (1e9 * (mask.transpose(1, 2) - 1))[:, :, None, None, :]
        return self.merged(a.softmax(-1) @ v).transpose(1, 2)

    @staticmethod
    def example(B: int, N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return torch.randn(B, S, N, C, dtype=dtype), _kept(B, N, S).transpose(1, 2).to(dtype)


class SingleAttentionWithPairBias(Relative):
    """No rows: R = 1."""

    seen_in = "boltz AttentionPairBias, AlphaFold3 Alg. 24"
    tolerance = 1e-3  # float32 whatever the model is, and weights up to a few hundred in the gradients

    def forward(self, s: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (p(s).view(*s.shape[:-1], H, D) for p in (self.q, self.k, self.v))
        a = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()) / D**0.5
        a = a + self.bias(z).permute(0, 3, 1, 2).float() + (1 - mask[:, None, None].float()) * -1e6
        o = torch.einsum("bhij,bjhd->bihd", a.softmax(-1), v.float()).to(v.dtype)
        return self.out(o.flatten(-2))

    @staticmethod
    def example(B: int, N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return torch.randn(B, N, C, dtype=dtype), torch.randn(B, N, N, C, dtype=dtype), _kept(B, N).to(dtype)


class DiffusionAttention(Relative):
    """Samples share the pair bias, which is repeated over them."""

    seen_in = "boltz and protenix diffusion transformer, repeat_interleave over samples"

    def forward(self, a: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(a)
        bias = self.bias(z).permute(0, 3, 1, 2).repeat_interleave(S, 0)
        x = q @ k.mT * D**-0.5 + bias + (1e9 * (mask.repeat_interleave(S, 0) - 1))[:, None, None]
        return self.merged(x.softmax(-1) @ v)

    @staticmethod
    def example(B: int, N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return torch.randn(B * S, N, C, dtype=dtype), torch.randn(B, N, N, C, dtype=dtype), _kept(B, N).to(dtype)


class TemplatePairStack(Relative):
    """Six axes: templates before the rows, and a bias for each of them."""

    seen_in = "OpenFold TemplatePairStack"

    def forward(self, t: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(t)
        a = q @ k.transpose(-1, -2) * D**-0.5
        a = a + (1e9 * (mask - 1))[..., :, None, None, :]
        a = a + self.bias(t).movedim(-1, -3).unsqueeze(-4)
        return self.merged(a.softmax(-1) @ v)

    @staticmethod
    def example(B: int, N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return torch.randn(B, 3, N, N, C, dtype=dtype), _kept(B, 3, N, N).to(dtype)


class CrossLengths(Relative):
    """Queries and keys are of different lengths."""

    seen_in = "attention from one chain to another"

    def forward(self, x: Tensor, y: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(x, y)
        a = q @ k.mT * D**-0.5 + self.bias(z).permute(0, 3, 1, 2)[:, None]
        a = a.masked_fill(mask[:, :, None, None, :] == 0, -1e9)
        return self.merged(a.softmax(-1) @ v)

    @staticmethod
    def example(B: int, N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, y = torch.randn(B, S, N, C, dtype=dtype), torch.randn(B, S, N + 3, C, dtype=dtype)
        return x, y, torch.randn(B, N, N + 3, C, dtype=dtype), _kept(B, S, N + 3).to(dtype)


class NoBatch(Relative):
    """Four axes: the rows are the only batch."""

    seen_in = "protenix, [N, N, C]"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        a = q @ k.mT * D**-0.5 + self.bias(x).permute(2, 0, 1) + (1e9 * (mask - 1))[:, None, None]
        return self.merged(a.softmax(-1) @ v)

    @staticmethod
    def example(B: int, N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return torch.randn(N, N, C, dtype=dtype), _kept(N, N).to(dtype)


class RowsInChunks(Relative):
    """Rows in chunks, with batch axes flattened and the bias expanded over them first."""

    seen_in = "OpenFold chunk_layer, chunk_size=4"
    rewrites = 3

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows, N = x.shape[0], x.shape[1]
        bias = self.bias(x).permute(2, 0, 1)[None].expand(rows, H, N, N)
        parts = []
        for start in range(0, 12, 4):
            q, k, v = self.heads(x[start : start + 4])
            a = torch.matmul(q / D**0.5, k.transpose(-1, -2))
            a += (1e9 * (mask - 1))[start : start + 4, None, None, :]
            a += bias[start : start + 4]
            parts.append(a.softmax(-1) @ v)
        return self.merged(torch.cat(parts))

    @staticmethod
    def example(B: int, N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return torch.randn(12, 12, C, dtype=dtype), _kept(12, 12).to(dtype)


class ScaledDotProduct(Relative):
    """SDPA, given the sum of bias and mask expanded to [B*N, H, N, N]."""

    seen_in = "F.scaled_dot_product_attention in other public models"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        B, N = x.shape[:2]
        q, k, v = (t.flatten(0, 1) for t in self.heads(x))
        bias = self.bias(x).permute(0, 3, 1, 2)[:, None] + (1e9 * (mask - 1))[:, :, None, None, :]
        bias = bias.expand(B, N, H, N, N).reshape(B * N, H, N, N)
        o = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.merged(o).unflatten(0, (B, N))

    @staticmethod
    def example(B: int, N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return torch.randn(B, N, N, C, dtype=dtype), _kept(B, N, N).to(dtype)


class ScaledDotProductMaskedRows(ScaledDotProduct):
    """The mask holds -inf, for all keys of some rows: SDPA gives 0 there."""

    seen_in = "F.scaled_dot_product_attention, five axes, mask of -inf"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        left_out = torch.zeros_like(mask).masked_fill(mask == 0, float("-inf"))
        bias = self.bias(x).permute(0, 3, 1, 2)[:, None] + left_out[:, :, None, None, :]
        o = nn.functional.scaled_dot_product_attention(q * D**-0.5, k, v, attn_mask=bias, scale=1.0)
        return self.merged(o)

    @staticmethod
    def example(B: int, N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        mask = _kept(B, N, N)
        mask[0, 1] = 0
        return torch.randn(B, N, N, C, dtype=dtype), mask.to(dtype)


class NanToNum(Relative):
    """-inf for masked keys, and NaN of wholly masked rows set to 0 after the softmax."""

    seen_in = "other public models"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        a = q @ k.mT * D**-0.5 + self.bias(x).permute(0, 3, 1, 2)[:, None]
        a = a.masked_fill(mask[:, :, None, None, :] == 0, float("-inf"))
        return self.merged(a.softmax(-1).nan_to_num() @ v)

    example = ScaledDotProduct.example


class CausalPairs(Relative):
    """A pair mask of -inf, the same for all rows: exactly a bias."""

    seen_in = "a mask over pairs"

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        a = q @ k.mT * D**-0.5 + self.bias(x).permute(0, 3, 1, 2)[:, None]
        n = torch.arange(x.shape[1], device=x.device)
        a = a.masked_fill(n[:, None] < n, float("-inf"))
        return self.merged(a.softmax(-1) @ v)

    @staticmethod
    def example(B: int, N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.randn(B, N, N, C, dtype=dtype),)


class LearnedTemperature(Relative):
    """A learned scale for each head, on the logits and on the bias."""

    seen_in = "cosine attention"

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.rand(H, 1, 1) + 0.5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        a = (q @ k.mT + self.bias(x).permute(0, 3, 1, 2)[:, None]) * self.temperature
        a = a + (1e9 * (mask - 1))[:, :, None, None, :]
        return self.merged(a.softmax(-1) @ v)

    example = ScaledDotProduct.example


RELATIVES: list[type[Relative]] = [
    MSARowAttentionWithPairBias,
    MSAColumnAttention,
    SingleAttentionWithPairBias,
    DiffusionAttention,
    TemplatePairStack,
    CrossLengths,
    NoBatch,
    RowsInChunks,
    ScaledDotProduct,
    ScaledDotProductMaskedRows,
    NanToNum,
    CausalPairs,
    LearnedTemperature,
]
