"""What all kernels are given alike: strides, sizes, flags, precision."""

from typing import Any

import torch
import triton
from torch import Tensor


def strides(name: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    """`stride_qb`, `stride_qr`, ... of a tensor with one letter for each axis; zeros for None."""
    values = tensor.stride() if tensor is not None else (0,) * len(axes)
    return {f"stride_{name}{axis}": value for axis, value in zip(axes, values, strict=True)}


def padded_head(D: int) -> int:
    """Columns of a tile: a power of two, and 16 at least, which is the shortest that `tl.dot` sums over."""
    return max(16, triton.next_power_of_2(D))


def dot_precision(dtype: torch.dtype) -> str:
    """How products of this dtype round: float32 as torch's own do under the present settings.

    `fp32_precision` reads right whichever of torch's APIs set it; `get_float32_matmul_precision` and
    `allow_tf32` raise once the old and the new API have been mixed.
    """
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        # The interpreter multiplies the bits of bfloat16 as integers; remove once all supported versions have
        # https://github.com/triton-lang/triton/issues/11584 mended.
        return "upcast"
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def rows_are_aligned(tensor: Tensor) -> bool:
    """Whether every row along the last axis lies dense and starts on 16 bytes."""
    unit = 16 // tensor.itemsize
    outer = tensor.stride()[:-1]
    return tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0 and all(step % unit == 0 for step in outer)


def with_aligned_rows(bias: Tensor) -> Tensor:
    """The bias, in rows that start and end on 16 elements and lie dense: copied unless it is so.

    A bias is often a view of `[B, I, J, H]`, and J any number; each of its elements is then loaded through a
    pointer of its own, once for each row r. A copy has the size of the bias, and is read R times.
    """
    *outer, J = bias.shape
    # 16 elements, not bytes: that is what Triton looks for in a stride.
    if J % 16 == 0 and rows_are_aligned(bias) and all(stride % 16 == 0 for stride in bias.stride()[:-1]):
        return bias
    rows = torch.empty((*outer, J + -J % 16), dtype=bias.dtype, device=bias.device)
    rows[..., :J] = bias
    rows[..., J:] = 0
    return rows


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
    """Keyword arguments that every kernel takes."""
    _, R, I, H, D = q.shape
    bias = None if bias is None else with_aligned_rows(bias)
    # Triton loads a bool as the byte it is; naming it so keeps one spelling for the load.
    key = key_bias if key_mask is None else key_mask.view(torch.uint8)
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "bias_ptr": bias,
        "key_ptr": key,
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
        "KEY_TERM": "none" if key is None else ("add" if key_mask is None else "select"),
        "KEY_TERM_FIRST": key_term_first,
        "PRECISION": dot_precision(q.dtype),
        "ALIGNED": all(map(rows_are_aligned, (q, k, v))),
    }
