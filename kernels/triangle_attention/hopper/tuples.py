"""Several tensors by a number known to the compiler."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def appended(values, value):
    return values + (value,)  # noqa: RUF005 -- Triton unpacks no tuples


@gluon.jit
def replaced(values, n: gl.constexpr, value):
    return values[:n] + (value,) + values[n + 1 :]  # noqa: RUF005


@gluon.jit
def places(smem, first, count: gl.constexpr):
    """So many pieces of an allocation, side by side."""
    several = ()
    for n in gl.static_range(count):
        several = appended(several, smem.index(first + n))
    return several


@gluon.jit
def zeros(count: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    several = ()
    for _ in gl.static_range(count):
        several = appended(several, gl.zeros(shape, gl.float32, layout))
    return several
