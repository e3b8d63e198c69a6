"""One row of static figures for each kernel of a variant: a dtype, head size, key term, with or without bias."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from trifast_inductor.static import amdgcn, sass
from trifast_inductor.static.recording import Launch, launches_for
from trifast_inductor.static.targets import TARGETS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}
KEY_TERMS = ("none", "add", "select")
HEADS = 4


@dataclass(frozen=True)
class Variant:
    """What decides how a kernel is compiled. dtype "tf32" is float32 with tf32 products."""

    dtype: str
    D: int
    key_term: str
    bias: bool
    N: int = 512


@dataclass(frozen=True)
class Figures:
    """A row of the table. `instructions_per_score` is None where a kernel has no tile of scores."""

    triton: str  # major.minor: another compiler makes other code
    arch: str  # one of `TARGETS`
    kernel: str
    dtype: str
    D: int
    N: int
    key_term: str
    bias: bool
    tile: str
    registers: int
    stack_bytes: int
    spills: int
    shared_kib: float
    instructions_per_score: float | None

    @property
    def key(self) -> tuple[object, ...]:
        return (self.triton, self.arch, self.kernel, self.dtype, self.D, self.N, self.key_term, self.bias)

    @property
    def fits(self) -> bool:
        return self.shared_kib <= TARGETS[self.arch].shared_kib


def figures(variant: Variant, arch: str) -> list[Figures]:
    """Compile the forward's and the backward's kernels; some seconds, less where Triton has them cached."""
    with launches_for(arch) as launches, _precision(variant.dtype):
        _launch(variant)
    return [_figures_of(launch, variant) for launch in launches]


def triton_version() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def _figures_of(launch: Launch, variant: Variant) -> Figures:
    asm, metadata = launch.compiled.asm, launch.compiled.metadata
    code = sass.disassemble(asm["cubin"]) if "cubin" in asm else amdgcn.parse(asm["amdgcn"])
    # A kernel without blocks of both kinds, such as one that prepares an input, has no scores: 0.
    blocks = [int(launch.constants.get(name, 0)) for name in ("BLOCK_I", "BLOCK_J")]
    per_score = None
    if code.hot_loop and all(blocks):
        a_thread = blocks[0] * blocks[1] / (launch.target.threads * metadata.num_warps)
        # A loop may hold several tiles: each score costs one exponential.
        tiles = max(1, round(code.exponentials / a_thread))
        per_score = round(len(code.hot_loop) / (a_thread * tiles), 2)
    return Figures(
        triton=triton_version(),
        arch=launch.target.name,
        kernel=launch.name,
        dtype=variant.dtype,
        D=variant.D,
        N=variant.N,
        key_term=variant.key_term,
        bias=variant.bias,
        tile=f"{'x'.join(str(n) for n in blocks if n)} w{metadata.num_warps} s{metadata.num_stages}",
        registers=code.registers,
        stack_bytes=code.stack,
        spills=code.spills,
        shared_kib=round(metadata.shared / 1024, 1),
        instructions_per_score=per_score,
    )


def _launch(variant: Variant) -> None:
    """Forward and backward on memory that is never touched."""
    from trifast_inductor.kernels.triangle_attention import backward, forward

    N, D = variant.N, variant.D
    dtype = DTYPES[variant.dtype]

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    q, k, v, grad_out = (tensor(1, N, N, HEADS, D) for _ in range(4))
    bias = tensor(1, HEADS, N, N) if variant.bias else None
    key_bias = tensor(1, N, N) if variant.key_term == "add" else None
    key_mask = tensor(1, N, N, dtype=torch.bool) if variant.key_term == "select" else None
    terms = (q, k, v, bias, key_bias, key_mask)
    constants = (D**-0.5, -1e9, False)
    results = forward.launch(*terms, *constants)
    backward.launch(grad_out, *terms, *results, *constants, variant.bias)


@contextmanager
def _precision(dtype: str) -> Iterator[None]:
    present = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = present
