"""When the Hopper forward may run instead of the portable one, and in which shape. The only place that decides."""

import functools
import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

_HEADS = (16, 32, 64)  # columns D; at 128 the accumulators do not fit beside a tile of logits
_SHORTEST = 192  # keys: below it a call takes as long as its launches, of which there are four here
SHARED_MEMORY = 227 * 1024  # bytes that a program may have


@dataclass(frozen=True)
class Shape:
    """Parameters of `_triangle_attention_fwd_hopper` and its launch, named as they are there.

    Through L2 go, for each logit, 2/ROWS bytes of bias and 4·D/(BLOCKS·16·NUM_WARPS) of k and v.
    """

    ROWS: int = 2
    BLOCKS: int = 1
    NUM_WARPS: int = 8
    BLOCK_J: int = 64
    TILES: int = 2
    STAGES: int = 3
    NEXT_FIRST: bool = False  # two programs a multiprocessor have registers for it, two partitions have not
    SUM_BY_PRODUCT: bool = True
    Q_IN_REGISTERS: bool = False
    REGISTERS: int = 112  # of the partitions but the first, which has what they leave
    PROGRAMS: int = 1  # a multiprocessor
    maxnreg: int | None = None  # at the start of a program, which decides how many there is room for

    def shared_memory(self, D: int) -> int:
        """Bytes for q, k, v, words of the bias and ones; barriers, and what partitions are given, come on top."""
        BLOCK_I, STAGE_J = 16 * self.NUM_WARPS, self.TILES * self.BLOCK_J
        stage = 2 * self.ROWS * STAGE_J * D + self.BLOCKS * BLOCK_I * STAGE_J
        return 2 * (2 * self.ROWS * self.BLOCKS * BLOCK_I * D + self.STAGES * stage + 8 * self.BLOCK_J)


def shape_for(D: int) -> Shape:
    """Four warpgroups, of two rows by two blocks of queries; three where the accumulators are twice as large."""
    if D <= 32:
        return Shape()
    return Shape(ROWS=3, NUM_WARPS=4, TILES=1, REGISTERS=128)


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


def copied_by_engine(t: Tensor) -> bool:
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
    if not all(map(copied_by_engine, (q, k, v))):
        return "q, k or v has rows that are not dense or not on 16 bytes"
    return gluon_refusal()
