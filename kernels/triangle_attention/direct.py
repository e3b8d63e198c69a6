"""Launches through the CUDA driver, past Triton's launcher, which takes some fifty arguments apart at each launch.

Of all that a kernel is given only addresses change from one launch to the next, and the stream. The rest is laid out
once, as `cuLaunchKernelEx` takes it (CUDA Driver API, "Execution Control" and "Tensor Map Object Management"), by what
Triton says that it compiled for; where the machine code takes parameters of other sizes, Triton's launcher serves.
"""

import ctypes
import functools
import itertools
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any

_FORMATS = {"i32": "i", "u32": "I", "i64": "q", "u64": "Q", "fp32": "f"}
_POINTER = "Q"
_MAP = "128s"  # CUtensorMap, by value
_MAP_SIZE = struct.calcsize(_MAP)
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


@dataclass(frozen=True)
class Parameter:
    """Of a kernel: its format, by `struct`, and the tensor whose address or tensor map it is, or its value."""

    form: str
    tensor: int | None = None
    value: float = 0


def layout(kinds: Mapping[str, str], values: Mapping[str, Any], walks: Sequence[Any]) -> list[Parameter] | None:
    """Of a kernel with parameters of these kinds; None if one is of a kind that is not known here."""
    found: list[Parameter] = []
    tensors = itertools.count()
    walked = iter(walks)
    for name, kind in kinds.items():
        if kind.startswith("*"):
            found.append(Parameter(_POINTER, next(tensors)))
        elif kind.startswith("tensordesc"):
            shape, strides = next(walked)
            found.append(Parameter(_MAP, next(tensors)))
            found += [Parameter("i", value=size) for size in shape]
            found += [Parameter("q", value=step) for step in strides]
        elif kind in _FORMATS:
            found.append(Parameter(_FORMATS[kind], value=values[name]))
        elif kind != "constexpr":
            return None
    return found + [Parameter(_POINTER)] * _SCRATCH


def parameter_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of the kernel that a module has, as PTX declares them."""
    declared = ptx.partition(".entry")[2].partition(")")[0]
    return [
        int(bits) // 8 * int(count or 1)
        for bits, count in re.findall(r"\.param [^,]*?\.[bfsu](\d+)\b[^,\[]*(?:\[(\d+)\])?", declared)
    ]


def _aligned(content: bytes) -> tuple[Any, int]:
    """A copy of it in memory, and its address, where a CUtensorMap may lie."""
    store = ctypes.create_string_buffer(len(content) + 64)
    start = ctypes.addressof(store) + -ctypes.addressof(store) % 64
    ctypes.memmove(start, content, len(content))
    return store, start


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
    _store, start = _aligned(bytes(_MAP_SIZE))
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
    return None if failed else ctypes.string_at(start, _MAP_SIZE)


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel on a device, with all that it is launched with but addresses and a stream."""

    name: str
    function: int
    config: dict[str, Any]
    dependent: bool  # its launch may overlap the end of the kernel before
    parameters: Sequence[Parameter]
    maps: Sequence[bytes]  # of the tensors in `walked`, by any address
    walked: Sequence[int]


def kernel(
    compiled: Any,
    grid: tuple[int, int, int],
    kinds: Mapping[str, str],
    values: Mapping[str, Any],
    walks: Sequence[Any],
    addresses: Sequence[int],
) -> Kernel | None:
    """What the driver is to know of a `CompiledKernel`; None where Triton has to launch it.

    Args:
        kinds: of all parameters in order, as Triton names them, tensors first.
        values: of those that are no tensors.
        walks: lengths and strides of each tensor that the copy engine walks.
        addresses: of such tensors as the kernel was compiled for.
    """
    driver, metadata = _driver(), compiled.metadata
    parameters = layout(kinds, values, walks)
    scratch = metadata.global_scratch_size + metadata.profile_scratch_size
    if driver is None or parameters is None or scratch or metadata.num_ctas != 1 or metadata.launch_cooperative_grid:
        return None
    if parameter_sizes(compiled.asm["ptx"]) != [struct.calcsize(p.form) for p in parameters]:
        return None
    walked = [p.tensor for p in parameters if p.form == _MAP and p.tensor is not None]
    maps = []
    for n, tensor in enumerate(walked):
        encoded = _encoded(driver, walks[n], metadata.tensordesc_meta[n], addresses[tensor])
        if encoded is None:
            return None
        maps.append(encoded)
    config = {"grid": grid, "block": (32 * metadata.num_warps, 1, 1), "shared_bytes": metadata.shared}
    return Kernel(metadata.name, compiled.function, config, metadata.launch_pdl, parameters, maps, walked)


