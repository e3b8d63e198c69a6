"""What all kernels are given alike: strides, sizes, flags, precision."""

from typing import Any

import torch
import triton
from torch import Tensor

from trifast_inductor.kernels.triangle_attention.tiling import Tile


def strides(name: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    """`stride_qb`, `stride_qr`, ... of a tensor with one letter for each axis; zeros for None."""
    values = tensor.stride() if tensor is not None else (0,) * len(axes)
    return {f"stride_{name}{axis}": value for axis, value in zip(axes, values, strict=True)}


def padded_head(D: int) -> int:
    """Columns of a tile: a power of two, and 16 at least, which is the shortest that `tl.dot` sums over."""
    return max(16, triton.next_power_of_2(D))


def float32_precision(dtype: torch.dtype) -> str | None:
    """How torch multiplies float32 under the present settings; None for another dtype.

    `fp32_precision` reads right whichever of torch's APIs set it; `get_float32_matmul_precision` and
    `allow_tf32` raise once the old and the new API have been mixed.
    """
    return torch.backends.cuda.matmul.fp32_precision if dtype == torch.float32 else None


def dot_precision(dtype: torch.dtype, D: int) -> str:
    """How products of this dtype are made: float32 rounds as torch's own do.

    "3xtf32" is float32 in all but the last bit or so, out of three tf32 products on tensor cores: within the error
    budget, and several times as fast as fused multiply-adds ("ieee").
    """
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        # The interpreter multiplies the bits of bfloat16 as integers; remove once all supported versions have
        # https://github.com/triton-lang/triton/issues/11584 mended.
        return "upcast"
    if dtype != torch.float32:
        return "ieee"
    if float32_precision(dtype) == "tf32":
        return "tf32"
    # At D = 128 the halves of both operands spill whatever the tile (sm_90).
    return "3xtf32" if D <= 64 and _has_tf32() else "ieee"


def _has_tf32() -> bool:
    if triton.knobs.runtime.interpret:
        return True
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 80


def rows_are_aligned(*tensors: Tensor) -> bool:
    """Whether every row along the last axis of each lies dense and starts on 16 bytes."""
    return all(
        t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(step % (16 // t.itemsize) == 0 for step in t.stride()[:-1])
        for t in tensors
    )


def dense(t: Tensor) -> Tensor:
    """The same values contiguous and from 16 bytes on, as a kernel's own results lie: a launch looks at neither."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def bias_is_aligned(bias: Tensor) -> bool:
    """Whether the kernels can read the rows of the bias as they lie: dense, starting and ending on 16 elements."""
    # 16 elements, not bytes: that is what Triton looks for in a stride.
    return bias.shape[3] % 16 == 0 and rows_are_aligned(bias) and all(stride % 16 == 0 for stride in bias.stride()[:-1])


def evenness(I: int, J: int, tile: Tile) -> dict[str, bool]:
    """Whether blocks of this tile fit the lengths: then no load needs a mask."""
    return {"EVEN_I": I % tile.BLOCK_I == 0, "EVEN_J": J % tile.BLOCK_J == 0}


def kind(shared: dict[str, Any], dtype: torch.dtype, device: int) -> dict[str, Any]:
    """What `tiling.choose` asks besides the kernel, of a launch that is given `shared`."""
    return {
        "dtype": dtype,
        "D": shared["D"],
        "I": shared["I"],
        "J": shared["J"],
        "precision": shared["PRECISION"],
        "H": shared["H"],
        "mask": shared["KEY_TERM"] != "none",
        "bias": shared["HAS_BIAS"],
        "device": device,
    }


def key_term(key: Tensor | None) -> str:
    """How a kernel takes it, KEY_TERM: a mask selects, a term is added."""
    return "none" if key is None else "add" if key.is_floating_point() else "select"


def bytes_of_mask(key: Tensor | None) -> Tensor | None:
    """A key term as it is, a mask in bytes: as kernels in Gluon are given either."""
    return key if key is None or key.is_floating_point() else key.view(torch.uint8)


def shared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    fill: float,
    key_term_first: bool,
) -> dict[str, Any]:
    """What every kernel takes besides tensors, by name; the bias is the one the kernels read.

    All but what depends on addresses or a tile: a program exported for any size has neither.
    """
    _, R, I, H, D = q.shape
    key = key_bias if key_mask is None else key_mask
    return {
        **strides("q", q, "brihd"),
        **strides("k", k, "brjhd"),
        **strides("v", v, "brjhd"),
        **strides("bias_", bias, "bhij"),
        **strides("key_", key, "brj"),
        "R": R,
        "H": H,
        "I": I,
        "J": k.shape[2],
        "J_bias": 0 if bias is None else bias.shape[3],
        "scale": scale,
        "fill": fill,
        "D": D,
        "BLOCK_D": padded_head(D),
        "HAS_BIAS": bias is not None,
        "KEY_TERM": key_term(key),
        "KEY_TERM_FIRST": key_term_first,
        "PRECISION": dot_precision(q.dtype, D),
    }
