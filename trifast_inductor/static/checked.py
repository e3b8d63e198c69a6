"""The selection of kernels whose figures are kept in `docs/benchmarks/static.csv`, and what may change there."""

from __future__ import annotations

from trifast_inductor.static.figures import Figures, Variant, triton_version
from trifast_inductor.static.targets import TARGETS

# Patches of one Triton version reorder instructions; a kernel that truly grew shows by more than this.
INSTRUCTIONS_TOLERANCE = 1.03
REGISTERS_TOLERANCE = 8
SHARED_TOLERANCE_KIB = 1.0

# The lean ones are capped so that three or four programs fit a multiprocessor: dbias 0.383 ms, without the cap 0.486
# (H200, N=512, D=32); what is spilled is what their second loops read, once a program. The other one spills two numbers
# without a bias, once a program too.
SPILLING = frozenset(
    {*(f"triangle_attention_bwd_{name}_lean" for name in ("dq", "dkdv", "dbias")), "triangle_attention_bwd_whole"}
)


def checked_variants() -> list[tuple[Variant, str]]:
    """A dozen seconds' worth: the usual shape on every architecture, short ones on two, each other choice on sm_90."""
    usual = Variant("bfloat16", 32, "add", bias=True)
    others = [
        Variant("bfloat16", 32, "select", bias=True),
        Variant("bfloat16", 32, "none", bias=True),
        Variant("bfloat16", 64, "add", bias=True),
        Variant("bfloat16", 128, "add", bias=True),
        Variant("float32", 32, "add", bias=True),
    ]
    short = [Variant("bfloat16", 32, "add", bias=True, N=N) for N in (64, 128)]
    # Triton 3.6 fails on the dbias kernel for gfx942, in TritonAMDGPUConvertToBufferOps; 3.9 does not.
    everywhere = [arch for arch in TARGETS if (arch, triton_version()) != ("gfx942", "3.6")]
    return [
        *((usual, arch) for arch in everywhere),
        *((variant, "sm_90") for variant in others),
        *((variant, arch) for variant in short for arch in ("sm_80", "sm_90")),  # Hopper has a kernel of its own
    ]


def faults(now: Figures, before: Figures) -> list[str]:
    """What got worse, in words; a kernel that shrank is no fault."""
    found = []
    if now.spills > before.spills:
        found.append(f"spills {now.spills} times, {before.spills} before")
    if not now.fits:
        found.append(f"takes {now.shared_kib:g} KiB of shared memory, more than {now.arch} has")
    if now.registers > before.registers + REGISTERS_TOLERANCE:
        found.append(f"{now.registers} registers, {before.registers} before")
    if now.shared_kib > before.shared_kib + SHARED_TOLERANCE_KIB:
        found.append(f"{now.shared_kib:g} KiB of shared memory, {before.shared_kib:g} before")
    limit = (before.instructions_per_score or 0.0) * INSTRUCTIONS_TOLERANCE
    if now.instructions_per_score is None and before.instructions_per_score is not None:
        found.append("its hot loop was not found")
    elif limit and (now.instructions_per_score or 0.0) > limit:
        found.append(f"{now.instructions_per_score} instructions a score, {before.instructions_per_score} before")
    return found
