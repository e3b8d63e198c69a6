"""Which tile a launch takes when this machine has been tuned: a dictionary that is read from disk once.

`tuned` is on the hot path: one dictionary look-up, and None unless somebody has run `trifast-tune` here. Nothing is
searched, unless `TRIFAST_FORCE_TUNE=1`: then the first call of each shape searches, and stores what it finds.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from trifast_inductor.kernels.triangle_attention import tile_store
from trifast_inductor.kernels.triangle_attention.tile_store import Machine

log = logging.getLogger(__name__)

FORCED = os.environ.get("TRIFAST_FORCE_TUNE", "0").lower() in ("1", "true", "yes", "on")
KERNELS = ("forward", "dq", "dkdv", "dbias")
FIELDS = ("BLOCK_I", "BLOCK_J", "num_warps", "num_stages")

Sizes = dict[str, int]  # of a tile, by `FIELDS`


class Key(NamedTuple):
    """Launches that share a tile. `length` is the longer of I and J, rounded up to a power of two."""

    kernel: str
    dtype: torch.dtype
    precision: str
    D: int
    H: int
    length: int
    mask: bool  # any key term
    bias: bool

    def __str__(self) -> str:
        mask, bias = "mask" if self.mask else "no-mask", "bias" if self.bias else "no-bias"
        sizes = f"D={self.D} H={self.H} N<={self.length}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kernel} {dtype} {self.precision} {sizes} {mask} {bias}"

    @classmethod
    def parse(cls, text: str) -> Key:
        """What `str` gave; ValueError on anything else."""
        kernel, dtype, precision, *sizes, mask, bias = text.split()
        D, H, length = (int(size.partition("=")[2]) for size in sizes)
        key = cls(kernel, getattr(torch, dtype, torch.bool), precision, D, H, length, mask == "mask", bias == "bias")
        if str(key) != text or kernel not in KERNELS:
            raise ValueError(f"not a key of tuned tiles: {text!r}")
        return key


# By device index, as `Tensor.get_device` gives it; -1, the CPU under the interpreter, is never tuned. None as a
# tile: searched in vain, or being searched right now.
_tiles: dict[int, dict[Key, Sizes | None]] = {-1: {}}
_searching = False
_listeners: list[Callable[[], None]] = []


def make_key(kernel: str, dtype: torch.dtype, precision: str, D: int, H: int, N: int, mask: bool, bias: bool) -> Key:
    """The key of a launch whose longer axis has N entries."""
    return Key(kernel, dtype, precision, D, H, 1 << (N - 1).bit_length(), mask, bias)


def tuned(
    device: int, kernel: str, dtype: torch.dtype, precision: str, D: int, H: int, N: int, mask: bool, bias: bool
) -> Sizes | None:
    """The tile stored for such launches on this device, or None."""
    tiles = _tiles.get(device)
    if tiles is None:
        # Forced tuning starts from nothing: what is stored is measured again.
        tiles = _tiles[device] = {} if FORCED else load(machine_of(device))
    if not tiles and not FORCED:
        return None
    key = make_key(kernel, dtype, precision, D, H, N, mask, bias)
    if FORCED and device >= 0 and key not in tiles and not _searching and not _capturing():
        search_now(device, key)
    return tiles.get(key)


def machine_of(device: int) -> Machine:
    import triton

    return Machine(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), triton.__version__)


def load(machine: Machine) -> dict[Key, Sizes | None]:
    """Tiles on disk that this version understands."""
    tiles: dict[Key, Sizes | None] = {}
    foreign = 0
    for text, entry in tile_store.load(machine).items():
        sizes = entry["tile"]
        try:
            key = Key.parse(text)
        except ValueError:
            foreign += 1
            continue
        if not _is_tile(sizes):
            foreign += 1
            continue
        tiles[key] = sizes
    if foreign:
        log.warning("%d tuned tiles are not understood and not used; run trifast-tune to tune again", foreign)
    return tiles


def when_changed(listener: Callable[[], None]) -> None:
    """Call it whenever a launch may take another tile than before: whoever keeps tiles has to drop them."""
    _listeners.append(listener)


def changed() -> None:
    for listener in _listeners:
        listener()


def use(device: int, key: Key, sizes: Sizes | None) -> None:
    """From now on this process launches with that tile; None: with the shipped heuristic's."""
    _tiles.setdefault(device, {})[key] = sizes
    changed()


def forget() -> None:
    """Read the disk again at the next launch."""
    for device in [device for device in _tiles if device >= 0]:
        del _tiles[device]
    changed()


def search_now(device: int, key: Key) -> None:
    """Search the tile of one shape in the midst of a run, use it and store it; a failure costs a warning only."""
    global _searching
    from trifast_inductor.kernels.triangle_attention import tile_search

    _searching = True
    try:
        outcome = tile_search.search(device, key)
        tile_store.save(machine_of(device), {str(key): outcome.entry})
        log.info("tuned %s", outcome)
    except Exception:
        log.warning("no tile could be tuned for %s; the shipped one is used", key, exc_info=True)
        use(device, key, None)
    finally:
        _searching = False


def _is_tile(sizes: Sizes) -> bool:
    powers = [size for name, size in sizes.items() if name != "num_stages"]
    return sizes.keys() == set(FIELDS) and min(sizes.values()) > 0 and not any(n & (n - 1) for n in powers)


def _capturing() -> bool:
    """A CUDA graph records every launch: no time to try tiles."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
