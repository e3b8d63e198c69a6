"""The forward as a Triton op, for packages made ahead of time.

`torch.ops.trifast_inductor.triangle_attention` is opaque: a package that calls it needs Python and this package where
it is loaded. AOTInductor traces through the op below down to the kernel, and puts the machine code of that kernel
into the package. Nothing is known then of addresses, and of sizes only what the exported program says; so no choice
here may ask for more, or it would become an assumption that nobody checks when the package runs.

Inference on CUDA only: a packaged program has no backward, and float64 has no kernel.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from trifast_inductor.kernels.triangle_attention import arguments, tiling, validation
from trifast_inductor.kernels.triangle_attention.forward import _triangle_attention_fwd

# Stands for a size that is not known: no tile is clipped to it, and none fits it evenly.
_UNKNOWN = (1 << 16) + 1


@triton_op("trifast_inductor::packaged_triangle_attention", mutates_args={})
def packaged_triangle_attention(
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
    """As `triangle_attention` in `op.py`, for at least one key and one query."""
    validation.check_op(q, k, v, bias, key_bias, key_mask)
    if key_mask is not None and math.isinf(fill):
        # An infinite argument has no spelling in generated C++. Added, it leaves out the same keys.
        key_bias, key_mask = torch.where(key_mask, fill, 0.0), None
    B, R, I, H, D = q.shape
    J = k.shape[2]
    out = torch.empty((B, R, I, H, D), dtype=q.dtype, device=q.device)
    row_max = torch.empty((B, R, H, I), dtype=torch.float32, device=q.device)
    row_sum = torch.empty((B, R, H, I), dtype=torch.float32, device=q.device)
    bias = None if bias is None else _with_aligned_rows(bias)
    if key_mask is None:
        fill = 0.0  # not read, and might be infinite
    else:
        key_mask = key_mask.to(torch.uint8)
    given = arguments.shared(q, k, v, bias, key_bias, key_mask, scale, fill, key_term_first)
    tile = tiling.choose("forward", q.dtype, D, _known(I), _known(J), given["PRECISION"])
    values = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "bias_ptr": bias,
        "key_ptr": key_bias if key_mask is None else key_mask,
        "out_ptr": out,
        "row_max_ptr": row_max,
        "row_sum_ptr": row_sum,
        **given,
        "ALIGNED": False,
        **arguments.evenness(_known(I), _known(J), tile),
        "PDL": False,
    }
    programs = B * R * H * ((I + tile.BLOCK_I - 1) // tile.BLOCK_I)
    wrap_triton(_triangle_attention_fwd)[(programs,)](**values, **vars(tile))
    return out, row_max, row_sum


def _with_aligned_rows(bias: Tensor) -> Tensor:
    """The bias in dense rows of a multiple of 16 elements, so that they are read 16 bytes at a time."""
    J = bias.shape[3]
    if isinstance(J, int) and J % 16 == 0:
        return bias.contiguous()
    # Padding and slicing ask whether there is anything to pad; a gather does not. What lies past J is never used.
    columns = torch.arange(16 * (J // 16 + 1), device=bias.device).clamp(max=J - 1)
    return bias.index_select(3, columns)


def _known(size: Any) -> int:
    return size if isinstance(size, int) else _UNKNOWN


triangle_attention = torch.ops.trifast_inductor.packaged_triangle_attention.default
