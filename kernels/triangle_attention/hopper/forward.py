"""Forward for Hopper, in Gluon: warpgroups that share what a loading warp brings, and a softmax without a maximum.

    x = scale·⟨q, k⟩ + bias (⊕ key term), out = Σ_j softmax_j(x) · v

**Fixed shift.** A softmax is the same whatever is subtracted from the logits of a row. Instead of a maximum that
follows the tiles, each row keeps the maximum of its first tile, without the key term (`shifted.py`). Nothing then
depends on the tile before: no maximum, no rescaling, and products stay under way. Later logits may lie above the shift
by the whole range of the dtype. A row where that was not enough, or where all keys lie far below the shift, is seen by
its sum and leaves a row sum of NaN; `again.py` then computes its block in the usual way.

**Sharing.** A program works on ROWS rows r and BLOCKS blocks of queries at a time, a partition of warps for each pair.
One more warp copies k, v and the key terms, used by BLOCKS partitions, and the bias, used by ROWS, through a ring in
shared memory. The bias comes in the order in which accumulators lie in registers (`forward_passes.py`).

Source of the roles: Shah et al. 2024 (FlashAttention-3), section 3.1.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
)

from trifast_inductor.kernels.triangle_attention import arguments, memory
from trifast_inductor.kernels.triangle_attention.hopper import again
from trifast_inductor.kernels.triangle_attention.hopper.choice import Shape, multiprocessors, shape_for
from trifast_inductor.kernels.triangle_attention.hopper.descriptors import CopyingLaunch
from trifast_inductor.kernels.triangle_attention.hopper.forward_passes import Prepare, Prepared
from trifast_inductor.kernels.triangle_attention.hopper.handing import FLAT
from trifast_inductor.kernels.triangle_attention.hopper.items import after, place, tell
from trifast_inductor.kernels.triangle_attention.hopper.ring import advance
from trifast_inductor.kernels.triangle_attention.hopper.shifted import attend_shifted
from trifast_inductor.kernels.triangle_attention.hopper.versions import async_load, barrier


@gluon.jit
def _copy(
    shared,
    ROWS: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    TILES: gl.constexpr,
    BLOCK_I: gl.constexpr,
    BLOCK_J: gl.constexpr,
    D: gl.constexpr,
    HAS_KEY_TERM: gl.constexpr,
):
    """The loading warp: the items of the program, as far ahead of the others as there are stages."""
    (
        q_desc, k_desc, v_desc, words_desc, terms_desc, at_smem, q_smem, k_smem, v_smem, words_smem, terms_smem,
        q_full, q_empty, full, empty, left_out_ptr, R, H, row_groups, groups, stages, items,
    ) = shared  # fmt: skip
    STAGE_J: gl.constexpr = TILES * BLOCK_J
    TERMS: gl.constexpr = 4 * ROWS * STAGE_J if HAS_KEY_TERM else 0
    slot = 0
    phase = 1
    turn = 0
    item = gl.program_id(0)
    b, rows, h, group = place(item, groups, H, row_groups)
    while item < items:
        mbarrier.wait(q_empty, turn & 1 ^ 1)
        tell(at_smem, b, rows, h, group)
        barrier()
        mbarrier.expect(q_full, 2 * ROWS * BLOCKS * BLOCK_I * D)
        for m in gl.static_range(ROWS):
            for n in gl.static_range(BLOCKS):
                q_at = [b, rows * ROWS + m, (group * BLOCKS + n) * BLOCK_I, h, 0]
                async_load(q_desc, q_at, q_full, q_smem.index(m * BLOCKS + n))
        turn += 1
        next_item, next_b, next_rows, next_h, next_group = after(
            item, left_out_ptr, items, groups, H, row_groups, R, ROWS, HAS_KEY_TERM
        )
        # One stage more at the very end, not used: the others read a tile ahead.
        for n_stage in range(stages + (next_item >= items).to(gl.int32)):
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(full.index(slot), 2 * (2 * ROWS * STAGE_J * D + BLOCKS * BLOCK_I * STAGE_J) + TERMS)
            stage = gl.minimum(n_stage, stages - 1)
            for m in gl.static_range(ROWS):
                k_at = [b, rows * ROWS + m, stage * STAGE_J, h, 0]
                async_load(k_desc, k_at, full.index(slot), k_smem.index(slot * ROWS + m))
                async_load(v_desc, k_at, full.index(slot), v_smem.index(slot * ROWS + m))
                if HAS_KEY_TERM:
                    terms_at = [((b * R + rows * ROWS + m) * stages + stage) * STAGE_J]
                    async_load(terms_desc, terms_at, full.index(slot), terms_smem.index(slot * ROWS + m))
            for n in gl.static_range(BLOCKS):
                block = ((b * H + h) * groups + group) * BLOCKS + n
                for tile in gl.static_range(TILES):
                    words_at = [((block * stages + stage) * TILES + tile) * BLOCK_I, 0]
                    into = words_smem.index((slot * BLOCKS + n) * TILES + tile)
                    async_load(words_desc, words_at, full.index(slot), into)
            slot, phase = advance(slot, phase, STAGES)
        item = next_item
        b = next_b
        rows = next_rows
        h = next_h
        group = next_group
    mbarrier.wait(q_empty, turn & 1 ^ 1)
    tell(at_smem, -1, 0, 0, 0)
    barrier()
    mbarrier.arrive(q_full, count=1)


# Compiled once for all lengths.
@gluon.jit(do_not_specialize=["R", "H", "I", "row_groups", "groups", "stages", "items"])
def _triangle_attention_fwd_hopper(
    q_desc,
    k_desc,
    v_desc,
    words_desc,  # of `forward_passes.py`, as are the next three
    terms_desc,
    flags_ptr,
    left_out_ptr,
    out_ptr,  # [B, R, I, H, D] contiguous
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
    R,
    H,
    I,
    row_groups,
    groups,  # of blocks of queries
    stages,  # of keys
    items,
    scale,
    D: gl.constexpr,
    HAS_KEY_TERM: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCKS: gl.constexpr,
    BLOCK_J: gl.constexpr,
    TILES: gl.constexpr,  # of a stage
    STAGES: gl.constexpr,
    SUM_BY_PRODUCT: gl.constexpr,
    REGISTERS: gl.constexpr,
    NUM_WARPS: gl.constexpr,  # of a partition
):
    gl.static_assert(TILES > 1 or STAGES > 2, "a stage is given back a tile after the next one is waited for")
    BLOCK_I: gl.constexpr = 16 * NUM_WARPS
    STAGE_J: gl.constexpr = TILES * BLOCK_J
    COUNT: gl.constexpr = ROWS * BLOCKS
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [COUNT, 1, 1, BLOCK_I, 1, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES * ROWS, 1, 1, STAGE_J, 1, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES * ROWS, 1, 1, STAGE_J, 1, D], v_desc.layout)
    words_smem = gl.allocate_shared_memory(
        gl.int32, [STAGES * BLOCKS * TILES, BLOCK_I, BLOCK_J // 2], words_desc.layout
    )
    terms_smem = q_smem
    if HAS_KEY_TERM:
        terms_smem = gl.allocate_shared_memory(gl.float32, [STAGES * ROWS, STAGE_J], terms_desc.layout)
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(2 * BLOCK_J, 16, rank=2)
    FILLED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [NUM_WARPS, 1], [1, 0])
    ones = gl.allocate_shared_memory(dtype, [8, BLOCK_J], SWIZZLED, gl.full([8, BLOCK_J], 1.0, dtype, FILLED))
    ones = ones.permute((1, 0))
    at_smem = gl.allocate_shared_memory(gl.int32, [4, 1], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(full.index(n), count=1)
        mbarrier.init(empty.index(n), count=COUNT)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=COUNT)
    fence_async_shared()
    barrier()
    to_copy = (
        q_desc, k_desc, v_desc, words_desc, terms_desc, at_smem, q_smem, k_smem, v_smem, words_smem, terms_smem,
        q_full, q_empty, full, empty, left_out_ptr, R, H, row_groups, groups, stages, items,
    )  # fmt: skip
    to_attend = (
        at_smem, q_smem, k_smem, v_smem, words_smem, terms_smem, ones, q_full, q_empty, full, empty,
        flags_ptr, out_ptr, row_max_ptr, row_sum_ptr, R, H, I, stages, scale,
    )  # fmt: skip
    # fmt: off
    if COUNT == 2:
        gl.warp_specialize([
            (attend_shifted, (to_attend, 0, ROWS, BLOCKS, STAGES, TILES, BLOCK_J, D, HAS_KEY_TERM,
                SUM_BY_PRODUCT, NUM_WARPS)),
            (attend_shifted, (to_attend, 1, ROWS, BLOCKS, STAGES, TILES, BLOCK_J, D, HAS_KEY_TERM,
                SUM_BY_PRODUCT, NUM_WARPS)),
            (_copy, (to_copy, ROWS, BLOCKS, STAGES, TILES, BLOCK_I, BLOCK_J, D, HAS_KEY_TERM)),
        ], [NUM_WARPS, 1], [REGISTERS, 32])
    elif COUNT == 3:
        gl.warp_specialize([
            (attend_shifted, (to_attend, 0, ROWS, BLOCKS, STAGES, TILES, BLOCK_J, D, HAS_KEY_TERM,
                SUM_BY_PRODUCT, NUM_WARPS)),
            (attend_shifted, (to_attend, 1, ROWS, BLOCKS, STAGES, TILES, BLOCK_J, D, HAS_KEY_TERM,
                SUM_BY_PRODUCT, NUM_WARPS)),
            (attend_shifted, (to_attend, 2, ROWS, BLOCKS, STAGES, TILES, BLOCK_J, D, HAS_KEY_TERM,
                SUM_BY_PRODUCT, NUM_WARPS)),
            (_copy, (to_copy, ROWS, BLOCKS, STAGES, TILES, BLOCK_I, BLOCK_J, D, HAS_KEY_TERM)),
        ], [NUM_WARPS, NUM_WARPS, 1], [REGISTERS, REGISTERS, 32])
    else:
        gl.warp_specialize([
            (attend_shifted, (to_attend, 0, ROWS, BLOCKS, STAGES, TILES, BLOCK_J, D, HAS_KEY_TERM,
                SUM_BY_PRODUCT, NUM_WARPS)),
            (attend_shifted, (to_attend, 1, ROWS, BLOCKS, STAGES, TILES, BLOCK_J, D, HAS_KEY_TERM,
                SUM_BY_PRODUCT, NUM_WARPS)),
            (attend_shifted, (to_attend, 2, ROWS, BLOCKS, STAGES, TILES, BLOCK_J, D, HAS_KEY_TERM,
                SUM_BY_PRODUCT, NUM_WARPS)),
            (attend_shifted, (to_attend, 3, ROWS, BLOCKS, STAGES, TILES, BLOCK_J, D, HAS_KEY_TERM,
                SUM_BY_PRODUCT, NUM_WARPS)),
            (_copy, (to_copy, ROWS, BLOCKS, STAGES, TILES, BLOCK_I, BLOCK_J, D, HAS_KEY_TERM)),
        ], [NUM_WARPS, NUM_WARPS, NUM_WARPS, 1], [REGISTERS, REGISTERS, REGISTERS, 32])
    # fmt: on


class Plan:
    """What a call launches that `choice.refusal` lets through and that has at least one element.

    The arguments are those of the portable `launch`.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor,
        key_bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        fill: float,
        key_term_first: bool,
        shape: Shape | None = None,
    ) -> None:
        B, R, I, H, D = q.shape
        shape = shape or shape_for(D)
        BLOCK_I, BLOCK_J, STAGE_J = 16 * shape.NUM_WARPS, shape.BLOCK_J, shape.TILES * shape.BLOCK_J
        row_groups, groups = triton.cdiv(R, shape.ROWS), triton.cdiv(I, shape.BLOCKS * BLOCK_I)
        stages = triton.cdiv(k.shape[2], STAGE_J)
        items = B * row_groups * H * groups
        self._shape, self._statistics_shape = (B, R, I, H, D), (B, R, H, I)
        key = arguments.bytes_of_mask(key_bias if key_mask is None else key_mask)
        tiles = (groups * shape.BLOCKS, stages * shape.TILES)
        self._prepare = Prepare(bias, key, scale, tiles, (BLOCK_I, BLOCK_J, STAGE_J))
        given = {
            "R": R,
            "H": H,
            "I": I,
            "row_groups": row_groups,
            "groups": groups,
            "stages": stages,
            "items": items,
            "scale": scale,
            "D": D,
            "HAS_KEY_TERM": key is not None,
            **vars(shape),
        }
        keys = (1, 1, STAGE_J, 1, D)
        boxes = {
            "q_desc": (1, 1, BLOCK_I, 1, D),
            "k_desc": keys,
            "v_desc": keys,
            "words_desc": (BLOCK_I, BLOCK_J // 2),
            "terms_desc": (STAGE_J,),
        }
        programs = min(items, multiprocessors(q.get_device()))
        self._attend = CopyingLaunch(_triangle_attention_fwd_hopper, programs, given, shape.NUM_WARPS, boxes)
        rows = self._prepare.rows(bias)
        self._again = again.Again(q, k, v, rows, key_bias, key_mask, scale, fill, key_term_first, tiles, BLOCK_I)

    def fixed_shift(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Prepared]:
        """The results but for rows for which a fixed shift is no good: their row sum is NaN. And what was prepared."""
        out = memory.empty(self._shape, q.dtype, q)
        row_max = memory.empty(self._statistics_shape, torch.float32, q)
        row_sum = memory.empty(self._statistics_shape, torch.float32, q)
        prepared = self._prepare(bias, key, row_sum)
        words, _, terms, flags, left_out, _ = prepared
        self._attend(q, k, v, words, terms, flags, left_out, out, row_max, row_sum)
        return out, row_max, row_sum, prepared

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, key_bias: Tensor | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the portable `launch`, on the device that is current.

        The row maximum is the shift of a row and the row sum is relative to it: all that the backward asks of them.
        """
        key = arguments.bytes_of_mask(key_bias if key_mask is None else key_mask)
        out, row_max, row_sum, prepared = self.fixed_shift(q, k, v, bias, key)
        self._again(q, k, v, key, prepared, out, row_max, row_sum)
        return out, row_max, row_sum
