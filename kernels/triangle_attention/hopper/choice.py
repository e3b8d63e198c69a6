"""When the Hopper forward may run instead of the portable one, and in which shape. The only place that decides."""

import functools
import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_J = 128  # keys of one copy into shared memory
_HEADS = (16, 32, 64)  # columns D; at 128 the accumulators do not fit beside a tile of logits
_SHORTEST = 192  # keys: below it a call takes as long as its launches, of which there are three here
_SHARED_MEMORY = 216 * 1024  # bytes for k and v; 227 KiB a program may have, the rest is for barriers and ones


@dataclass(frozen=True)
class Shape:
    """Parameters of `_triangle_attention_fwd_hopper` and its launch, named as they are there."""

    BLOCK_J: int
    CHUNKS: int
    STAGES: int
    NUM_WARPS: int
    maxnreg: int = 128  # 16 warps of a multiprocessor


def shape_for(D: int, J: int) -> Shape:
    """Whole rows of k and v where they fit: twice in a multiprocessor, or else once with twice the warps."""
    row_chunks = -(-J // CHUNK_J)
    chunk_bytes = 2 * CHUNK_J * D * 2
    # At D=64 a tile of 64 keys lacks registers as soon as there is a key term, and ptxas waits after each product.
    BLOCK_J = 64 if D <= 32 else 32
    # Few sizes, so that few kernels are compiled.
    for chunks in (1, 2, 3, 4, 6, 8, 12, 16, 24):
        if chunks < row_chunks:
            continue
        if chunks * chunk_bytes <= _SHARED_MEMORY // 2 and D <= 32:
            return Shape(BLOCK_J, chunks, STAGES=1, NUM_WARPS=8)
        if chunks * chunk_bytes <= _SHARED_MEMORY:
            return Shape(BLOCK_J, chunks, STAGES=1, NUM_WARPS=16)
    return Shape(BLOCK_J, CHUNKS=_SHARED_MEMORY // chunk_bytes // 2, STAGES=2, NUM_WARPS=16)


@functools.cache
def gluon_refusal() -> str | None:
    """Gluon is experimental: a version of Triton without what the kernel needs serves the portable kernel."""
    try:
        importlib.import_module("trifast_inductor.kernels.triangle_attention.hopper.forward")
    except (ImportError, AttributeError) as error:
        return f"this version of Triton has no Gluon that fits: {error}"
    return None


@functools.cache
def _is_hopper(device: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def _copied_by_engine(t: Tensor) -> bool:
    """Whether the copy engine can walk it: 16-byte steps forward along every axis but the last, which is dense."""
    unit = 16 // t.itemsize
    steps = (step for step, size in zip(t.stride()[:-1], t.shape[:-1], strict=True) if size > 1)
    return t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(step > 0 and step % unit == 0 for step in steps)


def refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    fill: float,
    key_term_first: bool,
) -> str | None:
    """Why only the portable kernel serves this call, or None where the Hopper one can."""
    if q.device.type != "cuda" or not _is_hopper(q.device.index):
        return "the device is no Hopper"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"{q.dtype} is not a 16-bit float"
    if q.shape[-1] not in _HEADS:
        return f"D={q.shape[-1]} is not in {_HEADS}"
    if k.shape[2] < _SHORTEST:
        return f"{k.shape[2]} keys are fewer than {_SHORTEST}"
    if bias is None:
        return "there is no bias"
    if bias.dtype != q.dtype:
        return f"a bias of {bias.dtype} would be rounded to {q.dtype}"
    if not scale > 1e-6:
        return "the bias is divided by the scale, which is not positive"
    if key_mask is not None and key_term_first and fill > -1e30:
        return "the bias is added to a fill that does not swallow it"
    if q.stride(-1) != 1 or not (_copied_by_engine(k) and _copied_by_engine(v)):
        return "q, k or v has rows that are not dense or not on 16 bytes"
    return gluon_refusal()
