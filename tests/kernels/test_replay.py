"""Calls that are written down and run again: on what they are given, in memory that no two tensors share at a time."""

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from trifast_inductor.testing import random_inputs

pytest.importorskip("triton")
import triton

from tests.kernels.test_launching import gradients_of
from trifast_inductor.kernels.triangle_attention import backward, direct, forward, memory, replay, tape
from trifast_inductor.kernels.triangle_attention.plans import Plans, Programs
from trifast_inductor.kernels.triangle_attention.replay import Recorder
from trifast_inductor.kernels.triangle_attention.tape import Tape


@pytest.fixture
def driver(monkeypatch):
    """A GPU that is not there, for tensors of the CPU."""
    active = SimpleNamespace(device=0, get_current_stream=lambda device: 70 + device)
    active.get_current_device = lambda: active.device
    monkeypatch.setattr(triton.runtime.driver, "_active", active)
    return active


@pytest.fixture
def launched(monkeypatch, driver):
    """What programs launch: of each kernel its name and the addresses of its tensors, and the stream."""
    seen = []

    def launcher(steps, count):
        def run(addresses, stream):
            assert len(addresses) == count
            seen.append([(kernel, [addresses[place] for place in places], stream) for kernel, places in steps])

        return run

    monkeypatch.setattr(direct, "launcher", launcher)
    return seen


class Kernel:
    """As `Launch`, but for what it launches."""

    def __init__(self, name):
        self.kernel = name

    def __call__(self, *tensors):
        tape.note_launch(self, tensors)


first, second, third = map(Kernel, ("first", "second", "third"))


def two_results(x, y):
    """As a plan has it: results, a view of what lies between, and memory that is free once it is read."""
    out = memory.empty((4, 2), torch.float32, x)
    words = memory.empty((2, 1000), torch.int32, x)
    first(x, None, words)
    second(words[1], y, out)
    del words
    parts = memory.empty((1500,), torch.float32, x)
    total = memory.empty((3,), torch.float32, x)
    third(parts, x, total)
    return out, total


def recorded(call, *inputs):
    recorder = Recorder()
    for _ in range(2):
        recorder(lambda: call(*inputs), inputs)
    return recorder.program


def fresh(*tensors):
    return [torch.empty_like(t) for t in tensors]


def test_a_program_makes_what_the_call_made_and_launches_on_what_it_is_given(launched):
    x, y = torch.zeros(5), torch.zeros(7)
    program = recorded(two_results, x, y)
    x, y = fresh(x, y)
    out, total = program([x.data_ptr(), y.data_ptr()])
    assert (out.shape, out.dtype, total.shape) == ((4, 2), torch.float32, (3,))
    ((one, two, three),) = launched
    words = one[1][1]
    assert one == ("first", [x.data_ptr(), words], 70)
    assert two == ("second", [words + 4000, y.data_ptr(), out.data_ptr()], 70)
    # What is read no more makes room for what comes.
    assert three == ("third", [words, x.data_ptr(), total.data_ptr()], 70)


def test_the_first_run_is_not_written_down_and_the_third_not_again(launched):
    x, y = torch.zeros(5), torch.zeros(7)
    recorder, runs = Recorder(), []

    def call():
        runs.append(tape._running != {})
        return two_results(x, y)

    for _ in range(4):
        recorder(call, (x, y))
    assert runs == [False, True, False, False]


def test_results_are_those_of_a_call_of_their_own(launched):
    x, y = torch.zeros(5), torch.zeros(7)
    program = recorded(two_results, x, y)
    results = [program([x.data_ptr(), y.data_ptr()]) for _ in range(2)]
    assert len({t.data_ptr() for pair in results for t in pair}) == 4


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda x, y: (first(x, y.clone()), two_results(x, y))[1], "aten.clone.default of torch"),
        (lambda x, y: (first(x, torch.zeros(3)), two_results(x, y))[1], "aten.zeros.default of torch"),
        (lambda x, y: (first(x, OTHER), two_results(x, y))[1], "a launch on a tensor of unknown origin"),
        (lambda x, y: (two_results(x, y)[0], x), None),
        (lambda x, y: (Kernel(None)(x), two_results(x, y))[1], None),
        (lambda x, y: (memory.empty((3,), torch.float32, x),), None),
    ],
)
def test_what_cannot_be_written_down_is_run_as_ever(call, why, launched):
    x, y = torch.zeros(5), torch.zeros(7)
    with Tape((x, y)) as written:
        results = call(x, y)
    assert written.gap == why
    assert replay.program(written, (x, y), results) is None
    assert recorded(call, x, y) is None
    assert launched == []


