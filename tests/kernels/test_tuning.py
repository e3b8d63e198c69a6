"""The look-up on the hot path: one dictionary, read once; no search unless it is asked for."""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trifast_inductor.kernels.triangle_attention import tile_search, tile_store, tiling, tuning
from trifast_inductor.kernels.triangle_attention.tile_search import Outcome
from trifast_inductor.kernels.triangle_attention.tile_store import Machine
from trifast_inductor.kernels.triangle_attention.tuning import Key

MACHINE = Machine("Some GPU", (9, 0), "3.9.0")
SIZES = {"BLOCK_I": 128, "BLOCK_J": 16, "num_warps": 8, "num_stages": 1}
KEY = Key("forward", torch.bfloat16, "ieee", 32, 4, 512, True, True)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device 0, with a disk of its own and nothing loaded."""
    monkeypatch.setenv(tile_store.DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setattr(tuning, "machine_of", lambda device: MACHINE)
    monkeypatch.setattr(tuning, "FORCED", False)
    tuning.forget()
    yield
    tuning.forget()


def chosen(N: int = 512, H: int = 4, mask: bool = True, device: int = 0) -> tiling.Tile:
    return tiling.choose("forward", torch.bfloat16, 32, N, N, "ieee", H, mask, True, device)


def test_untuned_means_the_shipped_tile_and_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_search, "search", lambda *_: pytest.fail("searched"))
    assert chosen() == tiling.heuristic("forward", torch.bfloat16, 32, "ieee", 64)


def test_a_stored_tile_serves_its_bucket_only() -> None:
    tile_store.save(MACHINE, {str(KEY): {"tile": SIZES}})
    shipped = tiling.heuristic("forward", torch.bfloat16, 32, "ieee", 64)
    tuned = tiling.Tile(**SIZES)
    assert [chosen(N) for N in (256, 257, 512, 513)] == [shipped, tuned, tuned, shipped]
    assert chosen(H=8) == chosen(mask=False) == chosen(device=-1) == shipped
    assert tiling.choose("dq", torch.bfloat16, 32, 512, 512, "ieee", 4, True, True, 0) != tuned


def test_blocks_are_still_clipped_to_the_axes() -> None:
    tuning.use(0, KEY, SIZES)
    assert tiling.choose("forward", torch.bfloat16, 32, 40, 512, "ieee", 4, True, True, 0).BLOCK_I == 64


def test_who_keeps_tiles_is_told_to_drop_them(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(tuning, "_listeners", [])
    tuning.when_changed(lambda: told.append("changed"))
    chosen()
    assert told == []
    tuning.use(0, KEY, SIZES)
    tuning.forget()
    assert told == ["changed", "changed"]


def test_the_disk_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Machine] = []
    monkeypatch.setattr(tile_store, "load", lambda machine: read.append(machine) or {})
    for _ in range(3):
        chosen()
        chosen(device=1)
    assert read == [MACHINE, MACHINE]


@pytest.mark.parametrize(
    ("key", "sizes"),
    [
        ("forward bfloat16 ieee", SIZES),
        (str(KEY).replace("forward", "sideways"), SIZES),
        (str(KEY).replace("H=4", "H=x"), SIZES),
        (str(KEY).replace("bfloat16", "bfloat8"), SIZES),
        (str(KEY), SIZES | {"BLOCK_I": 48}),
        (str(KEY), SIZES | {"num_stages": 0}),
        (str(KEY), SIZES | {"CLUSTER": 2}),
        (str(KEY), {"BLOCK_I": 64}),
    ],
)
def test_what_is_not_understood_is_not_used(key: str, sizes: dict[str, int], caplog: pytest.LogCaptureFixture) -> None:
    tile_store.save(MACHINE, {key: {"tile": sizes}})
    with caplog.at_level(logging.WARNING):
        assert tuning.load(MACHINE) == {}
    assert len(caplog.records) == 1


def test_keys_read_as_they_are_written() -> None:
    for mask in (True, False):
        for bias in (True, False):
            key = KEY._replace(mask=mask, bias=bias)
            assert Key.parse(str(key)) == key
    assert str(KEY) == "forward bfloat16 ieee D=32 H=4 N<=512 mask bias"


def test_fields_are_the_tile_s() -> None:
    assert tuple(field.name for field in dataclasses.fields(tiling.Tile)) == tuning.FIELDS
    assert tuple(tiling._SHIPPED) == tuning.KERNELS


def test_forced_the_first_call_searches_and_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[Key] = []

    def search(device: int, key: Key) -> Outcome:
        searched.append(key)
        assert chosen(N=64) == tiling.choose("forward", torch.bfloat16, 32, 64, 64, "ieee"), "a search within a search"
        tuning.use(device, key, SIZES)
        return Outcome(key, SIZES, 1.0, SIZES, 2.0, 3)

    tile_store.save(MACHINE, {str(KEY): {"tile": SIZES | {"BLOCK_J": 64}}})
    monkeypatch.setattr(tuning, "FORCED", True)
    monkeypatch.setattr(tile_search, "search", search)
    assert chosen() == chosen() == tiling.Tile(**SIZES)
    assert searched == [KEY]
    assert tile_store.load(MACHINE)[str(KEY)]["tile"] == SIZES


def test_a_forced_search_that_fails_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def search(device: int, key: Key) -> Outcome:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tuning, "FORCED", True)
    monkeypatch.setattr(tile_search, "search", search)
    assert chosen() == chosen() == tiling.heuristic("forward", torch.bfloat16, 32, "ieee", 64)
    assert len(caplog.records) == 1
