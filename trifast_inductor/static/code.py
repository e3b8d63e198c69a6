"""Machine code of one kernel, whatever the architecture: its hot loop and what it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with its suffixes, as in "MUFU.EX2"
    branch_target: int | None = None


@dataclass(frozen=True)
class Code:
    """`stack` is in bytes. `spills`: accesses to spilled registers, or the number of registers spilled on AMD."""

    registers: int
    stack: int
    spills: int
    hot_loop: tuple[Instruction, ...]
    exponential: str  # what the name of an exponential begins with

    @property
    def exponentials(self) -> int:
        """In the hot loop."""
        return sum(instruction.name.startswith(self.exponential) for instruction in self.hot_loop)


def hot_loop(instructions: Sequence[Instruction], is_hot: Callable[[str], object]) -> tuple[Instruction, ...]:
    """The loop with the most products and exponentials, among those that hold no other loop with any."""
    loops = []
    for branch in instructions:
        target = branch.branch_target
        if target is not None and target < branch.address:
            body = tuple(x for x in instructions if target <= x.address <= branch.address)
            hot = sum(bool(is_hot(x.name)) for x in body)
            if hot:
                loops.append((hot, target, branch.address, body))
    innermost = [
        loop
        for loop in loops
        if not any(other[1] >= loop[1] and other[2] <= loop[2] and other[1:3] != loop[1:3] for other in loops)
    ]
    return max(innermost, key=lambda loop: loop[0])[3] if innermost else ()
