"""Gluon kernels compiled for sm_90, which need not be there, and what ptxas says of them.

A test hands `said` a program that calls `report`: in a process of its own nothing is interpreted or compiled before.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_CHECKOUT = Path(__file__).parents[2]


def desc(kind: str, box: list[int]) -> str:
    """The type of a parameter that is a tensor of this kind, copied box by box."""
    from triton.experimental.gluon import language as gl

    dtype = {"bf16": gl.bfloat16, "fp32": gl.float32, "i32": gl.int32}[kind]
    return f"tensordesc<{kind}{box},{gl.NVMMASharedLayout.get_default_for(box, dtype)!r}>"


def report(kernel: Any, types: dict[str, str], constants: dict[str, Any], num_warps: int = 4) -> None:
    """Prints the shared memory that is left, what ptxas says, and of how many instructions, 16 bytes each, it is.

    Args:
        types: of its parameters, by name; 32-bit integers need none.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.experimental.gluon._runtime import GluonASTSource

    from trifast_inductor.kernels.triangle_attention.hopper import choice

    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(kernel.arg_names) if "ptr" in name}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    # A version that any ptxas knows; the one of a cached compile may be of another.
    options = {"num_warps": num_warps, "ptx_version": 86}
    source = GluonASTSource(kernel, signature, values, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print("shared memory left:", choice.SHARED_MEMORY - compiled.metadata.shared, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        command = [get_ptxas(90).path, "-v", "--gpu-name", "sm_90a", ptx, "-o", cubin]
        subprocess.run(command, check=True, stderr=sys.stdout)
        command = [knobs.nvidia.cuobjdump.path, "--dump-sass", cubin]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print("instructions:", len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)))


def said(program: str, *arguments: str) -> str:
    """What the program prints; it has to end well."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=_CHECKOUT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
