"""The op under `torch.func.vmap`: the axis that is mapped over becomes part of the batch axis B.

Every tensor of the op has B first, and nothing is shared along it, so one call serves all samples; a tensor that is
not mapped over is expanded, which for B = 1 is a view. Gradients of it come out for each sample, as vmap wants them.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def folded(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """The vmap rule of one of the op's overloads, as `torch.library.register_vmap` takes it."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        def fold(t: Any, dim: int | None) -> Any:
            if not isinstance(t, Tensor):
                return t
            mapped = t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            return mapped.flatten(0, 1)

        results = op(*map(fold, args, in_dims))
        # An empty dbias, of no bias or one whose gradient is not asked for, has no batch axis.
        return tuple(_unfolded(t, info.batch_size) for t in results), (0,) * len(results)

    return rule


def _unfolded(t: Tensor, size: int) -> Tensor:
    return t.new_empty((size, 0)) if t.dim() == 1 else t.unflatten(0, (size, t.shape[0] // size))