OTHER = torch.zeros(3)


def test_one_tensor_in_two_places_is_no_guide(launched):
    x, y = torch.zeros(5), torch.zeros(5)
    recorder = Recorder()
    for _ in range(3):
        recorder(lambda: two_results(x, x), (x, x))
    assert recorder.program is None
    for _ in range(2):
        recorder(lambda: two_results(x, y), (x, y))
    recorder.program([16, 32])
    ((_, (_, (_, y_read, _), _), _),) = launched
    assert y_read == 32


def test_a_view_of_an_input_is_that_input_if_no_other_starts_there():
    base = torch.zeros(64)
    x, y = base[:32], base[32:]
    with Tape((x, y)) as written:
        first(x.view(torch.uint8), y.view(4, 8))
        first(base)
    assert [(place.input, place.offset) for place in written.launches[0][1]] == [(0, 0), (1, 0)]
    assert written.gap is None
    with Tape((x, base[:16])) as written:
        first(x.view(torch.uint8))
    assert written.gap == "a launch on a tensor of unknown origin"


@pytest.mark.parametrize("seed", range(20))
def test_no_two_tensors_lie_in_one_place_at_a_time(seed):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(12):
        start, more, size = (int(torch.randint(1, n, (), generator=generator)) for n in (8, 4, 3000))
        made.append(SimpleNamespace(used=[start + more, start], nbytes=size))
    offsets, total = replay._packed(made)
    for n, (a, start) in enumerate(zip(made, offsets, strict=True)):
        assert start % 512 == 0
        assert start + a.nbytes <= total
        for b, other in zip(made[:n], offsets[:n], strict=True):
            together = min(a.used) <= max(b.used) and min(b.used) <= max(a.used)
            apart = start + a.nbytes <= other or other + b.nbytes <= start
            assert apart or not together
    rounded = [-(-a.nbytes // 512) * 512 for a in made]
    most = max(sum(s for a, s in zip(made, rounded, strict=True) if min(a.used) <= t <= max(a.used)) for t in range(12))
    assert most <= total <= sum(rounded)


def test_a_program_does_not_run_where_triton_is_listened_to_or_another_device_is_current(launched, driver):
    x, y = torch.zeros(5), torch.zeros(7)
    program = recorded(two_results, x, y)
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        assert program([16, 32]) is None
    finally:
        hook.remove(print)
    driver.device = 1
    assert program([16, 32]) is None
    assert launched == []
    driver.device = 0
    assert program([16, 32]) is not None


def test_a_call_makes_smaller_pieces_where_there_is_no_room_for_one(launched):
    def full():
        raise torch.OutOfMemoryError("out of memory")

    x, y = torch.zeros(5), torch.zeros(7)
    program = recorded(two_results, x, y)
    assert replace(program, block=full)([16, 32]) is None
    assert replace(program, results=[full])([16, 32]) is None
    assert launched == []


class Recorded:
    """A plan's recorder, with a program that notes what it is run on."""

    def __init__(self):
        self.ran = []

    def __call__(self, run, given):
        return run()

    def program(self, addresses):
        self.ran.append(addresses)
        return (torch.ones(1),)


def of_a_call(programs, *tensors, numbers=(1.0, True)):
    recorder = Recorded()
    programs.record(recorder, lambda: (torch.zeros(1),), tensors, numbers)
    return recorder


def test_a_call_is_known_by_layout_numbers_and_what_is_missing():
    x, y = torch.zeros(8, 16), torch.zeros(16)
    programs = Programs()
    assert programs.run((x, y, None), (1.0, True)) is None
    recorder = of_a_call(programs, x, y, None)
    other = torch.zeros(8, 16)
    assert torch.equal(programs.run((other, y, None), (1.0, True))[0], torch.ones(1))
    assert recorder.ran == [[other.data_ptr(), y.data_ptr()]]
    for unknown in (
        ((x[:7], y, None), (1.0, True)),
        ((torch.zeros(16, 8).mT, y, None), (1.0, True)),
        ((x.bfloat16(), y, None), (1.0, True)),
        ((x.to("meta"), y, None), (1.0, True)),
        ((torch.zeros(129)[1:].view(8, 16), y, None), (1.0, True)),
        ((x, None, y), (1.0, True)),
        ((x, y, None), (1.0, False)),
        ((x, y, None), (0.5, True)),
    ):
        assert programs.run(*unknown) is None
    assert len(recorder.ran) == 1


def test_a_tensor_that_starts_between_16_bytes_makes_no_call_known():
    programs = Programs()
    shifted = torch.zeros(129)[1:]
    of_a_call(programs, shifted)
    assert programs.run((shifted,), (1.0, True)) is None
    assert programs.run((torch.zeros(128),), (1.0, True)) is None


def test_layouts_that_take_turns_stay_known_and_the_oldest_goes():
    programs = Programs()
    layouts = [torch.zeros(n) for n in range(1, programs._LIMIT + 2)]
    recorders = [of_a_call(programs, t) for t in layouts]
    of_a_call(programs, layouts[-1])  # once is enough
    for _ in range(2):
        for t in layouts[1:]:
            assert programs.run((t,), (1.0, True)) is not None
    assert programs.run((layouts[0],), (1.0, True)) is None
    assert [len(recorder.ran) for recorder in recorders] == [0] + [2] * programs._LIMIT


def test_nothing_is_known_where_torch_lacks_its_guards(monkeypatch):
    monkeypatch.setattr(torch._C._dynamo, "guards", None)
    programs, x = Programs(), torch.zeros(3)
    of_a_call(programs, x)
    assert programs.run((x,), (1.0, True)) is None


def test_what_is_forgotten_of_plans_is_forgotten_of_programs():
    plans: Plans[int] = Plans()
    x = torch.zeros(3)
    of_a_call(plans.programs, x)
    plans.clear()
    assert plans.programs.run((x,), (1.0, True)) is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("N", "changes"),
    [
        (16, {}),
        (64, {}),
        (100, {"key_term": "mask"}),
        (128, {"key_term": "additive"}),
        (256, {"key_term": "additive"}),
        (257, {"key_term": "mask"}),
        (384, {"key_term": "additive"}),
        (384, {}),
        (128, {"dtype": torch.float32}),
        (256, {"D": 64, "key_term": "mask", "dtype": torch.float16}),
    ],
)
def test_programs_give_the_bits_of_the_calls_that_they_were_written_down_from(N, changes, device):
    given = {"R": N, "I": N, "J": N, "H": 4, "D": 32, "dtype": torch.bfloat16, "device": device, **changes}
    calls = [random_inputs(**given, seed=seed) for seed in range(3)]

    forward._plans.clear()
    backward._plans.clear()
    with mock.patch.object(replay, "program", return_value=None):
        expected = [gradients_of(x) for x in calls]
    forward._plans.clear()
    backward._plans.clear()
    for x in calls[:2]:
        gradients_of(x)
    assert len(forward._plans.programs._known) == len(backward._plans.programs._known) == 1
    ran = []
    run = replay.Program.__call__
    with mock.patch.object(replay.Program, "__call__", lambda self, given: ran.append(self) or run(self, given)):
        actual = [gradients_of(x) for x in calls]
    assert len(ran) == 6
    for mine, wanted in zip(actual, expected, strict=True):
        for a, b in zip(mine, wanted, strict=True):
            assert a.shape == b.shape
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.gpu
def test_programs_are_captured_in_a_cuda_graph_and_follow_the_stream(device):
    given = {"R": 128, "I": 128, "J": 128, "H": 4, "D": 32, "dtype": torch.bfloat16, "key_term": "additive"}
    x, other = (random_inputs(**given, device=device, seed=seed) for seed in range(2))
    for _ in range(3):
        expected, *_ = forward.launch(*other.op)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_another, *_ = forward.launch(*other.op)
    torch.cuda.synchronize()
    assert torch.equal(on_another, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, *_ = forward.launch(*x.op)
    for mine, theirs in zip(x.op[:5], other.op[:5], strict=True):
        mine.copy_(theirs)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
