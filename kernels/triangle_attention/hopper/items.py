"""Which rows and queries an item of the Hopper forward is, how its results leave, and what it takes to be sound."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def place(item, groups, H, row_groups):
    """Blocks of queries innermost, then heads, then rows: programs that run together share k, v and bias in L2."""
    b = item // (groups * H * row_groups)
    return b, item // (groups * H) % row_groups, item // groups % H, item % groups


@gluon.jit
def next_place(b, rows, h, group, b_step, rows_step, h_step, group_step, groups, H, row_groups):
    """A step further, by carries: divisions take longer than the rest of what is done once an item."""
    group += group_step
    over = (group >= groups).to(gl.int32)
    group -= over * groups
    h += h_step + over
    over = (h >= H).to(gl.int32)
    h -= over * H
    rows += rows_step + over
    over = (rows >= row_groups).to(gl.int32)
    return b + b_step + over, rows - over * row_groups, h, group


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
