"""What is remembered between launches, and that it is forgotten where it must be."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from trifast_inductor.testing import random_inputs

pytest.importorskip("triton")
from triton.compiler import CompiledKernel

from trifast_inductor.kernels.triangle_attention import backward, forward, launching, plans
from trifast_inductor.kernels.triangle_attention.hopper import choice
from trifast_inductor.kernels.triangle_attention.launching import Launch
from trifast_inductor.kernels.triangle_attention.plans import Plans
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
    signatures = {plans.signature(x), *(plans.signature(other) for other in others.values())}
    assert len(signatures) == 1 + len(others)
    assert plans.signature(x.clone(), None) == plans.signature(x, None)
    assert plans.signature(None, x) != plans.signature(x, None)


def test_plans_do_not_grow_without_end():
    known: Plans[int] = Plans()
    for n in range(known._LIMIT + 1):
        assert known.add((n,), n) == n
    assert known == {(known._LIMIT,): known._LIMIT}


class Compiled(CompiledKernel):
    """What Triton compiles, without a GPU; writes down how it was launched."""

    run = function = packed_metadata = None

    def __init__(self, backend):
        self.ran = []
        self.run = lambda *given: self.ran.append(given)
        self.function, self.packed_metadata = "function", "metadata"
        self.src = SimpleNamespace(
            signature={"x_ptr": "*fp32", "y_ptr": "constexpr", "stride_x": "i32", "BLOCK_I": "constexpr"}
        )
        self.metadata = SimpleNamespace(target=SimpleNamespace(backend=backend))

    def __getitem__(self, grid):
        return lambda *given: self.ran.append(("listened to", *given))


@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_a_listener_to_launches_is_heard_and_nothing_prepared_where_there_is_none(monkeypatch, backend):
    driver = SimpleNamespace(get_current_device=lambda: 2, get_current_stream=lambda device: 70 + device)
    monkeypatch.setattr(launching.triton.runtime.driver, "_active", driver)
    straight = []

    def kernel(compiled, grid, kinds, values, walks, addresses):
        assert (grid, list(kinds), values) == ((3, 1, 1), list(FakeKernel.arg_names), {"stride_x": 5, "BLOCK_I": 32})
        assert addresses == [x.data_ptr()]
        return "kernel"

    def launcher(steps, count):
        assert (steps, count) == ([("kernel", range(1))], 1)
        return lambda *given: straight.append(given)

    monkeypatch.setattr(launching.direct, "kernel", kernel)
    monkeypatch.setattr(launching.direct, "launcher", launcher)
    compiled, x = Compiled(backend), torch.zeros(3)
    launch = Launch(FakeKernel(), 3, {"stride_x": 5}, Tile(32, 16, 4, 2))
    run = launch._bound(compiled, (x, None))
    run((x, None))
    hook = launching.triton.knobs.runtime.launch_exit_hook
    hook.add(print)
    try:
        run((x, None))
    finally:
        hook.remove(print)
    heard = ("listened to", x.data_ptr(), None, 5, 32)
    if backend == "cuda":
        assert straight == [([x.data_ptr()], 72)]
        assert compiled.ran == [heard]
    else:
        full = (3, 1, 1, 72, "function", "metadata", None, None, None, x.data_ptr(), None, 5, 32)
        assert compiled.ran == [full, heard]
        assert straight == []


class RecordedCopies(FakeKernel):
    """A kernel some of whose tensors are copied in boxes."""

    arg_names = ("x_desc", "y_ptr", "z_desc", "stride_x")


@pytest.mark.skipif(choice.gluon_refusal() is not None, reason="no Gluon that fits")
def test_a_described_tensor_is_walked_as_it_was_the_first_time():
    from trifast_inductor.kernels.triangle_attention.hopper.descriptors import CopyingLaunch

    kernel = RecordedCopies()
    x, other, y = torch.zeros(1, 8, 64).half(), torch.ones(1, 8, 64).half(), torch.zeros(3)
    launch = CopyingLaunch(kernel, 7, {"stride_x": 5}, 4, {"x_desc": (1, 4, 32), "z_desc": (4,)})
    launch(x, y, None)
    launch(other, y, None)
    ((_, (described, *rest), options),) = kernel.compiled
    assert (described.base is x, described.block_shape, described.strides) == (True, [1, 4, 32], [64, 64, 1])
    assert rest == [y, None, 5]
    assert options["num_warps"] == 4
    ((_, (walked, *rest)),) = kernel.launched
    assert (walked.base is other, walked.shape, walked.strides) == (True, [1, 8, 64], [64, 64, 1])
    assert (walked.padding, walked.round_f32_to_tf32) == (described.padding, False)
    assert rest == [y.data_ptr(), None, 5]


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
