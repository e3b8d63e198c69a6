"""`trifast-tune`: what it asks for, tells, stores, and does without a GPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trifast_inductor import __main__, tune
from trifast_inductor.kernels.triangle_attention import tile_search, tile_store, tuning
from trifast_inductor.kernels.triangle_attention.tile_search import Outcome
from trifast_inductor.kernels.triangle_attention.tile_store import Machine
from trifast_inductor.kernels.triangle_attention.tuning import Key

MACHINE = Machine("Some GPU", (9, 0), "3.9.0")
SHIPPED = {"BLOCK_I": 64, "BLOCK_J": 32, "num_warps": 4, "num_stages": 3}


@pytest.fixture(autouse=True)
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(tile_store.DIRECTORY_VARIABLE, str(tmp_path))
    tuning.forget()
    yield
    tuning.forget()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Key]:
    """A machine whose forward gains from another tile and whose dbias does not run; the keys searched."""
    searched: list[Key] = []

    def search(device: int, key: Key) -> Outcome:
        searched.append(key)
        if key.kernel == "dbias":
            raise RuntimeError("out of memory\nmore")
        faster = key.kernel == "forward"
        sizes = SHIPPED | {"BLOCK_J": 64} if faster else SHIPPED
        return Outcome(key, sizes, 1.0 if faster else 2.0, SHIPPED, 2.0, 9)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "machine_of", lambda device: MACHINE)
    monkeypatch.setattr(tuning, "FORCED", False)
    monkeypatch.setattr(tile_search, "search", search)
    monkeypatch.setattr(tile_search, "serves", lambda device, key: key.length < 2048)
    arguments = pytest.importorskip("trifast_inductor.kernels.triangle_attention.arguments")
    monkeypatch.setattr(arguments, "dot_precision", lambda *_: "ieee")  # it may ask the driver
    return searched


def test_the_default_grid(gpu: list[Key]) -> None:
    assert tune.main([]) == 0
    assert len(gpu) == 7 * 4
    assert {key.length for key in gpu} == {16, 32, 64, 128, 256, 512, 1024}
    assert {key[1:5] for key in gpu} == {(torch.bfloat16, "ieee", 32, 4)}


def test_kernels_that_no_launch_takes_are_left_out(gpu: list[Key], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--min-n", "1024", "--max-n", "2048"]
    tune.main(options)
    assert {key.length for key in gpu} == {1024}
    assert "4 of 8 shapes go to kernels for Hopper, whose tiles are fixed" in capsys.readouterr().out
    tune.main([*options, "--all-kernels"])
    assert {key.length for key in gpu} == {1024, 2048}


def test_lists_take_commas(gpu: list[Key]) -> None:
    options = ["--min-n", "100", "--max-n", "256", "--dtype", "bfloat16,float32", "--h", "4,8", "--d", "16,32,64"]
    assert tune.main([*options, "--mask", "both"]) == 0
    assert len(gpu) == len(set(gpu)) == 2 * 2 * 2 * 3 * 2 * 4
    assert {key.length for key in gpu} == {128, 256}


def test_it_says_what_changed_and_what_failed(gpu: list[Key], capsys: pytest.CaptureFixture[str]) -> None:
    tune.main(["--min-n", "512", "--max-n", "512"])
    printed, bar = capsys.readouterr()
    assert "Some GPU: 4 of 4 shapes to tune, 0 stored already" in printed
    assert "forward bfloat16 ieee D=32 H=4 N<=512 mask bias: 64x32 w4 s3 -> 64x64 w4 s3" in printed
    assert "1 tiles changed, 2 kept, 1 failed" in printed
    assert "failed: dbias bfloat16 ieee D=32 H=4 N<=512 mask bias: RuntimeError: out of memory" in printed
    assert "[############............] 2/4 dkdv" in bar


def test_what_is_stored_is_tuned_again_only_when_forced(gpu: list[Key], monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--min-n", "512", "--max-n", "512"]
    tune.main(options)
    tune.main(options)
    assert [key.kernel for key in gpu] == ["forward", "dq", "dkdv", "dbias", "dbias"]
    monkeypatch.setattr(tuning, "FORCED", True)
    tune.main(options)
    assert len(gpu) == 5 + 4


def test_show_and_clear_need_no_gpu(
    gpu: list[Key], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tune.main(["--min-n", "512", "--max-n", "512"])
    capsys.readouterr()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--show"]) == 0
    line = "forward bfloat16 ieee D=32 H=4 N<=512 mask bias: BLOCK_I=64 BLOCK_J=64 num_warps=4 num_stages=3"
    assert line in capsys.readouterr().out
    assert tune.main(["--clear"]) == 0
    assert MACHINE.file_name in capsys.readouterr().out
    assert tune.main(["--show"]) == 0
    assert "nothing is tuned" in capsys.readouterr().out
    assert tune.main(["--clear"]) == 0
    assert "nothing to remove" in capsys.readouterr().out


@pytest.mark.usefixtures("without_cuda")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["tune"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--dtype", "float64"], ["--h", "4,x"], ["--d", "0"], ["--mask", "maybe"]])
def test_bad_options_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        tune.main(wrong)
    assert stop.value.code == 2
