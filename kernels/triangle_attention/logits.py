"""The logits of one tile and the probabilities made of them: every kernel's semantics, written once.

    x = scale·⟨q, k⟩ + bias (⊕ key term)     p = exp(x - row_max) / row_sum

All in float32 and natural-log units. Tiles may be `[i, j]` or `[j, i]`: `key` and `in_range` are broadcast.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton reads the annotations of a kernel's parameters, so only its own types may stand there.)

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def offset(index, stride, WIDE: tl.constexpr = True):
    """index·stride, in 64 bits whatever the stride was specialised to, or in 32, which take half of the registers."""
    return index.to(tl.int64) * stride if WIDE else index * tl.cast(stride, tl.int32)


@triton.jit
def within(index, length, EVEN: tl.constexpr):
    """Which indices lie below a length; a constant, which the compiler drops from loads, where blocks fit evenly."""
    return tl.full(index.shape, 1, tl.int1) if EVEN else index < length


@triton.jit
def head_of(operand, b, r, h):
    """Where one head of q, k, v or the gradient of the output begins; steps from row to row, and along a row."""
    ptr, stride_b, stride_r, stride_row, stride_h, stride_d = operand
    return ptr + b * stride_b + r * stride_r + h * stride_h, stride_row, stride_d


@triton.jit
def load_rows(
    ptr,
    rows,
    in_range,
    stride_row,
    stride_d,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr = True,
):
    """`[rows, BLOCK_D]` of an operand with D columns, zero outside it.

    ALIGNED: every row starts on 16 bytes. Triton finds that out by itself from strides that are multiples of 16,
    and heads of 8 or 24 columns lie 8 or 24 apart. WIDE: as in `offset`.
    """
    d = tl.arange(0, BLOCK_D)
    if WIDE:
        ptrs = ptr + offset(rows, stride_row)[:, None] + offset(d, stride_d)[None, :]
    else:  # added up before it meets the pointer
        ptrs = ptr + (offset(rows, stride_row, WIDE)[:, None] + offset(d, stride_d, WIDE)[None, :])
    if ALIGNED:
        ptrs = tl.multiple_of(ptrs, (1, 16))
    if D == BLOCK_D:
        tile = tl.load(ptrs, mask=in_range[:, None], other=0.0)
    else:
        tile = tl.load(ptrs, mask=in_range[:, None] & (d < D)[None, :], other=0.0)
    return tile


@triton.jit
def store_rows(ptr, tile, rows, in_range, stride_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The other way, into an operand whose columns lie side by side; rounds to its dtype."""
    d = tl.arange(0, BLOCK_D)
    ptrs = ptr + (rows * stride_row)[:, None] + d[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=in_range[:, None] & (d < D)[None, :])


@triton.jit
def _split(x):
    """x as the nearest tf32, and what is left of it. A NaN becomes -0 and NaN at worst, an infinity NaN."""
    big = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return big, x - big


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b in float32; acc may be None."""
    if PRECISION == "upcast":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    elif PRECISION == "3xtf32":
        a_big, a_small = _split(a)
        b_big, b_small = _split(b)
        # Summed apart from acc: tensor cores cut sums off where they should round, and a long sum would drift.
        part = tl.dot(a_small, b_big, None, input_precision="tf32")
        part = tl.dot(a_big, b_small, part, input_precision="tf32")
        part = tl.dot(a_big, b_big, part, input_precision="tf32")
        acc = part if acc is None else acc + part
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _paired(x, AXIS: tl.constexpr):
    """Each eight along the axis in the order 0 2 4 6 1 3 5 7."""
    if AXIS == 0:
        y = tl.permute(tl.reshape(x, [x.shape[0] // 8, 4, 2, x.shape[1]]), [0, 2, 1, 3])
    else:
        y = tl.permute(tl.reshape(x, [x.shape[0], x.shape[1] // 8, 4, 2]), [0, 1, 3, 2])
    return tl.reshape(y, x.shape)


@triton.jit
def dot_of_tile(p, b, acc, PRECISION: tl.constexpr):
    """`dot` whose left operand came out of a product itself.

    A thread holds columns 2c and 2c + 1 of a product, but c and c + 4 of a left operand in tf32: taking the terms of
    the sum in another order spares the exchange between threads, 4 shuffles and 10 selections a logit in dkdv.
    """
    if PRECISION == "tf32" or PRECISION == "3xtf32":
        acc = dot(_paired(p, 1), _paired(b, 0), acc, PRECISION)
    else:
        acc = dot(p, b, acc, PRECISION)
    return acc


@triton.jit
def load_key_term(ptr, keys, in_range, stride_j, KEY_TERM: tl.constexpr):
    """The key term of some keys: float32 to add, or bool where the logit is replaced."""
    if KEY_TERM == "add":
        term = tl.load(ptr + offset(keys, stride_j), mask=in_range, other=0.0).to(tl.float32)
    elif KEY_TERM == "select":
        term = tl.load(ptr + offset(keys, stride_j), mask=in_range, other=0).to(tl.int1)
    else:
        term = in_range  # not read
    return term


@triton.jit
def _with_key_term(x, key, fill, KEY_TERM: tl.constexpr):
    if KEY_TERM == "add":
        x = x + key
    elif KEY_TERM == "select":
        x = tl.where(key, tl.cast(fill, tl.float32), x)
    return x


@triton.jit
def logits_tile(
    qk,
    bias,
    key,
    in_range,
    scale,
    fill,
    HAS_BIAS: tl.constexpr,
    KEY_TERM: tl.constexpr,
    KEY_TERM_FIRST: tl.constexpr,
    EVEN_J: tl.constexpr,
):
    """What the softmax reads: scaled products, bias and key term in eager's order.

    A key past the end (not `in_range`) is -inf, never the fill: a row with all keys masked by a finite fill
    is uniform over the keys that exist.
    """
    # A launch from Python passes numbers as float32, one that inductor generates as float64.
    x = qk * tl.cast(scale, tl.float32)
    if KEY_TERM_FIRST:
        x = _with_key_term(x, key, fill, KEY_TERM)
    if HAS_BIAS:
        x = x + bias.to(tl.float32)
    if not KEY_TERM_FIRST:
        x = _with_key_term(x, key, fill, KEY_TERM)
    if not EVEN_J:
        x = tl.where(in_range, x, float("-inf"))
    return x


@triton.jit
def probabilities(x, row_max, log2_sum):
    """exp(x - row_max) / row_sum, from the log2 of the sum.

    The difference is taken before the factor log2(e): at x = row_max = -1e9 one fused multiply-add of
    x·log2(e) - row_max·log2(e) would be off by the rounding of 1.4e9. A row of -inf gives NaN, as eager's
    0/0 does.
    """
    return tl.exp2((x - row_max) * LOG2E - log2_sum)


@triton.jit
def running_probabilities(x, row_max):
    """exp(x - maximum) over all tiles so far, what sums over the tiles before are multiplied with, and that maximum."""
    new_max = tl.maximum(row_max, tl.max(x, 1))
    # A row of -inf keeps exp(-inf) = 0 until the last division makes it 0/0.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    # The difference first, then log2(e): see `probabilities`.
    p = tl.exp2((x - shift[:, None]) * LOG2E)
    rescale = tl.exp2((row_max - shift) * LOG2E)
    return p, rescale, new_max
