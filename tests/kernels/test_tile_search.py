"""The search, with times made up: no GPU is needed to know that it ends at the fastest tile it may take."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import launching, tile_search, tuning
from trifast_inductor.kernels.triangle_attention.tile_search import Outcome, search
from trifast_inductor.kernels.triangle_attention.tuning import Key, Sizes

KEY = Key("forward", torch.bfloat16, "ieee", 32, 4, 512, True, True)
SHIPPED = {"BLOCK_I": 128, "BLOCK_J": 32, "num_warps": 4, "num_stages": 3}
Result = Callable[[Sizes], Sequence[Tensor]]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    tuning.forget()
    yield
    tuning.forget()


def run(time: Callable[[Sizes], float], key: Key = KEY, result: Result | None = None) -> Outcome:
    """Search with these times; what a tile's launch gives is ones unless `result` says else."""

    def current() -> Sizes:
        sizes = tuning._tiles[0][key]
        assert sizes is not None
        return sizes

    def workload(device: int, key: Key) -> tile_search.Run:
        return lambda: (torch.ones(4),) if result is None else result(current())

    return search(0, key, lambda launch: time(current()), workload)


@pytest.fixture(autouse=True)
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    from trifast_inductor.kernels.triangle_attention import tiling

    monkeypatch.setattr(tiling, "heuristic", lambda *_: tiling.Tile(**SHIPPED))


def distance(sizes: Sizes, best: Sizes) -> float:
    """A landscape with one valley."""
    steps = tile_search.STEPS
    return 1.0 + sum(abs(steps[name].index(sizes[name]) - steps[name].index(best[name])) for name in steps)


@pytest.mark.parametrize(
    "best",
    [
        SHIPPED,
        {"BLOCK_I": 64, "BLOCK_J": 64, "num_warps": 8, "num_stages": 2},
        {"BLOCK_I": 16, "BLOCK_J": 128, "num_warps": 4, "num_stages": 3},
    ],
)
def test_it_walks_to_the_valley(best: Sizes) -> None:
    outcome = run(lambda sizes: distance(sizes, best))
    assert outcome.sizes == best
    assert outcome.changed == (best != SHIPPED)
    assert outcome.heuristic == SHIPPED
    assert outcome.ms == 1.0
    assert outcome.tried < 50
    assert tuning._tiles[0][KEY] == best
    assert outcome.entry["tile"] == best


def test_a_gain_within_the_noise_changes_nothing() -> None:
    outcome = run(lambda sizes: 1.0 if sizes == SHIPPED else 0.99)
    assert not outcome.changed


def test_a_tile_that_fails_or_errs_is_passed_over() -> None:
    def result(sizes: Sizes) -> Sequence[Tensor]:
        if sizes["num_warps"] == 8:
            raise RuntimeError("out of resource: shared memory")
        values = torch.ones(4, dtype=torch.bfloat16)
        if sizes["BLOCK_J"] == 64:
            values[0] = 1.5
        if sizes["num_stages"] == 2:
            values[0] = float("nan")
        return (values,)

    outcome = run(lambda sizes: 1.0 if sizes == SHIPPED else 0.5, result=result)
    assert outcome.changed
    assert outcome.sizes["num_warps"] < 8
    assert outcome.sizes["BLOCK_J"] != 64
    assert outcome.sizes["num_stages"] != 2


def test_infinite_results_may_agree() -> None:
    values = torch.tensor([1.0, float("-inf"), float("nan")])
    assert tile_search._agree(values, values.clone())
    assert not tile_search._agree(torch.tensor([1.0, 2.0, float("nan")]), values)


def test_the_shipped_tile_s_own_failure_is_told() -> None:
    def result(sizes: Sizes) -> Sequence[Tensor]:
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        run(lambda sizes: 1.0, result=result)


def test_no_block_is_longer_than_the_axis() -> None:
    seen: list[Sizes] = []

    def time(sizes: Sizes) -> float:
        seen.append(dict(sizes))
        return 1.0

    run(time, KEY._replace(length=16))
    assert all(sizes["BLOCK_I"] == sizes["BLOCK_J"] == 16 for sizes in seen)
    assert len(seen) == len({tuple(sizes.values()) for sizes in seen})


def test_it_reads_well() -> None:
    outcome = run(lambda sizes: 1.0)
    assert str(outcome).startswith(f"{KEY}: 128x32 w4 s3 -> 128x32 w4 s3, 1.0000 -> 1.0000 ms, ")


@pytest.mark.parametrize(
    ("kernel", "dtype", "D", "length", "expected"),
    [
        ("forward", torch.bfloat16, 32, 256, True),  # for lengths of 193 to 255
        ("forward", torch.bfloat16, 32, 512, False),
        ("forward", torch.bfloat16, 128, 512, True),
        ("forward", torch.float32, 32, 512, True),
        ("dq", torch.float16, 64, 256, True),
        ("dkdv", torch.float16, 64, 512, False),
        ("dbias", torch.bfloat16, 128, 512, True),
        ("dkdv", torch.bfloat16, 32, 64, False),
        ("dkdv", torch.bfloat16, 32, 128, False),
        ("dkdv", torch.bfloat16, 64, 128, True),
    ],
)
def test_on_hopper_some_kernels_serve_no_launch(monkeypatch, kernel, dtype, D, length, expected):
    hopper = tile_search.hopper
    monkeypatch.setattr(hopper, "is_hopper", lambda _: True)
    monkeypatch.setattr(hopper, "gluon_refusal", lambda: None)
    monkeypatch.setattr(launching, "cuda_arch", lambda: 90)
    operands = tile_search._operands
    monkeypatch.setattr(tile_search, "_operands", lambda key, N, make: operands(key, N, of_cuda))
    assert tile_search.serves(0, Key(kernel, dtype, "ieee", D, 4, length, True, True)) == expected


class OnCuda(torch.Tensor):
    """Says so; it has no elements."""

    device = torch.device("cuda", 0)


def of_cuda(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta").as_subclass(OnCuda)


def test_elsewhere_the_portable_kernels_serve_all(monkeypatch):
    monkeypatch.setattr(tile_search.hopper, "is_hopper", lambda _: False)
    assert tile_search.serves(0, KEY)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_on_a_gpu_it_ends_no_slower_than_it_began(kernel: str) -> None:
    outcome = search(0, Key(kernel, torch.bfloat16, "ieee", 32, 2, 128, True, True))
    assert outcome.ms <= outcome.heuristic_ms
    assert outcome.tried > 3
