"""Backward in plain Triton that recomputes the probabilities, deterministic: nothing is summed by atomics.

    p = exp(x - row_max) / row_sum     dp = ⟨grad_out, v⟩     δ = Σ_d out·grad_out     ds = p·(dp - δ)
    dq = scale·Σ_j ds·k     dk = scale·Σ_i ds·q     dv = Σ_i p·grad_out     dbias = Σ_r ds

dq walks the keys and leaves δ for the others; dk and dv walk the queries; dbias owns a tile of `[i, j]` and
walks the rows. Nothing is added up across programs, but for dbias where its tiles are too few to fill a GPU: groups
of rows are then summed apart and added up, by the last of them or by a kernel (`sums.py`). The price: nine
products where five would do. The kernels are in `portable/`; short sequences take all of them in one launch.

On Hopper one kernel makes five where dbias fits the registers: `portable/whole.py`, up to 64 queries and keys, and
those of `hopper/whole_plan.py`, up to 192. `launch` hands long sequences of 16 bits to the kernels of `lean/`;
`lean/launch.py` says which.

A key term that selects cuts ds off from q and k; from the bias as well, unless the bias came after it.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments, memory, sums, tiling
from trifast_inductor.kernels.triangle_attention.arguments import float32_precision
from trifast_inductor.kernels.triangle_attention.bias import AlignedRows
from trifast_inductor.kernels.triangle_attention.hopper import choice as hopper
from trifast_inductor.kernels.triangle_attention.hopper import whole_choice
from trifast_inductor.kernels.triangle_attention.launching import Launch, on_device_of
from trifast_inductor.kernels.triangle_attention.lean import launch as lean
from trifast_inductor.kernels.triangle_attention.plans import Plans, signature
from trifast_inductor.kernels.triangle_attention.portable import whole
from trifast_inductor.kernels.triangle_attention.portable.dbias import _triangle_attention_bwd_dbias
from trifast_inductor.kernels.triangle_attention.portable.dkdv import _triangle_attention_bwd_dkdv
from trifast_inductor.kernels.triangle_attention.portable.dq import _triangle_attention_bwd_dq
from trifast_inductor.kernels.triangle_attention.portable.together import _triangle_attention_bwd_together
from trifast_inductor.kernels.triangle_attention.replay import Recorder

_Run = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor] | None]  # None where it could not


class _Plan:
    """What `launch` decides from shapes, strides and dtypes alone."""

    def __init__(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        key_bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        fill: float,
        key_term_first: bool,
        needs_dbias: bool,
    ) -> None:
        self.dbias_shape = tuple(bias.shape) if bias is not None and needs_dbias else (0,)
        self.dbias_dtype = q.dtype if bias is None else bias.dtype
        self.is_empty = 0 in (*q.shape[:4], k.shape[2])
        self.elsewhere: _Run | None = None
        self.portable: _Portable | None = None  # once it is asked for
        self.recorder = Recorder()
        given = (grad_out, q, k, v, bias, key_bias, key_mask, scale, fill, key_term_first, needs_dbias)
        if self.is_empty:
            return
        if (planned := plan_elsewhere(*given[:7], fill)) is not None:
            self.elsewhere = planned(*given)


def plan_elsewhere(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    key_mask: Tensor | None,
    fill: float,
) -> Callable[..., _Run | None] | None:
    """What plans such a call, which is not empty, for other kernels; None where those that are planned here take it."""
    if whole.refusal(grad_out, q, k, v, bias) is None:
        return whole.Plan
    if whole_choice.refusal(grad_out, q, k, v, bias, key_bias, key_mask) is None:
        return _planned_on_hopper
    if lean.refusal(grad_out, q, k, v, bias, key_mask, fill) is None:
        return lean.Plan
    return None


def _planned_on_hopper(*given: Any) -> _Run | None:
    from trifast_inductor.kernels.triangle_attention.hopper import whole_plan

    return hopper.attempt(whole_plan.Plan, *given)


class _Portable:
    """The kernels of `portable/` for such shapes, with a bias that they can read."""

    def __init__(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        key_bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        fill: float,
        key_term_first: bool,
        needs_dbias: bool,
    ) -> None:
        B, R, I, H, _ = q.shape
        J = k.shape[2]
        self.terms_shape = (B, R, H, 2, I)
        self.aligned = AlignedRows(bias)
        shared = arguments.shared(q, k, v, self.aligned(bias), key_bias, key_mask, scale, fill, key_term_first)
        shared |= {
            **arguments.strides("do", grad_out, "brihd"),
            "B": B,
            "counts": 0,
            "ALIGNED": arguments.rows_are_aligned(q, k, v, grad_out),
        }
        kind = arguments.kind(shared, q.dtype, q.get_device())
        tiles = {name: tiling.choose(name, **kind) for name in ("dq", "dkdv", "dbias")}
        programs = {
            "dq": B * R * H * triton.cdiv(I, tiles["dq"].BLOCK_I),
            "dkdv": B * R * H * triton.cdiv(J, tiles["dkdv"].BLOCK_J),
            "dbias": 0,
        }
        needs_dbias = needs_dbias and bias is not None
        self.dq: Launch | None = None
        self.dkdv: Launch | None = None
        self.dbias: Launch | None = None
        self.together: Launch | None = None
        self.sum: Launch | None = None
        self.parts_shape: tuple[int, ...] | None = None
        self.counts_shape: tuple[int, ...] | None = None
        may_share = q.dtype != torch.float32 and len({tile.num_warps for tile in tiles.values()}) == 1
        with_dq = may_share and max(I, J) <= tiling.LONGEST_TOGETHER
        after_dq = may_share and needs_dbias and tiling.LONGEST_TOGETHER < max(I, J) <= tiling.LONGEST_AFTER_DQ
        if needs_dbias:
            count = B * H * triton.cdiv(I, tiles["dbias"].BLOCK_I) * triton.cdiv(J, tiles["dbias"].BLOCK_J)
            rows = triton.cdiv(R, tiling.dbias_groups(R, count, beside_others=with_dq or after_dq))
            groups = triton.cdiv(R, rows)
            programs["dbias"] = groups * count
            shared["rows"] = rows
            shared["groups"] = groups
            self.parts_shape = (groups, B, H, I, J) if groups > 1 else None
            if groups > 1 and after_dq and fits_counts(count, programs["dq"]):
                shared["counts"] = count
                self.counts_shape = (count,)
            elif groups > 1:
                self.sum = sums.sum_of(B * H * I * J, groups)

        def given(name: str) -> dict[str, Any]:
            return {**shared, **arguments.evenness(I, J, tiles[name])}

        if with_dq or after_dq:
            of_each = {
                f"{name.upper()}_{key}": n for name in tiles for key, n in {**vars(tiles[name]), **given(name)}.items()
            }
            shared |= {f"programs_{name}": count for name, count in programs.items()}
            values = {"rows": 1, "groups": 1, **shared, **of_each, "NEEDS_DBIAS": needs_dbias, "WITH_DQ": with_dq}
            count = sum(programs.values()) - (0 if with_dq else programs["dq"])
            self.together = Launch(_triangle_attention_bwd_together, count, values, tiles["dkdv"])
        if not with_dq:
            self.dq = Launch(_triangle_attention_bwd_dq, programs["dq"], given("dq"), tiles["dq"])
        if not (with_dq or after_dq):
            self.dkdv = Launch(_triangle_attention_bwd_dkdv, programs["dkdv"], given("dkdv"), tiles["dkdv"])
            if needs_dbias:
                self.dbias = Launch(_triangle_attention_bwd_dbias, programs["dbias"], given("dbias"), tiles["dbias"])


def fits_counts(count: int, programs: int) -> bool:
    """Whether programs of dq, one each, can leave the zeros with which whoever ends last finds that it does."""
    return count <= programs


_plans: Plans[_Plan] = Plans()


def _planned(*given: Any) -> _Plan:
    *tensors, scale, fill, key_term_first, needs_dbias = given
    key = (signature(*tensors), scale, fill, key_term_first, needs_dbias, float32_precision(tensors[1].dtype))
    return _plans.of(key, tensors[1], _Plan, given)


def launch(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    scale: float,
    fill: float,
    key_term_first: bool,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes and dtype of q, k, v, and dbias in those of bias, all contiguous.

    Takes what `op.py` has checked, in any strides. dbias is empty unless there is a bias and it is asked for.
    Two runs on the same inputs agree to the bit.
    """
    out, row_max, row_sum = map(arguments.dense, (out, row_max, row_sum))
    given = (grad_out, q, k, v, bias, key_bias, key_mask, scale, fill, key_term_first, needs_dbias)
    tensors = (*given[:7], out, row_max, row_sum)
    numbers = (*given[7:], float32_precision(q.dtype))
    known = _plans.programs.run(tensors, numbers)
    if known is None:
        plan = _planned(*given)
        known = _plans.programs.record(
            plan.recorder, lambda: _launch(plan, *given, out=out, row_max=row_max, row_sum=row_sum), tensors, numbers
        )
    dq, dk, dv, dbias = known
    return dq, dk, dv, dbias


