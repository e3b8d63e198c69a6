"""Which rows and queries an item of the Hopper forward is, how its results leave, and what it takes to be sound."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from trifast_inductor.kernels.triangle_attention.hopper.handing import hand, handed


@gluon.jit
def place(item, groups, H, row_groups):
    """Blocks of queries innermost, then heads, then rows: programs that run together share k, v and bias in L2."""
    b = item // (groups * H * row_groups)
    return b, item // (groups * H) % row_groups, item // groups % H, item % groups


@gluon.jit
def after(item, left_out_ptr, items, groups, H, row_groups, R, ROWS: gl.constexpr, HAS_KEY_TERM: gl.constexpr):
    """The next item of the program in one of whose rows a key is left, and its place."""
    item += gl.num_programs(0)
    b, rows, h, group = place(item, groups, H, row_groups)
    if HAS_KEY_TERM:
        while _is_left_out(left_out_ptr, item < items, b, rows, R, ROWS):
            item += gl.num_programs(0)
            b, rows, h, group = place(item, groups, H, row_groups)
    return item, b, rows, h, group


@gluon.jit
def _is_left_out(left_out_ptr, exists, b, rows, R, ROWS: gl.constexpr):
    left_out = exists
    for m in gl.static_range(ROWS):
        r = gl.minimum(rows * ROWS + m, R - 1)
        left_out = left_out & (gl.load(left_out_ptr + b * R + r, mask=exists, other=0) != 0)
    return left_out


@gluon.jit
def tell(at_smem, b, rows, h, group):
    """Leaves the place of an item for the partitions; b is -1 after the last one."""
    hand(at_smem.index(0), b)
    hand(at_smem.index(1), rows)
    hand(at_smem.index(2), h)
    hand(at_smem.index(3), group)


@gluon.jit
def told(at_smem, NUM_WARPS: gl.constexpr):
    """What `tell` has left, in a partition of so many warps."""
    b = handed(at_smem.index(0), NUM_WARPS)
    rows = handed(at_smem.index(1), NUM_WARPS)
    h = handed(at_smem.index(2), NUM_WARPS)
    return b, rows, h, handed(at_smem.index(3), NUM_WARPS)


@gluon.jit
def store(out_ptr, row_max_ptr, row_sum_ptr, acc, total, top, b, r, h, block, R, H, I):
    """A block of queries; its row sums are NaN where the shift was no good."""
    OUT: gl.constexpr = acc.type.layout
    BLOCK_I: gl.constexpr = acc.shape[0]
    D: gl.constexpr = acc.shape[1]
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    # Below, what p has lost to its smallest values (2^-126, and 2^-24 in float16) may show. Above, sums are near
    # float32's largest; where those of p·v overflow before, the output is not finite.
    LEAST: gl.constexpr = 2.0**-100 if dtype == gl.bfloat16 else 0.125
    MOST: gl.constexpr = 2.0**120
    out = acc * gl.expand_dims(1.0 / total, 1)
    # Far from zero, the backward's x - row_max would be off by the rounding of x·factor and shift here.
    sound = (total > LEAST) & (total < MOST) & (gl.abs(top) < 4096.0) & (gl.abs(gl.sum(out, 1)) < float("inf"))
    i = block * BLOCK_I + gl.arange(0, BLOCK_I, layout=gl.SliceLayout(1, OUT))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))
    row = (b * R + r).to(gl.int64)
    in_range = (i < I) & (r < R)
    out_ptrs = out_ptr + row * I * H * D + h * D + gl.expand_dims(i * (H * D), 1) + gl.expand_dims(columns, 0)
    gl.store(out_ptrs, out.to(dtype), mask=gl.expand_dims(in_range, 1))
    statistics = (row * H + h) * I
    gl.store(row_max_ptr + statistics + i, top, mask=in_range)
    gl.store(row_sum_ptr + statistics + i, gl.where(sound, total, float("nan")), mask=in_range)
