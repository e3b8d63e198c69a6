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

# At N=128, on a core with 1 MiB of L2, 1 to 2 MiB are alike; half costs 10 % in calls to torch, twice 10 % in
# cache misses.
CHUNK_BYTES = 3 << 19


@dataclasses.dataclass(frozen=True)
class _Block:
    """Some rows of all heads, cut into chunks of `h` heads."""

    batch: slice
    rows: slice
    h: int

    def heads_first(self, x: Tensor) -> Tensor:
        """`[H, b, r, N, D]`, this block of x, `[B, R, N, H, D]`."""
        return x[self.batch, self.rows].permute(3, 0, 1, 2, 4)

    def by_row(self, x: Tensor) -> Tensor:
        """`[h, b, r, I, J]` of a chunk's `[h·b·r, I, J]`."""
        return x.view(self.h, -1, self.rows.stop - self.rows.start, *x.shape[1:])


def _blocks(q: Tensor, k: Tensor, dtype: torch.dtype) -> Iterator[_Block]:
    """Cover all rows. A chunk takes rows first, then batches, then heads; the first block is the largest."""
    b, r, i, heads, _ = q.shape
    room = max(1, CHUNK_BYTES // (i * k.shape[2] * dtype.itemsize))
    rows = min(r, room)
    batches = min(b, room // rows)
    most_heads = min(heads, room // (rows * batches))
    h = max(divisor for divisor in range(1, most_heads + 1) if heads % divisor == 0)
    for b0 in range(0, b, batches):
        for r0 in range(0, r, rows):
            yield _Block(slice(b0, min(b0 + batches, b)), slice(r0, min(r0 + rows, r)), h)


class _Buffers:
    """Memory by name, used again by every block: fresh memory costs a page fault for each 4 KiB."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flat: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        if name not in self._flat:
            self._flat[name] = torch.empty(size, dtype=dtype, device=self._device)
        return self._flat[name][:size].view(shape)

    def load(self, name: str, x: Tensor, block: _Block, dtype: torch.dtype) -> Tensor:
        """A block of x, `[B, R, N, H, D]`, as a batch of matrices for each chunk: `[H/h, h·b·r, N, D]`."""
        matrices = block.heads_first(x)
        # MKL reads strided matrices in place; oneDNN, which has bfloat16, would copy them for each product.
        if x.dtype != dtype or dtype == torch.bfloat16:
            matrices = self.get(name, matrices.shape, dtype).copy_(matrices)
        return matrices.unflatten(0, (-1, block.h)).flatten(1, 3)

    def cast(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x itself where it has that dtype."""
        return x if x.dtype == dtype else self.get(name, x.shape, dtype).copy_(x)


def _store(matrices: Tensor, x: Tensor, block: _Block) -> None:
    """Write a block of x, `[B, R, N, H, D]`, from `[H/h, h·b·r, N, D]`."""
    heads_first = block.heads_first(x)
    heads_first.copy_(matrices.view(heads_first.shape))


@dataclasses.dataclass(frozen=True)
class _Terms:
    """What makes the logits beside q and k; `of` gives the part of one block, of the second shape."""

    bias: Tensor | None  # [H, B, 1, I, J]; [H/h, h, b, 1, I, J]
    key_bias: Tensor | None  # [B, R, 1, J]; [b, r, 1, J], and so the next two
    kept: Tensor | None  # all bits set where key_mask is False, none where it is True
    fill: Tensor | None  # the bits of `fill` where key_mask is True, none elsewhere
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
        heads_first = None if bias is None else bias.to(dtype).contiguous().transpose(0, 1)[:, :, None]
        by_key = None if key_bias is None else key_bias.to(dtype)[:, :, None]
        kept = filled = None
        if key_mask is not None:
            bits = torch.int64 if dtype == torch.float64 else torch.int32
            kept = key_mask.to(bits)[:, :, None] - 1
            filled = torch.zeros_like(kept, dtype=dtype).masked_fill_(key_mask[:, :, None], fill).view(bits)
        return cls(heads_first, by_key, kept, filled, scale, key_term_first)

    def of(self, block: _Block) -> "_Terms":
        def rows(by_key: Tensor | None) -> Tensor | None:
            return None if by_key is None else by_key[block.batch, block.rows]

        bias = None if self.bias is None else self.bias[:, block.batch].unflatten(0, (-1, block.h))
        return dataclasses.replace(
            self, bias=bias, key_bias=rows(self.key_bias), kept=rows(self.kept), fill=rows(self.fill)
        )

    def write_logits(self, x: Tensor, q: Tensor, k: Tensor, chunk: int) -> None:
        """Fill x, `[h, b, r, I, J]`, from q and k, `[h·b·r, N, D]`. The adds keep their order."""
        bias = None if self.bias is None else self.bias[chunk]
        in_order = (self.key_bias, bias) if self.key_term_first else (bias, self.key_bias)
        terms = [term for term in in_order if term is not None]
        # The product is added to the first term, unless the select comes between them.
        starts = bool(terms) and (self.kept is None or not self.key_term_first)
        if starts:
            x.copy_(terms.pop(0))
        matrices = x.flatten(0, 2)
        matrices.baddbmm_(q, k.mT, beta=int(starts), alpha=self.scale)
        if self.fill is not None:
            # (x & kept) | fill is the select, whatever x holds; masked_fill_ and where are not vectorised and
            # take 80 to 110 µs a MiB, as long as a product, against 25.
            self.cut(x)
            x.view(self.fill.dtype).bitwise_or_(self.fill)
        for term in terms:
            x.add_(term)

    def cut(self, x: Tensor) -> None:
        """Zero x, `[h, b, r, I, J]`, where the select puts `fill`."""
        if self.kept is not None:
            x.view(self.kept.dtype).bitwise_and_(self.kept)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product_dtype(q: Tensor) -> torch.dtype:
    """The dtype of every product but q·kᵀ.

    bfloat16, as in eager, where oneDNN multiplies it: twice as fast as float32 on AVX512-BF16. Elsewhere, and
    for float16 always, torch multiplies in a plain loop, twenty times slower than float32.
    """
    if q.dtype == torch.bfloat16 and q.is_cpu and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return _sum_dtype(q.dtype)


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
    dtype, product_dtype = _sum_dtype(q.dtype), _product_dtype(q)
    out = torch.empty((b, r, i, h, d), dtype=q.dtype, device=q.device)
    row_max, p_max = (torch.empty((b, r, h, i), dtype=dtype, device=q.device) for _ in range(2))
    if out.numel() == 0 or j == 0:
        return out.zero_(), row_max.fill_(float("-inf")), p_max.zero_()

    terms = _Terms.prepare(bias, key_bias, key_mask, scale, fill, key_term_first, dtype)
    buffers = _Buffers(q.device)
    for block in _blocks(q, k, dtype):
        terms_ = terms.of(block)
        q_, k_ = buffers.load("q", q, block, dtype), buffers.load("k", k, block, dtype)
        v_ = buffers.load("v", v, block, product_dtype)
        out_ = buffers.get("out", q_.shape, product_dtype)
        row_max_, p_max_ = (buffers.get(name, q_.shape[:3], dtype) for name in ("row_max", "p_max"))
        x = buffers.get("x", (q_.shape[1], i, j), dtype)
        x_by_row = block.by_row(x)
        for chunk in range(h // block.h):
            terms_.write_logits(x_by_row, q_[chunk], k_[chunk], chunk)
            torch.amax(x, -1, out=row_max_[chunk])
            torch.softmax(x, -1, out=x)
            torch.amax(x, -1, out=p_max_[chunk])
            torch.bmm(buffers.cast("p", x, product_dtype), v_[chunk], out=out_[chunk])
        _store(out_, out, block)
        _store(row_max_, row_max.transpose(2, 3)[..., None], block)
        _store(p_max_, p_max.transpose(2, 3)[..., None], block)
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

    What forward saved is not read: softmax anew takes less time than exp(x - row_max).
    """
    h, i, j = q.shape[3], q.shape[2], k.shape[2]
    dtype, product_dtype = _sum_dtype(q.dtype), _product_dtype(q)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dbias = None
    if bias is not None and needs_dbias:
        dbias = torch.zeros((h, q.shape[0], i, j), dtype=dtype, device=q.device)
    is_empty = q.numel() == 0 or k.numel() == 0
    if is_empty:
        for gradient in (dq, dk, dv):
            gradient.zero_()

    terms = _Terms.prepare(bias, key_bias, key_mask, scale, fill, key_term_first, dtype)
    buffers = _Buffers(q.device)
    for block in () if is_empty else _blocks(q, k, dtype):
        terms_ = terms.of(block)
        q_, k_ = buffers.load("q", q, block, dtype), buffers.load("k", k, block, dtype)
        q_factor, k_factor, v_, g_ = (
            buffers.load(name, t, block, product_dtype)
            for name, t in (("q factor", q), ("k factor", k), ("v", v), ("g", grad_out))
        )
        dq_ = buffers.get("dq", q_.shape, product_dtype)
        dk_, dv_ = (buffers.get(name, k_.shape, product_dtype) for name in ("dk", "dv"))
        dbias_ = None if dbias is None else dbias[:, block.batch].unflatten(0, (-1, block.h))
        x = buffers.get("x", (q_.shape[1], i, j), dtype)
        x_by_row = block.by_row(x)
        for chunk in range(h // block.h):
            terms_.write_logits(x_by_row, q_[chunk], k_[chunk], chunk)
            torch.softmax(x, -1, out=x)
            torch.bmm(buffers.cast("product", x, product_dtype).mT, g_[chunk], out=dv_[chunk])
            dp = torch.bmm(g_[chunk], v_[chunk].mT, out=buffers.get("product", x.shape, product_dtype))
            ds = buffers.cast("ds", dp, dtype)
            torch.ops.aten._softmax_backward_data.out(ds, x, -1, dtype, grad_input=ds)
            ds_by_row = block.by_row(ds)
            # The select cuts the bias off only when it came after the bias.
            if dbias_ is not None and key_term_first:
                dbias_[chunk].add_(ds_by_row.sum(2))
            terms_.cut(ds_by_row)
            if dbias_ is not None and not key_term_first:
                dbias_[chunk].add_(ds_by_row.sum(2))
            factor = buffers.cast("product", ds, product_dtype)
            dq_[chunk].baddbmm_(factor, k_factor[chunk], beta=0, alpha=scale)
            dk_[chunk].baddbmm_(factor.mT, q_factor[chunk], beta=0, alpha=scale)
        _store(dq_, dq, block)
        _store(dk_, dk, block)
        _store(dv_, dv, block)
    if bias is None or dbias is None:
        return dq, dk, dv, torch.empty(0, dtype=q.dtype, device=q.device)
    return dq, dk, dv, dbias.transpose(0, 1).to(bias.dtype).contiguous()