Step = tuple[Kernel, Sequence[int]]  # and where each of its tensors stands among the addresses


class _Prepared:
    """What the driver reads of some launches: each thread has its own, since the driver is called without the lock.

    The first slots are addresses, in the order in which they are given; numbers follow.
    """

    def __init__(self, steps: Sequence[Step], count: int) -> None:
        numbers = [p for kernel, _ in steps for p in kernel.parameters if p.tensor is None]
        words = bytes(8 * count) + b"".join(struct.pack(f"<{p.form}", p.value).ljust(8, b"\0") for p in numbers)
        self.slots = (ctypes.c_uint64 * (len(words) // 8)).from_buffer_copy(words)
        maps = [encoded for kernel, _ in steps for encoded in kernel.maps]
        self._store, start_of_maps = _aligned(b"".join(maps))
        of_maps = range(start_of_maps, start_of_maps + _MAP_SIZE * len(maps), _MAP_SIZE)
        walked = [places[tensor] for kernel, places in steps for tensor in kernel.walked]
        self.maps = [(ctypes.c_void_p(at), place) for at, place in zip(of_maps, walked, strict=True)]
        self.mapped: list[int | None] = [None] * len(maps)  # the address that is in each
        self.attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self.stream: int | None = None
        self.configs = []
        self.launches = []
        start = ctypes.addressof(self.slots)
        next_map, next_number = iter(of_maps), itertools.count(start + 8 * count, 8)
        for kernel, places in steps:
            at = [
                next(next_number)
                if p.tensor is None
                else next(next_map)
                if p.form == _MAP
                else start + 8 * places[p.tensor]
                for p in kernel.parameters
            ]
            attributes = ctypes.pointer(self.attribute)
            config = _Config(**kernel.config, attributes=attributes, attributes_count=int(kernel.dependent))
            self.configs.append(config)
            parameters = (ctypes.c_void_p * len(at))(*at)
            self.launches.append((ctypes.byref(config), ctypes.c_void_p(kernel.function), parameters))


def launcher(steps: Sequence[Step], count: int) -> Callable[[list[int], int], None]:
    """Launches kernels one after the other, given so many addresses and a stream."""
    driver = _driver()
    launch, replace_address = driver.cuLaunchKernelEx, driver.cuTensorMapReplaceAddress
    prepared: dict[int, _Prepared] = {}

    def run(addresses: list[Any], stream: int) -> None:
        thread = get_ident()
        mine = prepared.get(thread)
        if mine is None:
            mine = prepared[thread] = _Prepared(steps, count)
        if stream != mine.stream:
            mine.stream = stream
            for config in mine.configs:
                config.stream = stream
        mine.slots[:count] = addresses
        failed = 0
        for n, (tensor_map, place) in enumerate(mine.maps):
            if addresses[place] != mine.mapped[n]:
                failed = failed or replace_address(tensor_map, ctypes.c_void_p(addresses[place]))
                mine.mapped[n] = addresses[place]
        for reference, function, parameters in mine.launches:
            failed = failed or launch(reference, function, parameters, None)
        if failed:
            mine.mapped = [None] * len(mine.maps)
            names = ", ".join(kernel.name for kernel, _ in steps)
            raise RuntimeError(f"CUDA could not launch {names}: {_error(driver, failed)}")

    return run


def _error(driver: Any, code: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
    return (text.value or b"no description").decode() + f" (CUresult {code})"
