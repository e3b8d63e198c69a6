"""The passes around the Hopper kernel for dbias, with that kernel written in torch: what it reads, as it reads it."""

import math

import pytest
import torch
from torch import Tensor

from trifast_inductor.testing import assert_within_budget, eager, random_inputs, results

from .dbias_cases import CHANGES, Given, given, inputs, wholly_filled, wholly_left_out

pytest.importorskip("triton")
from trifast_inductor.kernels.triangle_attention import arguments
from trifast_inductor.kernels.triangle_attention.hopper import dbias_passes as passes

from .dbias_prepared import listed, prepared, terms_of


def rows_summed(g: Given, row_tiles: Tensor, keys: tuple[Tensor, Tensor] | None, summed: Tensor, group: int) -> Tensor:
    """`_triangle_attention_bwd_dbias_hopper` in torch, with parts of other sizes."""
    x = g.x
    B, R, I, H, _ = x.q.shape
    J = x.k.shape[2]
    # Block, warp, lane // 4, (shift, δ), (i, i + 8).
    terms = row_tiles.view(B, R, H, -1, 4, 8, 2, 2).permute(6, 0, 1, 2, 3, 4, 7, 5).reshape(2, B, R, H, -1)
    shift, delta = terms[..., :I, None]
    qk = torch.einsum("brihd,brjhd->brhij", x.q.float(), x.k.float())
    dp = torch.einsum("brihd,brjhd->brhij", x.grad_out.float(), x.v.float())
    if keys is not None:
        tiles, bits = keys
        # Used or not, half, lane % 4, 8, pair.
        tiles_j = bits.shape[1]
        key = tiles.view(B, R, tiles_j, 2, 2, 4, 8, 2)[:, :, :, 0].permute(0, 1, 2, 3, 5, 4, 6).reshape(B, R, -1)
        rows = torch.arange(R, device=bits.device)
        masked = (bits[:, :, rows // 32] >> rows % 32 & 1).transpose(1, 2)  # [B, R, tiles_j]
        masked = masked.bool().repeat_interleave(128, 2)[:, :, None, None, :J]
        key = key[:, :, None, None, :J]
        qk = torch.where(masked, qk + key if x.key_mask is None else qk.fmin(key), qk)
    p = torch.exp2(qk * (x.scale * math.log2(math.e)) - shift)
    listed = torch.zeros((B, H, -(-I // 128), R), dtype=torch.bool, device=p.device)
    for of_tile, (count, *rows) in zip(listed.flatten(0, 2), summed.tolist(), strict=True):
        of_tile[rows[:count]] = True
    # What is not summed is not read: here it would be seen.
    listed = listed.permute(0, 3, 1, 2).repeat_interleave(128, 3)[..., :I, None]
    ds = torch.where(listed, p * (dp - delta), 0.0)
    return torch.stack([part.sum(1) for part in ds.split(group, 1)])


def of_tiles(flags: Tensor) -> Tensor:
    """`[B, H, tiles, R]`: 1 if the last pass walks a tile, 2 if it is uniform besides, and 4 if it is not summed."""
    first, second = flags.unflatten(2, (-1, 2)).unbind(3)
    is_walked, of_all = (first | second) & 1, first & second
    return is_walked * (1 + (of_all >> 1 & 1)) + (of_all & 4)


def dbias(g: Given, group: int = 1000) -> Tensor:
    row_tiles, lists = prepared(g)
    keys = None if g.key is None else (lists.key_tiles, lists.key_bits)
    return finished(g, lists.walked, rows_summed(g, row_tiles, keys, lists.summed, group))


def finished(g: Given, walked: Tensor, parts: Tensor) -> Tensor:
    x = g.x
    tensors = (x.grad_out, x.q, x.k, x.v, x.bias)
    finish = passes.Finish(*tensors, parts.shape[0], arguments.shared(*x.op))
    return finish(*tensors, g.key, *g.statistics, walked, parts)


@pytest.mark.parametrize("key_term", ["none", "additive", "mask", "-inf mask"])
def test_agrees_with_reference(device, key_term):
    x = random_inputs(B=2, R=3, I=130, J=140, D=16, dtype=torch.bfloat16, device=device, key_term=key_term)
    exact, rounded = results(eager, x.to(torch.float64)), results(eager, x)
    assert_within_budget(dbias(given(x), group=2), rounded["dbias"], exact["dbias"], name="dbias")


@pytest.mark.parametrize("change", CHANGES)
def test_special_rows_and_tiles(device, change):
    changed, key_term = CHANGES[change]
    g = given(changed(inputs(device, key_term)))
    torch.testing.assert_close(dbias(g), g.expected, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("key_term", ["additive", "mask"])
def test_key_term_before_the_bias(device, key_term):
    x = inputs(device, key_term, key_term_first=True)
    x = wholly_left_out(x) if key_term == "additive" else wholly_filled(x)
    g = given(x)
    torch.testing.assert_close(dbias(g), g.expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("key_term", ["additive", "mask"])
def test_many_rows_without_a_key(device, key_term):
    """More than are added up at a time, and not a multiple of that."""
    x = inputs(device, key_term, R=8, I=34, J=66)
    (x.key_bias if key_term == "additive" else x.key_mask)[:, 1:] = -1e9 if key_term == "additive" else True
    g = given(x)
    torch.testing.assert_close(dbias(g), g.expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("key_term", ["none", "additive", "mask"])
def test_only_far_queries_and_large_biases_are_walked_again(device, key_term):
    """All others come from the sums over rows alone."""
    x = inputs(device, key_term)
    x.q[:, 1, 2] *= 1e5
    x.bias[..., 100, 130] = 45.0
    g = given(x)
    _, flags = terms_of(g)
    expected = torch.zeros_like(of_tiles(flags))
    expected[:, :, 0, 1] = 1
    assert torch.equal(of_tiles(flags), expected)
    parts = torch.full((2, *x.bias.shape), 0.5, device=device)
    actual = finished(g, listed(flags).walked, parts)
    other = torch.ones_like(x.bias, dtype=torch.bool)
    other[..., 2, :] = False
    other[..., 96:128, 128:] = False
    torch.testing.assert_close(actual[other], x.bias.exp()[other], rtol=1e-5, atol=0)
    torch.testing.assert_close(actual[..., 96:128, 128:], g.expected[..., 96:128, 128:], rtol=1e-3, atol=1e-4)
    added = g.expected_of([1])[..., 2, :]
    torch.testing.assert_close(actual[..., 2, :], x.bias.exp()[..., 2, :] + added, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("key_term", ["additive", "mask"])
def test_bits_tell_which_rows_have_a_key_term(device, key_term):
    """In more rows than a word has bits."""
    x = inputs(device, key_term, R=70, I=1, J=300)
    key = x.key_bias if x.key_mask is None else x.key_mask
    key[...] = 0
    for r, j in ((0, 5), (31, 127), (32, 128), (69, 299), (69, 0)):
        key[:, r, j] = 1
    bits = listed(torch.zeros((1, 2, 2, 70), dtype=torch.int32, device=device), 300, key, x.scale).key_bits
    expected = torch.zeros((1, 3, 3), dtype=torch.int64)
    for tile, r in ((0, 0), (0, 31), (1, 32), (2, 69), (0, 69)):
        expected[:, tile, r // 32] |= 1 << r % 32
    assert torch.equal(bits.cpu(), expected.to(torch.int32))


@pytest.mark.parametrize("R", [1, 5, 1024, 2100])
def test_rows_are_listed_in_order(device, R):
    generator = torch.Generator().manual_seed(0)
    far = torch.randint(0, 3, (2, 1, 3, R), generator=generator, dtype=torch.int32)
    far[1, 0, 1] = 0
    far[0, 0, 2] = 2
    not_summed = torch.rand(far.shape, generator=generator) < 0.5
    not_summed[1, 0, 2] = True

    def one_at_most() -> Tensor:
        """Of two blocks, by a bit each, none or one."""
        return torch.randint(0, 3, far.shape, generator=generator, dtype=torch.int32)

    blocks = torch.zeros((2, *far.shape), dtype=torch.int32)
    walked = torch.where(far > 0, torch.randint(1, 4, far.shape, generator=generator), 0)
    for bit, which in (
        (1, walked),
        (2, torch.where(far == 2, 3, one_at_most())),
        (4, torch.where(not_summed, 3, one_at_most())),
    ):
        for n in range(2):
            blocks[n] += bit * (which >> n & 1).int()
    flags = blocks.movedim(0, 3).flatten(2, 3).contiguous()
    lists = listed(flags.to(device))
    summed, walked = lists.summed.cpu(), lists.walked.cpu()
    for rows, flags in zip(summed, ~not_summed.flatten(0, 2), strict=True):
        assert rows[1 : 1 + rows[0]].tolist() == flags.nonzero()[:, 0].tolist()
    for rows, flags in zip(walked, far.flatten(0, 2), strict=True):
        walked_rows, uniform = rows[:2].tolist()
        assert rows[2 : 2 + walked_rows].tolist() == (flags == 1).nonzero()[:, 0].tolist()
        assert rows.flip(0)[:uniform].tolist() == (flags == 2).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("key_term", ["additive", "mask"])
def test_queries_without_a_gradient_are_not_walked(device, key_term):
    """Three rows without a key: in one no query has a gradient, in one a single query has, in one the sums are NaN."""
    x = inputs(device, key_term, R=4)
    for row in (1, 2, 3):
        if key_term == "additive":
            x.key_bias[:, row] = -1e9
        else:
            x.key_mask[:, row] = True
    x.grad_out[:, 1:] = 0.0
    x.grad_out[0, 2, 129, 1, 3] = 1.0
    g = given(x)
    g.row_sum[0, 3, 0, 5] = float("nan")
    _, flags = terms_of(g)
    expected = torch.zeros_like(of_tiles(flags))
    # Of head 1, the second 128 queries, row 2: all are uniform.
    expected[0, 1, 1, 2] = 2
    expected[0, 0, 0, 3] = 1
    expected[:, :, :, 1:] += 4
    assert torch.equal(of_tiles(flags), expected)
    torch.testing.assert_close(dbias(g), g.expected, rtol=1e-3, atol=1e-4, equal_nan=True)
