"""NVIDIA's machine code, from what `cuobjdump` prints."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from trifast_inductor.static.code import Code, Instruction, hot_loop

_INSTRUCTION = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)(?P<rest>[^;]*);"
)
_TARGET = re.compile(r"0x(?P<address>[0-9a-f]+)\s*$")
# Products on tensor cores from sm_80 (HMMA) over sm_90 (HGMMA) to sm_100 (UTCHMMA), and exponentials.
_HOT = re.compile(r"^(?:[A-Z]*MMA\b|MUFU\.EX2)")
_RESOURCE = re.compile(r"\b(?P<name>REG|STACK):(?P<value>\d+)")


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
    instructions = [_instruction(match) for match in map(_INSTRUCTION.match, text.splitlines()) if match]
    spills = sum(instruction.name.split(".")[0] in ("LDL", "STL") for instruction in instructions)
    loop = hot_loop(instructions, _HOT.match)
    return Code(resources.get("REG", 0), resources.get("STACK", 0), spills, loop, exponential="MUFU.EX2")


def _instruction(match: re.Match[str]) -> Instruction:
    target = _TARGET.search(match["rest"]) if match["name"].split(".")[0] == "BRA" else None
    return Instruction(int(match["address"], 16), match["name"], int(target["address"], 16) if target else None)
