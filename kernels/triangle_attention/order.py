"""When programs start, and which works on which row and block.

The grid has one dimension, since CUDA's y and z end at 65535.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

# 32 rows by 16 blocks is about what an H200 holds at once (132 multiprocessors, 3 to 4 programs each). At
# N=1024, D=32 in bf16 such a group reads 4 MB of k and v and 2 MB of bias, over and over, out of 60 MB of L2.
GROUP_R = tl.constexpr(32)


@triton.jit
def after_the_kernel_before(PDL: tl.constexpr):
    """Comes first in a kernel: nothing is read or written before the kernel before has ended.

    With programmatic dependent launch the programs are there by then, and have but to go on. That one is not asked to
    let them start earlier still: they would crowd on the first multiprocessors that have room.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def head_place(head, R, H):
    """(b, r, h) of a head of `[B, R, H]`."""
    return (head // (R * H)).to(tl.int64), (head // H % R).to(tl.int64), (head % H).to(tl.int64)


@triton.jit
def program_place(pid, blocks, R, H):
    """(b, r, h, block) of program `pid`: head outermost, then groups of rows, then blocks, rows innermost.

    Neighbours share a bias tile; the programs of one group share k and v of its rows.
    """
    head = pid // (blocks * R)
    within_head = pid % (blocks * R)
    first_row = within_head // (blocks * GROUP_R) * GROUP_R
    rows = tl.minimum(R - first_row, GROUP_R)
    within_group = within_head % (blocks * GROUP_R)
    r = first_row + within_group % rows
    return (head // H).to(tl.int64), r.to(tl.int64), (head % H).to(tl.int64), within_group // rows
