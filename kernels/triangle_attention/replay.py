"""A call that was written down (`tape.py`), run again on other tensors: what it makes, and the launches, no more.

Where sequences are short the host binds: choosing a plan, making up to eighteen tensors and launching up to eleven
kernels one by one takes longer than the kernels do. A program makes its results and one block of memory for all that
lies between, in which a place is used again as soon as no later launch wants it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import direct, launching, memory
from trifast_inductor.kernels.triangle_attention.tape import Made, Place, Tape

_UNIT = 512  # bytes, as torch's own allocator has it: kernels are compiled for how addresses are aligned


@dataclass(frozen=True)
class Program:
    """The launches of a call, on inputs of the signature that it was written down for."""

    device: int
    results: Sequence[Callable[[], Tensor]]
    block: Callable[[], Tensor] | None
    # Beside the inputs: how many bytes into how many-th result, or into the block, which follows them.
    made: Sequence[tuple[int, int]]
    launch: Callable[[list[int], int], None]
    current_device: Callable[[], int]
    current_stream: Callable[[int], int]

    def __call__(self, addresses: list[int]) -> tuple[Tensor, ...] | None:
        """None where the call has to be made as ever.

        Somebody listens to launches, which Triton then has to do; another device is current; or there is no room for
        the block in one piece.
        """
        if launching.are_heard() or self.current_device() != self.device:
            return None
        try:
            results = [make() for make in self.results]
            starts = [t.data_ptr() for t in results]
            if self.block is not None:
                block = self.block()
                starts.append(block.data_ptr())
        except torch.OutOfMemoryError:
            return None
        self.launch(addresses + [starts[n] + offset for n, offset in self.made], self.current_stream(self.device))
        return tuple(results)


def program(tape: Tape, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> Program | None:
    """What a tape holds once it has run; None where it does not hold all that happened."""
    kernels = [launch.kernel for launch, _ in tape.launches]
    of_results = [n for t in results for n, made in enumerate(tape.made) if made.tensor() is t]
    if tape.gap is not None or not kernels or None in kernels or len(of_results) < len(results):
        return None
    between = [n for n, made in enumerate(tape.made) if made.used and n not in of_results]
    offsets, size = _packed([tape.made[n] for n in between])
    starts: dict[int, tuple[int, int]] = {made: (n, 0) for n, made in enumerate(of_results)}
    starts |= {n: (len(results), offset) for n, offset in zip(between, offsets, strict=True)}
    made: list[tuple[int, int]] = []

    def stands_at(place: Place) -> int:
        if place.made < 0:
            return place.input
        start, offset = starts[place.made]
        address = (start, offset + place.offset)
        if address not in made:
            made.append(address)
        return len(inputs) + made.index(address)

    steps = [(launch.kernel, [stands_at(place) for place in places]) for launch, places in tape.launches]
    active = triton.runtime.driver.active
    return Program(
        device=active.get_current_device(),
        results=[memory.maker(one.shape, one.dtype, inputs[0]) for one in (tape.made[n] for n in of_results)],
        block=memory.maker((size,), torch.uint8, inputs[0]) if size else None,
        made=made,
        launch=direct.launcher(steps, len(inputs) + len(made)),
        current_device=active.get_current_device,
        current_stream=active.get_current_stream,
    )


def _packed(tensors: Sequence[Made]) -> tuple[list[int], int]:
    """Where each lies in one block, and its bytes: apart if some launch wants both; the largest are placed first."""
    ends = [(min(one.used), max(one.used)) for one in tensors]
    sizes = [-(-one.nbytes // _UNIT) * _UNIT for one in tensors]
    offsets: dict[int, int] = {}
    for n in sorted(range(len(tensors)), key=lambda n: -sizes[n]):
        beside = [m for m in offsets if ends[m][0] <= ends[n][1] and ends[n][0] <= ends[m][1]]
        at = 0
        for m in sorted(beside, key=lambda m: offsets[m]):
            if offsets[m] - at >= sizes[n]:
                break
            at = max(at, offsets[m] + sizes[m])
        offsets[n] = at
    return [offsets[n] for n in range(len(tensors))], max((offsets[n] + sizes[n] for n in offsets), default=0)


class Recorder:
    """Runs what a plan launches, and writes it down the second time: the first compiles."""

    def __init__(self) -> None:
        self._runs = 0
        self.program: Program | None = None

    def __call__(self, run: Callable[[], tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if self._runs == 2:
            return run()
        tape = Tape(inputs)
        if tape.gap is not None:
            return run()
        self._runs += 1
        if self._runs == 1:
            return run()
        with tape:
            results = run()
        self.program = program(tape, inputs, results)
        return results
