"""AMD's machine code, from the assembly that Triton keeps."""

from __future__ import annotations

import re

from trifast_inductor.static.code import Code, Instruction, hot_loop

_LABEL = re.compile(r"^(?P<name>\.L\w+):")
_INSTRUCTION = re.compile(r"^\s+(?P<name>[a-z]\w+)(?:\s+(?P<rest>[^;]*))?")
_HOT = re.compile(r"^(?:v_mfma_|v_exp_)")
_RESOURCE = re.compile(
    r"^\s*\.(?P<name>vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(?P<value>\d+)", re.M
)


def parse(text: str) -> Code:
    """From the text of `asm["amdgcn"]`. Registers are those of vectors, accumulators among them."""
    resources = {match["name"]: int(match["value"]) for match in _RESOURCE.finditer(text)}
    lines = text.splitlines()
    labels = {match["name"]: at for at, match in enumerate(map(_LABEL.match, lines)) if match}
    instructions = [
        Instruction(at, match["name"], labels.get((match["rest"] or "").strip()) if _branches(match["name"]) else None)
        for at, match in enumerate(map(_INSTRUCTION.match, lines))
        if match
    ]
    return Code(
        resources.get("vgpr_count", 0),
        resources.get("private_segment_fixed_size", 0),
        resources.get("vgpr_spill_count", 0),
        hot_loop(instructions, _HOT.match),
        exponential="v_exp_",
    )


def _branches(name: str) -> bool:
    return name.startswith(("s_cbranch_", "s_branch"))
