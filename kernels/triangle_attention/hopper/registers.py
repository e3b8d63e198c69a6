"""What the Hopper kernels do with a tile of logits in registers: numbers from words, key terms, exponentials."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def exp2(x):
    """One instruction each: gl.exp2 also takes care of results that are denormal."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def unpack(words, dtype: gl.constexpr, BLOCK_J: gl.constexpr, NUM_WARPS: gl.constexpr, layout: gl.constexpr):
    """`[BLOCK_I, BLOCK_J]` in float32 of the words that `bias._bias_tiles` stored; nothing moves between threads."""
    if dtype == gl.bfloat16:
        high = words.to(gl.float32, bitcast=True)  # chosen so that the low half rounds it right
        low = (words << 16).to(gl.float32, bitcast=True)
    else:
        high = (words >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        low = words.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    x = gl.join(high, low).reshape([BLOCK_J // 16, NUM_WARPS, 8, 4, 2, 2, 2]).permute([1, 4, 2, 0, 6, 3, 5])
    return gl.convert_layout(x.reshape([16 * NUM_WARPS, BLOCK_J]), layout, assert_trivial=True)


@gluon.jit
def unpacked_tile(words, dtype: gl.constexpr, X: gl.constexpr):
    """In float32 the tile of 64 columns, 16 rows to a warp, that `lean/words.py` or `packed_tile` packed, in place."""
    ROWS: gl.constexpr = words.shape[0]
    if dtype == gl.bfloat16:
        high = (words & -65536).to(gl.float32, bitcast=True)
        low = (words << 16).to(gl.float32, bitcast=True)
    else:
        high = (words >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        low = words.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    x = gl.join(low, high).reshape([4, ROWS // 16, 8, 4, 2, 2, 2]).permute([1, 5, 2, 0, 4, 3, 6])
    return gl.convert_layout(x.reshape([ROWS, 64]), X, assert_trivial=True)


@gluon.jit
def packed_tile(x):
    """Words `[rows, 32]` of a 16-bit tile `[rows, 64]`, of which a thread finds its own side by side."""
    ROWS: gl.constexpr = x.shape[0]
    x = x.reshape([ROWS // 16, 2, 8, 4, 2, 4, 2]).permute([3, 0, 2, 5, 4, 1, 6])
    return pairs(x.reshape([ROWS, 64]))


@gluon.jit
def with_key_term(x, key, fill, KEY_TERM: gl.constexpr):
    if KEY_TERM == "add":
        x = x + key.to(gl.float32)
    elif KEY_TERM == "select":
        x = gl.where(key != 0, fill, x)
    return x


@gluon.jit
def added_now(a, b):
    """a + b; as a multiply-add at the end of the row it would keep both factors of all tiles until then."""
    return gl.inline_asm_elementwise(
        "add.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def row_max(x):
    """Over pairs, as a tree: `gl.max` takes a thread's elements one after the other, each waiting for the last."""
    ROWS: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    BLOCK_I: gl.constexpr = x.shape[0]
    BLOCK_J: gl.constexpr = x.shape[1]
    a, b = x.reshape([BLOCK_I, 2, BLOCK_J // 2]).permute([0, 2, 1]).split()
    half = gl.maximum(a, b)
    a, b = half.reshape([BLOCK_I, 2, BLOCK_J // 4]).permute([0, 2, 1]).split()
    return gl.convert_layout(gl.max(gl.maximum(a, b), 1), ROWS, assert_trivial=True)


@gluon.jit
def row_sums(p, layout: gl.constexpr):
    """`[BLOCK_I, 8]`: the sums of every eighth column, which a thread has all of."""
    BLOCK_I: gl.constexpr = p.shape[0]
    BLOCK_J: gl.constexpr = p.shape[1]
    part = gl.sum(p.reshape([BLOCK_I, BLOCK_J // 8, 8]), 1)
    return gl.convert_layout(part, layout, assert_trivial=True)


@gluon.jit
def _split_pairs(x):
    return x.reshape([x.shape[0], x.shape[1] // 2, 2]).split()


@gluon.jit
def rounded_pairs(x, dtype: gl.constexpr):
    """As `pairs`, of float32 that is rounded."""
    low, high = _split_pairs(x)
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )  # fmt: skip
    return gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def pairs(x):
    """`[rows, columns/2]` in int32 of a 16-bit operand, whose halves would each take a register through a loop."""
    low, high = _split_pairs(x)
    low = low.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return low | high.to(gl.int16, bitcast=True).to(gl.int32) << 16


@gluon.jit
def operand(words, dtype: gl.constexpr, layout: gl.constexpr):
    """What `pairs` was given."""
    low = words.to(gl.int16).to(dtype, bitcast=True)
    high = (words >> 16).to(gl.int16).to(dtype, bitcast=True)
    x = gl.join(low, high).reshape([words.shape[0], 2 * words.shape[1]])
    return gl.convert_layout(x, layout, assert_trivial=True)