def _launch(
    plan: _Plan, *given: Any, out: Tensor, row_max: Tensor, row_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if plan.elsewhere is not None:
        grad_out, q, k, v, bias, key_bias, key_mask, *_ = given
        key = key_bias if key_mask is None else key_mask
        with on_device_of(q):
            gradients = plan.elsewhere(grad_out, q, k, v, bias, key, out, row_max, row_sum)
        if gradients is not None:
            return gradients
    return _run(plan, *given, out=out, row_max=row_max, row_sum=row_sum)


def portable(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    scale: float,
    fill: float,
    key_term_first: bool,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `launch`, by the kernels of `portable/` whatever the device."""
    given = (grad_out, q, k, v, bias, key_bias, key_mask, scale, fill, key_term_first, needs_dbias)
    out, row_max, row_sum = map(arguments.dense, (out, row_max, row_sum))
    return _run(_planned(*given), *given, out=out, row_max=row_max, row_sum=row_sum)


def _run(
    plan: _Plan, *given: Any, out: Tensor, row_max: Tensor, row_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_out, q, k, v, bias, key_bias, key_mask, *_ = given
    with on_device_of(q):
        dq, dk, dv = (memory.empty(t.shape, q.dtype, q) for t in (q, k, v))
        dbias = memory.empty(plan.dbias_shape, plan.dbias_dtype, q)
        if plan.is_empty:
            return dq.zero_(), dk.zero_(), dv.zero_(), dbias.zero_()
        if plan.portable is None:
            plan.portable = _Portable(*given)
        run = plan.portable
        read = (q, k, v, run.aligned(bias), key_bias if key_mask is None else key_mask, grad_out)
        sums_of_ds = dbias if run.parts_shape is None else memory.empty(run.parts_shape, torch.float32, q)
        counts = None if run.counts_shape is None else memory.empty(run.counts_shape, torch.int32, q)
        terms = None
        if run.dq is not None:
            terms = memory.empty(run.terms_shape, torch.float32, q)
            run.dq(*read, out, row_max, row_sum, terms, dq, counts)
        if run.together is not None:
            run.together(*read, out, row_max, row_sum, terms, dq, dk, dv, sums_of_ds, dbias, counts)
        if run.dkdv is not None:
            run.dkdv(*read, row_max, terms, dk, dv)
        if run.dbias is not None:
            run.dbias(*read, row_max, terms, sums_of_ds)
        if run.sum is not None:
            run.sum(sums_of_ds, dbias)
    return dq, dk, dv, dbias
