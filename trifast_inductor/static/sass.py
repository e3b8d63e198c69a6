"""Reading machine code: the hot loop of a kernel and what it holds, from what `cuobjdump` prints."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)(?P<rest>[^;]*);"
)
_TARGET = re.compile(r"0x(?P<address>[0-9a-f]+)\s*$")
# Products on tensor cores from sm_80 (HMMA) over sm_90 (HGMMA) to sm_100 (UTCHMMA), and exponentials.
_HOT = re.compile(r"^(?:[A-Z]*MMA\b|MUFU\.EX2)")
_RESOURCE = re.compile(r"\b(?P<name>REG|STACK):(?P<value>\d+)")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with its suffixes, as in "MUFU.EX2"
    rest: str

    @property
    def branch_target(self) -> int | None:
        match = _TARGET.search(self.rest) if self.name.split(".")[0] == "BRA" else None
        return int(match["address"], 16) if match else None


@dataclass(frozen=True)
class Code:
    """One kernel. `stack` is in bytes; `spills` counts loads from and stores to local memory."""

    registers: int
    stack: int
    spills: int
    hot_loop: tuple[Instruction, ...]

    def count(self, prefix: str) -> int:
        """Instructions in the hot loop whose name begins so."""
        return sum(instruction.name.startswith(prefix) for instruction in self.hot_loop)


def disassemble(cubin: bytes) -> Code:
    """By the `cuobjdump` that comes with Triton."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return parse(done.stdout)


def parse(text: str) -> Code:
    """From the text of `cuobjdump --dump-resource-usage --dump-sass`."""
    resources = {match["name"]: int(match["value"]) for match in _RESOURCE.finditer(text)}
    instructions = [
        Instruction(int(match["address"], 16), match["name"], match["rest"])
        for match in map(_INSTRUCTION.match, text.splitlines())
        if match
    ]
    spills = sum(instruction.name.split(".")[0] in ("LDL", "STL") for instruction in instructions)
    return Code(resources.get("REG", 0), resources.get("STACK", 0), spills, _hot_loop(instructions))


def _hot_loop(instructions: list[Instruction]) -> tuple[Instruction, ...]:
    """The loop with the most products and exponentials, among those that hold no other loop with any."""
    loops = []
    for branch in instructions:
        target = branch.branch_target
        if target is not None and target < branch.address:
            body = tuple(x for x in instructions if target <= x.address <= branch.address)
            hot = sum(bool(_HOT.match(x.name)) for x in body)
            if hot:
                loops.append((hot, target, branch.address, body))
    innermost = [
        loop
        for loop in loops
        if not any(other[1] >= loop[1] and other[2] <= loop[2] and other[1:3] != loop[1:3] for other in loops)
    ]
    return max(innermost, key=lambda loop: loop[0])[3] if innermost else ()
