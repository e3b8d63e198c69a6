"""What is remembered between launches, and that it is forgotten where it must be."""

from dataclasses import replace

import pytest
import torch

from trifast_inductor.testing import random_inputs

pytest.importorskip("triton")
from trifast_inductor.kernels.triangle_attention import backward, forward, launching
from trifast_inductor.kernels.triangle_attention.launching import Launch, Plans
from trifast_inductor.kernels.triangle_attention.tiling import Tile


class FakeKernel:
    """A kernel as Triton's are called: the first launch compiles, and gives what launches again."""

    arg_names = ("x_ptr", "y_ptr", "stride_x", "BLOCK_I")

    def __init__(self):
        self.compiled = []
        self.launched = []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.compiled.append((grid, args, options))
            return self.Compiled(self)

        return launch

    class Compiled:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args: self.kernel.launched.append((grid, args))


def test_a_second_launch_hands_over_pointers_and_the_same_arguments():
    kernel = FakeKernel()
    x = torch.randn(3)
    launch = Launch(kernel, 7, {"stride_x": 5, "not a parameter": 0}, Tile(32, 16, 4, 2))
    launch(x, None)
    launch(x, None)
    assert kernel.compiled == [((7, 1, 1), (x, None, 5, 32), {"num_warps": 4, "num_stages": 2})]
    assert kernel.launched == [((7, 1, 1), (x.data_ptr(), None, 5, 32))]


def test_a_signature_tells_apart_what_kernels_are_compiled_for():
    x = torch.zeros(8, 8, 16)
    others = {
        "shape": x[:7],
        "strides": x.transpose(0, 1),
        "dtype": x.to(torch.bfloat16),
        "device": x.to("meta"),
        "alignment": torch.zeros(8 * 8 * 16 + 1)[1:].view(8, 8, 16),
        "none": None,
    }
    signatures = {launching.signature(x), *(launching.signature(other) for other in others.values())}
    assert len(signatures) == 1 + len(others)
    assert launching.signature(x.clone(), None) == launching.signature(x, None)
    assert launching.signature(None, x) != launching.signature(x, None)


def test_plans_do_not_grow_without_end():
    plans: Plans[int] = Plans()
    for n in range(plans._LIMIT + 1):
        assert plans.add((n,), n) == n
    assert plans == {(plans._LIMIT,): plans._LIMIT}


class Recorded:
    """A kernel, and what Triton compiles of it: both write down what they are given."""

    def __init__(self, *, compiles=True):
        self.bound, self.ran, self._compiles = [], [], compiles

    def __getitem__(self, grid):
        def bind(*arguments, **options):
            self.bound.append((grid, arguments, options))
            run = {grid: lambda *passed: self.ran.append(passed)}
            return run if self._compiles else None

        return bind


def test_a_repeated_launch_is_bound_once_for_each_set_of_values():
    kernel = Recorded()
    launch = launching.Repeated(kernel)
    x, y = torch.zeros(8), torch.ones(8)
    launch(3, x, None, 5, "add", num_warps=4)
    launch(3, y, None, 5, "add", num_warps=4)
    assert kernel.bound == [((3, 1, 1), (x, None, 5, "add"), {"num_warps": 4})]
    assert kernel.ran == [(y.data_ptr(), None, 5, "add")]
    others = [
        (4, x, None, 5, "add"),
        (3, x.half(), None, 5, "add"),
        (3, x[1:], None, 5, "add"),  # another alignment
        (3, x, x, 5, "add"),
        (3, x, None, 6, "add"),
        (3, x, None, 5, "select"),
    ]
    for n, other in enumerate(others, 2):
        launch(*other, num_warps=4)
        assert len(kernel.bound) == n
    launch(3, x, None, 5, "add", num_warps=8)
    assert len(kernel.bound) == len(others) + 2


def test_a_repeated_launch_of_the_interpreter_is_bound_each_time():
    kernel = Recorded(compiles=False)
    launch = launching.Repeated(kernel)
    for _ in range(2):
        launch(1, torch.zeros(2), num_warps=4)
    assert len(kernel.bound) == 2


def test_repeated_launches_do_not_grow_without_end():
    launch = launching.Repeated(Recorded())
    for n in range(launch._LIMIT + 1):
        launch(1, torch.zeros(1), n, num_warps=4)
    assert len(launch._runs) == 1


def gradients_of(x):
    saved = forward.launch(*x.op)
    return (*saved, *backward.launch(x.grad_out, *x.op[:6], *saved, *x.op[6:], True))


def test_repeated_calls_with_other_values_layouts_and_numbers(device):
    """Every call computes from what it is given, in whatever order shapes and layouts alternate."""
    first = random_inputs(R=3, I=17, J=20, D=16, device=device, key_term="mask")
    other = random_inputs(R=3, I=17, J=20, D=16, device=device, key_term="mask", seed=1)
    shifted = torch.cat([first.k.new_zeros(1), first.k.flatten()])[1:].view_as(first.k)
    variants = [
        first,
        other,
        replace(first, q=first.q.transpose(1, 2).contiguous().transpose(1, 2)),
        replace(first, k=shifted),
        replace(first, scale=2.0 * first.scale),
        replace(first, fill=-1.0),
        replace(first, key_term_first=True),
        replace(first, bias=None),
    ]
    alone = []
    for x in variants:
        forward._plans.clear()
        backward._plans.clear()
        alone.append(gradients_of(x))
    for _ in range(2):
        for x, expected in zip(variants, alone, strict=True):
            for actual, want in zip(gradients_of(x), expected, strict=True):
                torch.testing.assert_close(actual, want, rtol=0, atol=0)
