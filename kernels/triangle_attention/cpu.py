"""Triangle attention in plain torch, a few rows at a time: the default for CPU tensors and for float64.

    x = scale·q·kᵀ + bias (⊕ key term);  p = softmax_j(x);  out = p·v
    dv = pᵀ·g;  dp = g·vᵀ;  ds = p ∘ (dp - Σ_j p ∘ dp);  dq = scale·ds·k;  dk = scale·dsᵀ·q;  dbias = Σ_r ds

A chunk is a few rows of one head, or of several heads where rows are few. Its logits fill a buffer that the
next chunk uses again: memory grows with N², and torch finds in cache what it has just written. Shapes and the
key term are described in `op.py`; figures are in `docs/benchmarks/cpu.md`.
"""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Backward, N=128, bfloat16, two cores with 1 MiB of L2 each: 33 ms with 1 MiB, 27 with 2, 25 with 3 and 4, 28 with 6.
CHUNK_BYTES = 3 << 20


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Slices of B, R and H. What is cut out has heads first: one head of several rows is a batch in place."""

    b: slice
    r: slice
    h: slice

    def of_rows(self, x: Tensor) -> Tensor:
        """`[h, b, r, N, D]` of `[B, R, N, H, D]`."""
        return x[self.b, self.r, :, self.h].permute(3, 0, 1, 2, 4)

    def of_bias(self, bias: Tensor) -> Tensor:
        """`[h, b, 1, I, J]` of `[B, H, I, J]`."""
        return bias[self.b, self.h, None].transpose(0, 1)

    def of_keys(self, by_key: Tensor) -> Tensor:
        """`[b, r, 1, J]` of `[B, R, J]`."""
        return by_key[self.b, self.r, None]


def _chunks(q: Tensor, k: Tensor, dtype: torch.dtype) -> Iterator[_Chunk]:
    """Cover everything; a chunk takes rows first, then batches, then heads. The first is the largest."""
    b, r, i, h, _ = q.shape
    room = max(1, CHUNK_BYTES // (i * k.shape[2] * dtype.itemsize))
    rows = min(r, room)
    batches = min(b, room // rows)
    heads = min(h, room // (rows * batches))
    for b_ in _cut(b, batches):
        for r_ in _cut(r, rows):
            for h_ in _cut(h, heads):
                yield _Chunk(b_, r_, h_)


def _cut(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


class _Buffers:
    """Memory by name, used again by every chunk: fresh memory costs a page fault for each 4 KiB."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flat: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        if name not in self._flat:
            self._flat[name] = torch.empty(size, dtype=dtype, device=self._device)
        return self._flat[name][:size].view(shape)

    def cast(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x itself where it has that dtype."""
        return x if x.dtype == dtype else self.get(name, x.shape, dtype).copy_(x)

    def load(self, name: str, x: Tensor, chunk: _Chunk, dtype: torch.dtype) -> Tensor:
        """A chunk of x, `[B, R, N, H, D]`, as a batch of matrices: `[h·b·r, N, D]`."""
        matrices = chunk.of_rows(x)
        # MKL reads strided matrices in place; oneDNN, which has bfloat16, would copy them for each product.
        if x.dtype != dtype or dtype == torch.bfloat16:
            matrices = self.get(name, matrices.shape, dtype).copy_(matrices)
        return matrices.flatten(0, 2)


def _store(matrices: Tensor, x: Tensor, chunk: _Chunk) -> None:
    """Write a chunk of x, `[B, R, N, H, D]`."""
    target = chunk.of_rows(x)
    target.copy_(matrices.view(target.shape))


@dataclasses.dataclass(frozen=True)
class _Terms:
    """What makes the logits beside q and k, in the dtype of the sums."""

    bias: Tensor | None  # [B, H, I, J]
    key_bias: Tensor | None  # [B, R, J]
    kept: Tensor | None  # [B, R, J]: all bits set where key_mask is False, none where it is True
    fill: Tensor | None  # [B, R, J]: the bits of `fill` where key_mask is True, none elsewhere
    scale: float
    key_term_first: bool

    @classmethod
    def prepare(
        cls,
        bias: Tensor | None,
        key_bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        fill: float,
        key_term_first: bool,
        dtype: torch.dtype,
    ) -> "_Terms":
        bias = None if bias is None else bias.to(dtype).contiguous()
        key_bias = None if key_bias is None else key_bias.to(dtype)
        kept = filled = None
        if key_mask is not None:
            bits = torch.int64 if dtype == torch.float64 else torch.int32
            kept = key_mask.to(bits) - 1
            filled = torch.zeros_like(kept, dtype=dtype).masked_fill_(key_mask, fill).view(bits)
        return cls(bias, key_bias, kept, filled, scale, key_term_first)

    def write_logits(self, x: Tensor, q: Tensor, k: Tensor, chunk: _Chunk) -> None:
        """Fill x, `[h, b, r, I, J]`, from q and k, `[h·b·r, N, D]`. The adds keep their order."""
        bias = None if self.bias is None else chunk.of_bias(self.bias)
        key_bias = None if self.key_bias is None else chunk.of_keys(self.key_bias)
        in_order = (key_bias, bias) if self.key_term_first else (bias, key_bias)
        terms = [term for term in in_order if term is not None]
        # The product is added to the first term, unless the select comes between them.
        starts = bool(terms) and (self.kept is None or not self.key_term_first)
        if starts:
            x.copy_(terms.pop(0))
        x.flatten(0, 2).baddbmm_(q, k.mT, beta=int(starts), alpha=self.scale)
        if self.fill is not None:
            # (x & kept) | fill is the select, whatever x holds; masked_fill_ and where are not vectorised and
            # take 80 to 110 µs a MiB, as long as a product, against 25.
            self.cut(x, chunk)
            x.view(self.fill.dtype).bitwise_or_(chunk.of_keys(self.fill))
        for term in terms:
            x.add_(term)

    def cut(self, x: Tensor, chunk: _Chunk) -> None:
        """Zero x, `[h, b, r, I, J]`, where the select puts `fill`."""
        if self.kept is not None:
            x.view(self.kept.dtype).bitwise_and_(chunk.of_keys(self.kept))


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums, row maximum and row sum are kept in, by every implementation."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product_dtype(q: Tensor) -> torch.dtype:
    """The dtype of every product but q·kᵀ.

    bfloat16, as in eager, where oneDNN multiplies it: twice as fast as float32 on AVX512-BF16. Elsewhere, and
    for float16 always, torch multiplies in a plain loop, twenty times slower than float32.
    """
    if q.dtype == torch.bfloat16 and q.is_cpu and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return sum_dtype(q.dtype)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    fill: float,
    key_term_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, R, I, H, D]`, dtype of q; row maximum and row sum `[B, R, H, I]`, float32 or float64."""
    b, r, i, h, d = q.shape
    j = k.shape[2]
    dtype, product_dtype = sum_dtype(q.dtype), _product_dtype(q)
    out = torch.empty((b, r, i, h, d), dtype=q.dtype, device=q.device)
    row_max, p_max = (torch.empty((b, r, h, i), dtype=dtype, device=q.device) for _ in range(2))
    if out.numel() == 0 or j == 0:
        return out.zero_(), row_max.fill_(float("-inf")), p_max.zero_()
    row_max_by_row, p_max_by_row = (t.transpose(2, 3).unsqueeze(-1) for t in (row_max, p_max))

    terms = _Terms.prepare(bias, key_bias, key_mask, scale, fill, key_term_first, dtype)
    buffers = _Buffers(q.device)
    for chunk in _chunks(q, k, dtype):
        q_, k_ = buffers.load("q", q, chunk, dtype), buffers.load("k", k, chunk, dtype)
        v_ = buffers.load("v", v, chunk, product_dtype)
        x = buffers.get("x", (*chunk.of_rows(q).shape[:3], i, j), dtype)
        terms.write_logits(x, q_, k_, chunk)
        _store(x.amax(-1), row_max_by_row, chunk)
        torch.softmax(x, -1, out=x)
        _store(x.amax(-1), p_max_by_row, chunk)
        p = buffers.cast("p", x, product_dtype).flatten(0, 2)
        _store(torch.bmm(p, v_, out=buffers.get("out", q_.shape, product_dtype)), out, chunk)
    # The largest probability is exp(0) / row_sum; a row of -inf has none and sums to 0. exp() and sum() would
    # take longer than softmax and this second maximum: 130 against 95 µs a MiB.
    row_sum = p_max.reciprocal_().masked_fill_(row_max == float("-inf"), 0.0)
    return out, row_max, row_sum


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    scale: float,
    fill: float,
    key_term_first: bool,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and, when asked for, bias: contiguous, in the dtype of their argument.

    Of what forward saved only the rows set to 0 are read: softmax anew takes less time than exp(x - row_max).
    """
    i, j = q.shape[2], k.shape[2]
    dtype, product_dtype = sum_dtype(q.dtype), _product_dtype(q)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dbias = None
    if bias is not None and needs_dbias:
        dbias = torch.zeros(bias.shape, dtype=dtype, device=q.device)
    is_empty = q.numel() == 0 or k.numel() == 0
    if is_empty:
        for gradient in (dq, dk, dv):
            gradient.zero_()

    zeroed = (row_max == math.inf).transpose(2, 3).unsqueeze(-1)  # [B, R, I, H, 1]
    has_zeroed = bool(zeroed.any())
    terms = _Terms.prepare(bias, key_bias, key_mask, scale, fill, key_term_first, dtype)
    buffers = _Buffers(q.device)
    for chunk in () if is_empty else _chunks(q, k, dtype):
        q_, k_, v_, g_ = (
            buffers.load(name, t, chunk, product_dtype) for name, t in (("q", q), ("k", k), ("v", v), ("g", grad_out))
        )
        x = buffers.get("x", (*chunk.of_rows(q).shape[:3], i, j), dtype)
        terms.write_logits(x, buffers.cast("q sum", q_, dtype), buffers.cast("k sum", k_, dtype), chunk)
        torch.softmax(x, -1, out=x)
        if has_zeroed:
            x.masked_fill_(chunk.of_rows(zeroed), 0.0)
        p = buffers.cast("product", x, product_dtype).flatten(0, 2)
        _store(torch.bmm(p.mT, g_, out=buffers.get("dv", k_.shape, product_dtype)), dv, chunk)
        dp = buffers.get("product", x.shape, product_dtype)  # in place of p, if that was a copy
        torch.bmm(g_, v_.mT, out=dp.flatten(0, 2))
        ds = buffers.cast("ds", dp, dtype)
        torch.ops.aten._softmax_backward_data.out(ds, x, -1, dtype, grad_input=ds)
        # The select cuts the bias off only when it came after the bias.
        if dbias is not None and key_term_first:
            chunk.of_bias(dbias).squeeze(2).add_(ds.sum(2))
        terms.cut(ds, chunk)
        if dbias is not None and not key_term_first:
            chunk.of_bias(dbias).squeeze(2).add_(ds.sum(2))

        ds_ = buffers.cast("product", ds, product_dtype).flatten(0, 2)
        dq_, dk_ = (buffers.get(name, t.shape, product_dtype) for name, t in (("dq", q_), ("dk", k_)))
        _store(dq_.baddbmm_(ds_, k_, beta=0, alpha=scale), dq, chunk)
        _store(dk_.baddbmm_(ds_.mT, q_, beta=0, alpha=scale), dk, chunk)
    if bias is None or dbias is None:
        return dq, dk, dv, torch.empty(0, dtype=q.dtype, device=q.device)
    return dq, dk, dv, dbias.to(bias.dtype)
