"""Launches through the CUDA driver, past Triton's launcher, which takes some fifty arguments apart at each launch.

Of all that a kernel is given only addresses change from one launch to the next, and the stream. The rest is laid out
once, as `cuLaunchKernelEx` takes it (CUDA Driver API, "Execution Control" and "Tensor Map Object Management"), by what
Triton says that it compiled for; where the machine code takes parameters of other sizes, Triton's launcher serves.
"""

import ctypes
import functools
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

_FORMATS = {"i32": "i", "u32": "I", "i64": "q", "u64": "Q", "fp32": "f"}
_POINTER = "Q"
_MAP = "128s"  # CUtensorMap, by value
_SCRATCH = 2  # addresses that end the parameters of every kernel: null where none is asked for
_L2_PROMOTION_128B = 2  # of CUtensorMapL2promotion
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # of CUlaunchAttributeID


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, with a value that is an int."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("_", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attributes_count", ctypes.c_uint),
    )


@functools.cache
def _driver() -> Any:
    """libcuda, or None where there is none or it lacks what is called here."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        _ = library.cuLaunchKernelEx, library.cuTensorMapEncodeTiled, library.cuTensorMapReplaceAddress
    except (OSError, AttributeError):
        return None
    return library


@dataclass
class Layout:
    """Parameters in the order that the kernel has them: the format of each, by `struct`, and whence its value comes."""

    formats: list[str] = field(default_factory=list)
    places: list[tuple[str, int]] = field(default_factory=list)  # ("address", n), ("map", n) or ("number", n)
    addresses: list[int] = field(default_factory=list)  # which of the tensors are handed over as such
    maps: list[int] = field(default_factory=list)  # and which are walked by the copy engine
    numbers: list[tuple[str, float]] = field(default_factory=list)

    def number(self, form: str, value: float) -> None:
        self.places.append(("number", len(self.numbers)))
        self.formats.append(form)
        self.numbers.append((form, value))


def layout(kinds: Mapping[str, str], values: Mapping[str, Any], walks: Sequence[Any]) -> Layout | None:
    """Of a kernel with parameters of these kinds; None if one is of a kind that is not known here."""
    found = Layout()
    tensors = 0
    for name, kind in kinds.items():
        if kind.startswith("*"):
            found.places.append(("address", len(found.addresses)))
            found.formats.append(_POINTER)
            found.addresses.append(tensors)
            tensors += 1
        elif kind.startswith("tensordesc"):
            found.places.append(("map", len(found.maps)))
            found.formats.append(_MAP)
            shape, strides = walks[len(found.maps)]
            found.maps.append(tensors)
            tensors += 1
            for size in shape:
                found.number("i", size)
            for step in strides:
                found.number("q", step)
        elif kind in _FORMATS:
            found.number(_FORMATS[kind], values[name])
        elif kind != "constexpr":
            return None
    for _ in range(_SCRATCH):
        found.number(_POINTER, 0)
    return found


def parameter_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of the kernel that a module has, as PTX declares them."""
    declared = ptx.partition(".entry")[2].partition(")")[0]
    return [
        int(bits) // 8 * int(count or 1)
        for bits, count in re.findall(r"\.param [^,]*?\.[bfsu](\d+)\b[^,\[]*(?:\[(\d+)\])?", declared)
    ]


def _encoded(driver: Any, walk: Any, meta: Mapping[str, Any], address: int) -> bytes | None:
    """The CUtensorMap of a tensor, as Triton would have it made; lengths innermost first, steps in bytes.

    None where Triton describes it in words that are not known here, or the driver does not take it.
    """
    try:
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

        kind, element, swizzle, box = (meta[name] for name in ("elem_type", "elem_size", "swizzle", "block_size"))
        kind = TMA_DTYPE_DEVICE_TO_HOST[kind]
    except (ImportError, KeyError):
        return None
    shape, strides = walk
    rank = len(shape)
    if meta.get("fp4_padded") or meta.get("is_im2col") or len(box) != rank:
        return None
    steps = [element * step for step in reversed(strides[:-1])]
    store = ctypes.create_string_buffer(128 + 64)
    start = ctypes.addressof(store) + -ctypes.addressof(store) % 64
    failed = driver.cuTensorMapEncodeTiled(
        ctypes.c_void_p(start),
        ctypes.c_int(kind),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*reversed(shape)),
        (ctypes.c_uint64 * rank)(*steps),
        (ctypes.c_uint32 * rank)(*reversed(box)),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        ctypes.c_int(0),  # not interleaved
        ctypes.c_int(swizzle),
        ctypes.c_int(_L2_PROMOTION_128B),
        ctypes.c_int(0),  # zeros past the end
    )
    return None if failed else ctypes.string_at(start, 128)


