"""Triangle attention in plain torch, a few rows at a time: the default for CPU tensors and for float64.

    x = scale·q·kᵀ + bias (⊕ key term);  p = softmax_j(x);  out = p·v
    dv = pᵀ·g;  ds = p ∘ (g·vᵀ - Σ_j p ∘ g·vᵀ);  dq = scale·ds·k;  dk = scale·dsᵀ·q;  dbias = Σ_r ds

The logits of a few rows of one head fill a buffer that stays in cache and is used again for the next few: memory grows
with N². Inside, heads come first: `[H, B, R, N, D]` of a block of rows, of which one head is a batch of matrices that
share one bias. Shapes and the key term are described in `op.py`; figures are in `docs/benchmarks/cpu.md`.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# The second-level cache of a core or two: half costs 5-15 % in calls to torch, twice is no faster (docs/benchmarks).
CHUNK_BYTES = 1 << 20

_Rows = tuple[slice, slice]  # of B and R


def _spans(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


class _Chunks:
    """How the logits are cut: blocks of rows, and in each block groups of heads, all of `CHUNK_BYTES` or less.

    A chunk holds one row of one head at the least. `carve` hands out the part of a buffer that a chunk fills.
    """

    def __init__(self, q: Tensor, keys: int, dtype: torch.dtype) -> None:
        self.batch, self.rows, i, self.heads, _ = q.shape
        room = CHUNK_BYTES // (i * keys * dtype.itemsize)
        steps = []
        for size in (self.rows, self.batch, self.heads):
            steps.append(max(1, min(size, room)))
            room //= steps[-1]
        self.row_step, self.batch_step, self.head_step = steps

    @property
    def rows_of_block(self) -> int:
        return self.batch_step * self.row_step

    def blocks(self) -> Iterator[_Rows]:
        return ((bs, rs) for bs in _spans(self.batch, self.batch_step) for rs in _spans(self.rows, self.row_step))

    def head_groups(self) -> Iterator[slice]:
        return _spans(self.heads, self.head_step)


def _carve(buffer: Tensor, *shape: int) -> Tensor:
    return buffer[: math.prod(shape)].view(shape)


def _heads_first(x: Tensor, block: _Rows, dtype: torch.dtype) -> Tensor:
    """`[H, b, r, N, D]` of a block of `[B, R, N, H, D]`, in its order in memory: a cast reads it straight through."""
    return x[block].to(dtype).permute(3, 0, 1, 2, 4)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product_dtype(q: Tensor) -> torch.dtype:
    """The dtype in which p and ds are multiplied by v, g, q and k.

    bfloat16, as in eager, where oneDNN multiplies it (twice as fast as float32 on AVX512-BF16). Without oneDNN, and
    for float16 always, torch multiplies with a plain loop, twenty times slower than float32.
    """
    if q.dtype == torch.bfloat16 and q.is_cpu and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return _sum_dtype(q.dtype)


class _Terms:
    """What is added to scale·q·kᵀ, in the dtype of the sums, and the select by key."""

    def __init__(
        self,
        bias: Tensor | None,
        key_bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        fill: float,
        key_term_first: bool,
        dtype: torch.dtype,
    ) -> None:
        self.scale = scale
        self.key_term_first = key_term_first
        self.bias = None if bias is None else bias.to(dtype).contiguous()
        self.key_bias = None if key_bias is None else key_bias.to(dtype)
        self.kept_bits: Tensor | None = None
        if key_mask is not None:
            # (x & kept) | fill is the select, whatever x holds; masked_fill_ is not vectorised and costs as much
            # as a product (110 against 25 µs a MiB).
            bits = torch.int64 if dtype == torch.float64 else torch.int32
            self.kept_bits = key_mask.to(bits) - 1
            fill_where_masked = torch.zeros(key_mask.shape, dtype=dtype, device=key_mask.device)
            self.fill_bits = fill_where_masked.masked_fill_(key_mask, fill).view(bits)

    def logits(self, x: Tensor, q: Tensor, k: Tensor, block: _Rows, heads: slice) -> None:
        """Fill x, `[h, b, r, I, J]`, with the logits of q and k, `[h·b·r, N, D]`."""
        bias = None if self.bias is None else self.bias[block[0], heads].transpose(0, 1)[:, :, None]
        key_bias = None if self.key_bias is None else self.key_bias[block][..., None, :]
        terms = [t for t in ((key_bias, bias) if self.key_term_first else (bias, key_bias)) if t is not None]
        # The first term starts the product, unless a select stands between the two.
        beta = 0
        if terms and not (self.kept_bits is not None and self.key_term_first):
            x.copy_(terms.pop(0))
            beta = 1
        matrices = x.flatten(0, 2)
        torch.baddbmm(matrices, q, k.mT, beta=beta, alpha=self.scale, out=matrices)
        if self.kept_bits is not None:
            self.cut(x, block)
            x.view(self.fill_bits.dtype).bitwise_or_(self.fill_bits[block][..., None, :])
        for term in terms:
            x.add_(term)

    def cut(self, x: Tensor, block: _Rows) -> None:
        """Zero x, `[h, b, r, I, J]`, where the select puts `fill`."""
        if self.kept_bits is not None:
            x.view(self.kept_bits.dtype).bitwise_and_(self.kept_bits[block][..., None, :])


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
    """Output `[B, R, I, H, D]` in the dtype of q; row maximum and row sum `[B, R, H, I]` in float32 or float64."""
    b, r, i, h, d = q.shape
    j = k.shape[2]
    dtype, product_dtype = _sum_dtype(q.dtype), _product_dtype(q)
    out = q.new_empty((b, r, i, h, d))
    row_max, p_max = (q.new_empty((b, r, h, i), dtype=dtype) for _ in range(2))
    if out.numel() == 0 or j == 0:
        return out.zero_(), row_max.fill_(float("-inf")), p_max.zero_()
    terms = _Terms(bias, key_bias, key_mask, scale, fill, key_term_first, dtype)
    chunks = _Chunks(q, j, dtype)
    n = chunks.rows_of_block
    x_buffer = q.new_empty(chunks.head_step * n * i * j, dtype=dtype)
    p_buffer = q.new_empty(chunks.head_step * n * i * j, dtype=product_dtype)
    out_buffer = q.new_empty(h * n * i * d, dtype=product_dtype)
    for block in chunks.blocks():
        q_, k_ = (_heads_first(t, block, dtype) for t in (q, k))
        v_ = _heads_first(v, block, product_dtype)
        shape = q_.shape[1:3]
        o_ = _carve(out_buffer, *q_.shape)
        for hs in chunks.head_groups():
            nh = hs.stop - hs.start
            x = _carve(x_buffer, nh, *shape, i, j)
            terms.logits(x, q_[hs].flatten(0, 2), k_[hs].flatten(0, 2), block, hs)
            row_max[block][:, :, hs] = x.amax(-1).permute(1, 2, 0, 3)
            torch.softmax(x, -1, out=x)
            p_max[block][:, :, hs] = x.amax(-1).permute(1, 2, 0, 3)
            p = x if product_dtype == dtype else _carve(p_buffer, *x.shape).copy_(x)
            torch.bmm(p.flatten(0, 2), v_[hs].flatten(0, 2), out=o_[hs].flatten(0, 2))
        out[block] = o_.permute(1, 2, 3, 0, 4)
    # The largest probability is exp(0) / row_sum; exp() on its own takes longer than the whole softmax.
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
    b, r, i, h, d = q.shape
    j = k.shape[2]
    dtype, product_dtype = _sum_dtype(q.dtype), _product_dtype(q)
    dq = q.new_empty(q.shape)
    dk = q.new_empty(k.shape)
    dv = q.new_empty(k.shape)
    db = torch.zeros((h, b, i, j), dtype=dtype, device=q.device)
    terms = _Terms(bias, key_bias, key_mask, scale, fill, key_term_first, dtype)
    chunks = _Chunks(q, j, dtype)
    n = chunks.rows_of_block
    x_buffer = q.new_empty(chunks.head_step * n * i * j, dtype=dtype)
    dp_buffer = q.new_empty(chunks.head_step * n * i * j, dtype=dtype)
    p_buffer = q.new_empty(chunks.head_step * n * i * j, dtype=product_dtype)
    dq_buffer = q.new_empty(h * n * i * d, dtype=product_dtype)
    dk_buffer = q.new_empty(h * n * j * d, dtype=product_dtype)
    dv_buffer = q.new_empty(h * n * j * d, dtype=product_dtype)
    for block in chunks.blocks():
        q_, k_, v_, g_ = (_heads_first(t, block, dtype) for t in (q, k, v, grad_out))
        if product_dtype == dtype:
            qp, kp, gp = q_, k_, g_
        else:
            qp, kp, gp = (_heads_first(t, block, product_dtype) for t in (q, k, grad_out))
        shape = q_.shape[1:3]
        dq_ = _carve(dq_buffer, *q_.shape)
        dk_ = _carve(dk_buffer, *k_.shape)
        dv_ = _carve(dv_buffer, *k_.shape)
        for hs in chunks.head_groups():
            nh = hs.stop - hs.start
            x = _carve(x_buffer, nh, *shape, i, j)
            terms.logits(x, q_[hs].flatten(0, 2), k_[hs].flatten(0, 2), block, hs)
            torch.softmax(x, -1, out=x)
            p = x if product_dtype == dtype else _carve(p_buffer, *x.shape).copy_(x)
            torch.bmm(p.flatten(0, 2).mT, gp[hs].flatten(0, 2), out=dv_[hs].flatten(0, 2))
            ds = _carve(dp_buffer, *x.shape)
            torch.bmm(g_[hs].flatten(0, 2), v_[hs].flatten(0, 2).mT, out=ds.flatten(0, 2))
            torch.ops.aten._softmax_backward_data.out(ds, x, -1, dtype, grad_input=ds)
            if needs_dbias and key_term_first:
                db[hs, block[0]] += ds.sum(2)
            terms.cut(ds, block)
            if needs_dbias and not key_term_first:
                db[hs, block[0]] += ds.sum(2)
            dsp = ds if product_dtype == dtype else _carve(p_buffer, *x.shape).copy_(ds)
            dqm, dkm = dq_[hs].flatten(0, 2), dk_[hs].flatten(0, 2)
            torch.baddbmm(dqm, dsp.flatten(0, 2), kp[hs].flatten(0, 2), beta=0, alpha=scale, out=dqm)
            torch.baddbmm(dkm, dsp.flatten(0, 2).mT, qp[hs].flatten(0, 2), beta=0, alpha=scale, out=dkm)
        dq[block] = dq_.permute(1, 2, 3, 0, 4)
        dk[block] = dk_.permute(1, 2, 3, 0, 4)
        dv[block] = dv_.permute(1, 2, 3, 0, 4)
    return dq, dk, dv, db.permute(1, 0, 2, 3).contiguous().to(bias.dtype)
