"""Which program works on which row and block: a one-dimensional grid, since CUDA's y and z end at 65535."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

# 32 rows by 16 blocks is about what an H200 holds at once (132 multiprocessors, 3 to 4 programs each). At
# N=1024, D=32 in bf16 such a group reads 4 MB of k and v and 2 MB of bias, over and over, out of 60 MB of L2.
GROUP_R = tl.constexpr(32)


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
