"""When the Hopper forward may run instead of the portable one, and in which shape. The only place that decides."""

import functools
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)
T = TypeVar("T")

_HEADS = (16, 32, 64)  # columns D; at 128 the accumulators do not fit beside a tile of logits
_SHORTEST = 256  # keys: at 256 a thirtieth to an eighth less than the portable kernel, a quarter with four in a batch
_FEWEST_ITEMS = 512  # blocks of queries, about four for each multiprocessor: a guess
LEFT_OUT = -1e4  # added to its logits, this or less leaves a key no probability
SHARED_MEMORY = 227 * 1024  # bytes that a program may have


@dataclass(frozen=True)
class Shape:
    """Parameters of `_triangle_attention_fwd_hopper` and its launch, named as they are there.

    Through L2 go, for each logit, 2/ROWS bytes of bias and 4·D/(BLOCKS·16·NUM_WARPS) of k and v.
    """

    ROWS: int = 2
    BLOCKS: int = 2
    NUM_WARPS: int = 4
    BLOCK_J: int = 64
    TILES: int = 2
    STAGES: int = 3
    SUM_BY_PRODUCT: bool = True
    REGISTERS: int = 112  # of the partitions but the first, which has what they leave

    def shared_memory(self, D: int) -> int:
        """Bytes for q, k, v, words of the bias, key terms and ones; barriers, and what partitions get, come on top."""
        BLOCK_I, STAGE_J = 16 * self.NUM_WARPS, self.TILES * self.BLOCK_J
        stage = 2 * self.ROWS * STAGE_J * (D + 1) + self.BLOCKS * BLOCK_I * STAGE_J
        return 2 * (self.ROWS * self.BLOCKS * BLOCK_I * D + self.STAGES * stage + 8 * self.BLOCK_J)


def shape_for(D: int) -> Shape:
    """Four warpgroups, of two rows by two blocks of queries; narrow tiles where the accumulators are twice as large."""
    return Shape() if D <= 32 else Shape(BLOCK_J=32, STAGES=4)


_broken: str | None = None


def gluon_refusal() -> str | None:
    """Gluon is experimental: with a version of Triton that lacks what the kernel needs, the portable kernel serves."""
    return _broken or _missing()


@functools.cache
def _missing() -> str | None:
    try:
        importlib.import_module("trifast_inductor.kernels.triangle_attention.hopper.forward")
    except (ImportError, AttributeError) as error:
        return f"this version of Triton has no Gluon that fits: {error}"
    return None


def attempt(run: Callable[..., T], *given: Any) -> T | None:
    """What a launch of Hopper gives, or None where the portable kernel has to serve.

    Gluon is experimental: a version of Triton that compiles it no more must not stop a model. After a failure, which is
    said once, nothing is tried again in this process.
    """
    global _broken
    if gluon_refusal() is not None:
        return None
    try:
        return run(*given)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _broken = f"Triton could not run the kernel for Hopper: {error}"
        log.warning("%s; the portable kernel runs instead, which is slower", _broken)
        return None


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def is_hopper(device: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def copied_by_engine(t: Tensor) -> bool:
    """Whether the copy engine can walk it: 16-byte steps forward along every axis but the last, which is dense."""
    unit = 16 // t.itemsize
    steps = (step for step, size in zip(t.stride()[:-1], t.shape[:-1], strict=True) if size > 1)
    return t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(step > 0 and step % unit == 0 for step in steps)


def gradient_refusal(grad_out: Tensor, q: Tensor) -> str | None:
    """Why no kernel for the backward can read this gradient of the output, or None."""
    if grad_out.dtype != q.dtype:
        return f"the gradient of the output is {grad_out.dtype}, not {q.dtype}"
    if not copied_by_engine(grad_out):
        return "the gradient of the output has rows that are not dense or not on 16 bytes"
    return None


def operand_refusal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> str | None:
    """Why no kernel in Gluon can read these, or None; of a bias no more than its dtype."""
    if q.device.type != "cuda" or not is_hopper(q.device.index):
        return "the device is no Hopper"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Gluon has no interpreter"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"{q.dtype} is not a 16-bit float"
    if q.shape[-1] not in _HEADS:
        return f"D={q.shape[-1]} is not in {_HEADS}"
    if bias is None:
        return "there is no bias"
    if bias.dtype != q.dtype:
        return f"a bias of {bias.dtype} would be rounded to {q.dtype}"
    if not all(map(copied_by_engine, (q, k, v))):
        return "q, k or v has rows that are not dense or not on 16 bytes"
    return None


def refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    fill: float,
    key_term_first: bool,
    shortest: int = _SHORTEST,
) -> str | None:
    """Why only the portable kernel serves this call, or None where the Hopper one can; `shortest` of its keys."""
    if (why := operand_refusal(q, k, v, bias)) is not None:
        return why
    B, R, I, H, _ = q.shape
    if k.shape[2] < shortest:
        return f"{k.shape[2]} keys are fewer than {shortest}"
    items = B * R * H * -(-I // 128)
    if items < _FEWEST_ITEMS:
        return f"{items} blocks of queries are fewer than {_FEWEST_ITEMS}"
    if not scale > 1e-6:
        return "the bias is divided by the scale, which is not positive"
    if key_mask is not None and fill > (-1e30 if key_term_first else LEFT_OUT):
        return f"a fill of {fill} may leave a masked key some probability"
    return gluon_refusal()
