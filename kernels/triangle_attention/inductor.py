"""How code that Inductor generates calls the op on a GPU: the function itself, not through torch's dispatcher.

The dispatcher turns thirteen arguments into its own kinds and back: 13 us a call of 52 (host of an H200, torch 2.11),
for a choice that was made when the graph was compiled. The op's name stays in the generated code.
"""

import functools
import logging
from typing import Any

import torch
from torch._inductor import ir, lowering
from torch._inductor.virtualized import V
from torch.utils import _pytree as pytree

from trifast_inductor.kernels.triangle_attention import op

log = logging.getLogger(__name__)
_OPS = (op.triangle_attention_forward, op.triangle_attention_backward)


class _AtOnce(ir.FallbackKernel):  # type: ignore[misc]
    """A call of an op, written as a call of the function that serves it."""

    def get_kernel_name(self) -> str:
        name: str = super().get_kernel_name()
        return f"{name}.at_once" if serves(self.get_device()) and not V.graph.cpp_wrapper else name


def serves(device: torch.device | None) -> bool:
    """Whether the function is called itself; on a CPU it calls ops of torch, which may want to know of autograd."""
    return device is not None and device.type == "cuda"


def _lowering(target: torch._ops.OpOverload) -> Any:
    def lowered(*args: Any, **kwargs: Any) -> Any:
        results = _AtOnce.create(target, *args, **kwargs)
        return pytree.tree_map(lambda x: ir.TensorBox.create(x) if isinstance(x, ir.IRNode) else x, results)

    return lowered


@functools.cache
def install() -> None:
    """From now on graphs are lowered so, in this process; where torch does it otherwise than here, through the op."""
    try:
        for target in _OPS:
            if target not in lowering.lowerings:
                lowering.make_fallback(target, warn=False)  # its arguments are realised first
            lowering.register_lowering(target, type_promotion_kind=None)(_lowering(target))
    except Exception as error:
        log.info("calls of the op go through torch's dispatcher: %s", error)
