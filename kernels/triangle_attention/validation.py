"""What the op and the direct call take: one error that names argument, expected, got and the way out."""

import functools
import importlib
import logging
import math

import torch
from torch import Tensor

from trifast_inductor.errors import DeviceError, DtypeError, ScaleError, ShapeError

log = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICE_TYPES = ("cpu", "cuda")
MAX_HEAD_SIZE = 128


def needs_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """CPU tensors and float64 are computed in torch."""
    return device.type != "cpu" and dtype != torch.float64


@functools.cache
def triton_works() -> bool:
    """Whether Triton can be imported; one warning says why it cannot, if so."""
    try:
        importlib.import_module("triton.language")
    except Exception as error:  # a broken installation raises anything: OSError, AttributeError
        log.warning("triangle attention is left to inductor: Triton cannot be imported (%s); install triton", error)
        return False
    return True


def _raise_all(error: type[Exception], problems: list[str]) -> None:
    if problems:
        raise error("; ".join(problems))


def _check_dtypes(tensors: dict[str, Tensor | None]) -> None:
    """`q`, `k`, `v` alike and supported; `bias` and `key_bias` floating; masks bool."""
    problems = []
    for name, t in tensors.items():
        if t is None:
            continue
        if name.endswith("mask"):
            if t.dtype != torch.bool:
                problems.append(
                    f"{name} must be bool (True where a key is left out), got {t.dtype}: "
                    f"use `{name} == 0` for a mask that is 1 where a key is kept; an additive term belongs in the bias"
                )
        elif not t.dtype.is_floating_point:
            hint = ": a bool mask is passed as mask=" if t.dtype == torch.bool else ""
            problems.append(f"{name} must be floating point, got {t.dtype}{hint}")
        elif name in ("q", "k", "v") and t.dtype not in DTYPES:
            problems.append(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {t.dtype}: cast it with .to()")
    q = tensors["q"]
    problems += [
        f"{name} must have the dtype of q, {q.dtype}, got {t.dtype}: cast it with {name}.to(q.dtype)"
        for name, t in tensors.items()
        if name in ("k", "v") and t is not None and q is not None and t.dtype != q.dtype
    ]
    _raise_all(DtypeError, problems)


def _check_devices(tensors: dict[str, Tensor | None]) -> None:
    q = tensors["q"]
    assert q is not None
    problems = [
        f"{name} must be on the device of q, {q.device}, got {t.device}: move it with {name}.to(q.device)"
        for name, t in tensors.items()
        if t is not None and t.device != q.device
    ]
    if q.device.type not in (*DEVICE_TYPES, "meta"):
        problems.append(f"q must be on {' or '.join(DEVICE_TYPES)}, got {q.device}: no kernel exists for it")
    _raise_all(DeviceError, problems)


def _check_shapes(tensors: dict[str, Tensor | None], axes: dict[str, str], way_out: str) -> None:
    """Every tensor has the axes named for it; an axis has one size everywhere. Axes are one letter each."""
    sizes: dict[str, int] = {}
    problems = []
    for name, t in tensors.items():
        if t is None:
            continue
        letters = axes[name]
        wanted = f"[{', '.join(letters)}]"
        if t.dim() != len(letters):
            problems.append(f"{name} must be {wanted}, got {list(t.shape)} of rank {t.dim()}: {way_out}")
            continue
        for letter, size in zip(letters, t.shape, strict=True):
            sizes.setdefault(letter, size)
        expected = [sizes[letter] for letter in letters]
        if any(size != want for size, want in zip(t.shape, expected, strict=True)):
            problems.append(
                f"{name} must be {wanted} = {expected}, got {list(t.shape)}: broadcast it with {name}.expand(), "
                "or check which axis is which"
            )
    _raise_all(ShapeError, problems)


def check_op(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_bias: Tensor | None, key_mask: Tensor | None
) -> None:
    """Check the arguments of `torch.ops.trifast_inductor.triangle_attention` as its table gives them."""
    tensors = {"q": q, "k": k, "v": v, "bias": bias, "key_bias": key_bias, "key_mask": key_mask}
    axes = {"q": "BRIHD", "k": "BRJHD", "v": "BRJHD", "bias": "BHIJ", "key_bias": "BRJ", "key_mask": "BRJ"}
    _check_shapes(
        tensors,
        axes,
        "the op takes heads after residues; trifast_inductor.triangle_attention takes them first",
    )
    _check_dtypes(tensors)
    _check_devices(tensors)
    if key_bias is not None and key_mask is not None:
        raise ShapeError(
            "key_mask must be None when key_bias is given, got both: fold the mask into key_bias, "
            "key_bias.masked_fill(key_mask, fill)"
        )
    _check_head_size(q)


def check_call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float | None) -> None:
    """Check the arguments of `trifast_inductor.triangle_attention`."""
    named = {"q": q, "k": k, "v": v, "bias": bias, "mask": mask}
    for name, t in named.items():
        if not isinstance(t, Tensor) and not (t is None and name in ("bias", "mask")):
            raise DtypeError(f"{name} must be a tensor, got {type(t).__name__}: convert it with torch.as_tensor()")
    axes = {"q": "BHRID", "k": "BHRJD", "v": "BHRJD", "bias": "BHIJ", "mask": "BRJ"}
    _check_shapes(named, axes, "add the missing axes with unsqueeze()")
    _check_dtypes(named)
    _check_devices(named)
    _check_head_size(q)
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ScaleError(
            f"scale must be a Python number or None, got {type(scale).__name__}: multiply q by a scale that is a tensor"
        )
    if not (math.isfinite(scale) and scale >= 0):
        raise ScaleError(f"scale must be finite and not negative, got {scale}: leave it out for D ** -0.5")


def _check_head_size(q: Tensor) -> None:
    d = q.shape[-1]
    if d < 1 or (needs_triton(q.device, q.dtype) and d > MAX_HEAD_SIZE):
        raise ShapeError(
            f"the head size D must lie in 1..{MAX_HEAD_SIZE}, got {d}: split the head, or use eager attention"
        )
