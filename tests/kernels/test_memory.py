"""Dense tensors as `torch.empty` makes them, with the function of Inductor and without."""

import pytest
import torch

from trifast_inductor.kernels.triangle_attention import memory


@pytest.fixture(params=["of Inductor", "without"])
def on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    if request.param == "without":
        monkeypatch.setattr(memory, "_on_cuda", None)
        monkeypatch.setattr(memory, "_on_cpu", None)
    else:
        assert memory._on_cpu is not None, "torch has no such function any more"
        assert memory._on_cuda is not None, "torch has no such function any more"
    return torch.ones(1, device="cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0, 3), (1, 2, 3, 4, 5), torch.Size((3, 2))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int32])
def test_as_torch_makes_them(on, shape, dtype):
    expected, actual = torch.empty(shape, dtype=dtype, device=on.device), memory.empty(shape, dtype, on)
    for get in (lambda t: t.shape, lambda t: t.stride(), lambda t: t.dtype, lambda t: t.device):
        assert get(actual) == get(expected)
    assert actual.is_contiguous()
    assert not actual.requires_grad
    assert actual.data_ptr() % 16 == 0


def test_no_two_share_memory(on):
    first, second = (memory.empty((64,), torch.float32, on).fill_(n) for n in range(2))
    assert first.eq(0).all()
    assert second.eq(1).all()


def test_in_inference_mode(on):
    with torch.inference_mode():
        assert memory.empty((2,), torch.float32, on).is_inference()


def test_pieces_of_what_is_written_later(on):
    """Apart from each other, from the start of a unit, and of memory of their own where there is no room."""
    results = [torch.zeros(shape, dtype=torch.bfloat16, device=on.device) for shape in ((1, 3, 128, 2), (2, 1024))]
    scratch = memory.Scratch(*results)
    sizes = ((5, 7), torch.float32), ((512,), torch.int32), ((1500,), torch.bfloat16), ((129,), torch.int32)
    pieces = [scratch.empty(shape, dtype, on) for shape, dtype in sizes]
    for n, (piece, (shape, dtype)) in enumerate(zip(pieces, sizes, strict=True)):
        assert piece.shape == shape
        assert piece.dtype == dtype
        assert piece.data_ptr() % 16 == 0
        piece.fill_(n + 1)
    for n, piece in enumerate(pieces):
        assert piece.eq(n + 1).all()
    where = [[t.data_ptr() <= piece.data_ptr() < t.data_ptr() + t.nbytes for t in results] for piece in pieces]
    assert where == [[True, False], [False, True], [False, False], [True, False]]