class _Prepared:
    """What the driver reads of one launch: each thread has its own, since the driver is called without the lock."""

    def __init__(self, config: dict[str, Any], dependent: bool, laid_out: Layout, maps: Sequence[bytes]) -> None:
        numbers = b"".join(struct.pack(f"<{form}", value).ljust(8, b"\0") for form, value in laid_out.numbers)
        words = bytes(8 * len(laid_out.addresses)) + numbers
        self.slots = (ctypes.c_uint64 * (len(words) // 8)).from_buffer_copy(words)
        self._store = ctypes.create_string_buffer(128 * len(maps) + 64)
        start = ctypes.addressof(self.slots)
        aligned = ctypes.addressof(self._store) + -ctypes.addressof(self._store) % 64
        self.maps = [ctypes.c_void_p(aligned + 128 * n) for n in range(len(maps))]
        ctypes.memmove(aligned, b"".join(maps), 128 * len(maps))
        starts = {"address": start, "number": start + 8 * len(laid_out.addresses), "map": aligned}
        at = [starts[what] + (128 if what == "map" else 8) * n for what, n in laid_out.places]
        self.parameters = (ctypes.c_void_p * len(at))(*at)
        self.attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self.config = _Config(**config, attributes=ctypes.pointer(self.attribute), attributes_count=int(dependent))
        self.reference = ctypes.byref(self.config)


def launcher(
    compiled: Any,
    grid: tuple[int, int, int],
    kinds: Mapping[str, str],
    values: Mapping[str, Any],
    walks: Sequence[Any],
    addresses: Sequence[int],
) -> Callable[[list[int], int], None] | None:
    """Launches a `CompiledKernel`, given the addresses of its tensors and a stream; None where Triton has to.

    Args:
        kinds: of all parameters in order, as Triton names them, tensors first.
        values: of those that are no tensors.
        walks: lengths and strides of each tensor that the copy engine walks.
        addresses: of such tensors as the kernel was compiled for.
    """
    driver, metadata = _driver(), compiled.metadata
    laid_out = layout(kinds, values, walks)
    scratch = metadata.global_scratch_size + metadata.profile_scratch_size
    if driver is None or laid_out is None or scratch or metadata.num_ctas != 1 or metadata.launch_cooperative_grid:
        return None
    if parameter_sizes(compiled.asm["ptx"]) != [struct.calcsize(form) for form in laid_out.formats]:
        return None
    maps = []
    for n, tensor in enumerate(laid_out.maps):
        encoded = _encoded(driver, walks[n], metadata.tensordesc_meta[n], addresses[tensor])
        if encoded is None:
            return None
        maps.append(encoded)
    config = {"grid": grid, "block": (32 * metadata.num_warps, 1, 1), "shared_bytes": metadata.shared}
    make = functools.partial(_Prepared, config, metadata.launch_pdl, laid_out, maps)
    launch, function, replace_address = (
        driver.cuLaunchKernelEx,
        ctypes.c_void_p(compiled.function),
        driver.cuTensorMapReplaceAddress,
    )
    count, of_slots, of_maps = len(laid_out.addresses), laid_out.addresses, laid_out.maps
    prepared: dict[int, _Prepared] = {}

    def run(addresses: list[int], stream: int) -> None:
        thread = get_ident()
        mine = prepared.get(thread)
        if mine is None:
            mine = prepared[thread] = make()
        failed = 0
        if of_maps:
            for tensor_map, n in zip(mine.maps, of_maps, strict=True):
                failed = failed or replace_address(tensor_map, ctypes.c_void_p(addresses[n]))
        mine.slots[:count] = [addresses[n] for n in of_slots]
        mine.config.stream = stream
        failed = failed or launch(mine.reference, function, mine.parameters, None)
        if failed:
            raise RuntimeError(f"CUDA could not launch {metadata.name}: {_error(driver, failed)}")

    return run


def _error(driver: Any, code: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
    return (text.value or b"no description").decode() + f" (CUresult {code})"
