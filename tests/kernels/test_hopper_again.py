"""What surrounds the Hopper forward in plain Triton: what is prepared for it, and the blocks computed again."""

from dataclasses import replace

import pytest
import torch

from trifast_inductor.kernels.triangle_attention import reference
from trifast_inductor.testing import Inputs, assert_within_budget, eager, random_inputs

pytest.importorskip("triton")
from trifast_inductor.kernels.triangle_attention.hopper import again
from trifast_inductor.kernels.triangle_attention.hopper.forward_passes import Prepare


def compute_again(x: Inputs, out: torch.Tensor, row_max: torch.Tensor, row_sum: torch.Tensor) -> None:
    I, J = x.bias.shape[2:]
    tiles = (-(-I // 64), -(-J // 64))
    key = x.key_bias if x.key_mask is None else x.key_mask.view(torch.uint8)
    prepared = Prepare(x.bias, key, x.scale, tiles, (64, 64, 64))(x.bias, key, row_sum)
    run = again.Again(*replace(x, bias=prepared.rows).op, tiles, 64)
    run(x.q, x.k, x.v, key, prepared, out, row_max, row_sum)


@pytest.mark.parametrize("heads_last", [False, True], ids=["bias of rows", "bias of heads"])
@pytest.mark.parametrize("key_term", ["additive", "mask"])
def test_only_blocks_with_a_nan_are_computed_again(device, key_term, heads_last):
    x = random_inputs(R=2, I=330, J=70, H=2, D=16, dtype=torch.bfloat16, device=device, key_term=key_term)
    if heads_last:
        x = replace(x, bias=x.bias.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
    out = torch.full((1, 2, 330, 2, 16), 7.0, dtype=torch.bfloat16, device=device)
    row_max = torch.full((1, 2, 2, 330), 7.0, device=device)
    row_sum = row_max.clone()
    done = torch.zeros(row_sum.shape, dtype=torch.bool)
    row_sum[0, 0, 1, 100] = row_sum[0, 1, 0, 255] = row_sum[0, 1, 0, 329] = float("nan")
    done[0, 0, 1, 64:128] = done[0, 1, 0, 192:256] = done[0, 1, 0, 320:] = True
    compute_again(x, out, row_max, row_sum)

    exact = reference.forward(*x.to(torch.float64).op)
    rows = done.transpose(2, 3)
    assert_within_budget(out[rows], eager(*x.op)[rows], exact[0][rows])
    torch.testing.assert_close(row_max[done].double(), exact[1][done], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(row_sum[done].double(), exact[2][done], rtol=1e-4, atol=0)
    for tensor, kept in ((out, ~rows), (row_max, ~done), (row_sum, ~done)):
        assert (tensor[kept] == 7).all()


@pytest.mark.parametrize("key_term_first", [False, True])
@pytest.mark.parametrize("key_term", ["additive", "mask"])
@pytest.mark.parametrize("special", ["none", "large bias", "NaN in the bias", "large k", "one key seen", "small term"])
def test_rows_without_a_key(device, special, key_term, key_term_first):
    """As eager has them: uniform where every logit is lost beside the term, and not where one is not."""
    I = 270 if special == "large bias" else 70  # two groups of blocks
    x = random_inputs(
        R=2,
        I=I,
        J=70,
        H=2,
        D=16,
        dtype=torch.bfloat16,
        device=device,
        key_term=key_term,
        key_term_first=key_term_first,
    )
    value = -300.0 if special == "small term" else -1e9
    if x.key_mask is None:
        x.key_bias[:] = value
    else:
        x.key_mask[:] = True
        x = replace(x, fill=value)
    if special == "large bias":
        x.bias[..., [130, 258], 5] = 3e8
    elif special == "NaN in the bias":
        x.bias[..., 3, 5] = float("nan")
    elif special == "large k":
        x.k[:, :, 5] = 1e4
    elif special == "one key seen":
        (x.key_bias if x.key_mask is None else x.key_mask)[..., 66] = 0
    out = torch.full((1, 2, I, 2, 16), 7.0, dtype=torch.bfloat16, device=device)
    row_max = torch.full((1, 2, 2, I), 7.0, device=device)
    row_sum = torch.full_like(row_max, float("nan"))
    compute_again(x, out, row_max, row_sum)

    of_reference = reference.forward(*x.to(torch.float32).op)
    torch.testing.assert_close(out.float(), of_reference[0], rtol=2e-2, atol=2e-2, equal_nan=True)
    torch.testing.assert_close(row_sum, of_reference[2], rtol=1e-4, atol=1e-4, equal_nan=True)
    is_number = row_sum == row_sum
    torch.testing.assert_close(row_max[is_number], of_reference[1][is_number], rtol=1e-4, atol=1e-4)


def _unpacked(words: torch.Tensor, dtype: torch.dtype, heads: int, tiles_i: int, tiles_j: int) -> torch.Tensor:
    """`[heads, I, J]` in float32 as the kernel reads it, of tiles of 64 by 64."""
    words = words.view(heads, tiles_i, tiles_j, 4, 4, 8, 4, 2, 2)  # 16 columns, warp, lane, rows 8 apart, two columns
    if dtype == torch.bfloat16:
        high, low = words.view(torch.float32), (words << 16).view(torch.float32)
    else:
        high = (words >> 16).to(torch.int16).view(torch.float16).float()
        low = words.to(torch.int16).view(torch.float16).float()
    x = torch.stack([high, low], -1).permute(0, 1, 4, 7, 5, 2, 3, 9, 6, 8)
    return x.reshape(heads, 64 * tiles_i, 64 * tiles_j)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_words_hold_the_bias_over_the_scale(device, dtype):
    given = 3 * torch.randn((1, 2, 70, 150), generator=torch.Generator().manual_seed(0))
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), float("-inf"), 3e38, -3e38])
    given[0, 0, 0, :7] = special
    given[0, 0, 1, 8:15] = special  # in the other half of a word
    given = given.to(dtype).to(device)
    scale = 32**-0.5
    words, sizes, *_ = Prepare(given, None, scale, (2, 4), (64, 64, 128))(given, None, given)
    x = _unpacked(words, dtype, 2, 2, 4).cpu()
    assert sizes[0, 0, 0, 0] == float("inf")
    assert sizes[0, 1, 1, 1] == given[0, 1, 64:, 64:128].abs().max()
    assert (sizes[..., 3] == 0).all()

    wanted = given[0].float().cpu() / scale
    close = wanted.abs() < 1e38
    error = (x[:, :70, :150] - wanted).abs()[close]
    # Rounded once, whichever half of a word it is in.
    assert (error <= torch.finfo(dtype).eps / 2 * wanted[close].abs() + 1e-7).all()
    for specials in (x[0, 0, :7], x[0, 1, 8:15]):
        assert specials[2].isnan()
        assert specials[[3, 5]].min() > 3.2e38
        assert specials[[4, 6]].max() < -3.2e38
    # A key past the end has no weight; a word must not turn it into a NaN.
    assert x[:, :70, 150:].max() < -3.2e38


@pytest.mark.parametrize("select", [False, True], ids=["additive", "mask"])
def test_key_terms_are_padded_and_flagged(device, select):
    key = torch.zeros(2, 3, 150, dtype=torch.uint8 if select else torch.bfloat16)
    key[0, 1, 7] = key[1, 2, 64] = key[1, 2, 149] = 1 if select else -3.0
    key = key.mT.contiguous().mT.to(device)
    bias = torch.zeros(2, 1, 1, 150, dtype=torch.bfloat16, device=device)
    row_sum = torch.ones(2, 3, 1, 1, device=device)
    _, _, terms, flags, left_out, _ = Prepare(bias, key, 0.25, (1, 3), (64, 64, 64))(bias, key, row_sum)
    expected = torch.zeros(2, 3, 192)
    expected[0, 1, 7] = expected[1, 2, 64] = expected[1, 2, 149] = float("-inf") if select else -12.0
    assert torch.equal(terms.cpu().view(2, 3, 192), expected)
    assert flags[:-1].view(2, 3, 3).nonzero().tolist() == [[0, 1, 0], [1, 2, 1], [1, 2, 2]]
    assert (left_out == 0).all()
    assert (row_sum == 1).all()


@pytest.mark.parametrize("value", ["mask", -1e9, float("-inf"), -9000.0])
def test_rows_with_no_key_left_are_told_of(device, value):
    """In which all keys are left out, or as good as that; more than eight stages of them."""
    select = value == "mask"
    key = torch.zeros(2, 3, 600, dtype=torch.uint8 if select else torch.bfloat16)
    key[0, 1] = key[1, 0] = key[1, 2] = 1 if select else value
    key[1, 2, 599] = 0
    key = key.to(device)
    bias = torch.zeros(2, 2, 260, 600, dtype=torch.bfloat16, device=device)
    row_sum = torch.ones(2, 3, 2, 260, device=device)
    left_out = Prepare(bias, key, 0.25, (3, 5), (128, 128, 64))(bias, key, row_sum).left_out
    expected = torch.tensor([[0, 1, 0], [1, 0, 0]]) if value != -9000.0 else torch.zeros(2, 3, dtype=torch.int64)
    assert left_out.view(2, 3).tolist() == expected.tolist()
    assert torch.equal(row_sum.isnan(), (expected != 0)[:, :, None, None].expand_as(row_sum).to(device))
    assert (row_sum[~row_sum.isnan()] == 1).all()


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("has_key_term", [False, True])
def test_rows_are_the_bias_itself_where_it_can_be_read(device, aligned, has_key_term):
    bias = torch.randn(1, 2, 3, 1104 if aligned else 1100, device=device).bfloat16()
    key = torch.zeros(1, 3, bias.shape[3], dtype=torch.uint8, device=device) if has_key_term else None
    tiles = (1, -(-bias.shape[3] // 64))
    rows = Prepare(bias, key, 1.0, tiles, (64, 64, 64))(bias, key, torch.ones(1, 3, 2, 3, device=device)).rows
    assert (rows is bias) == aligned
    assert rows.shape == (1, 2, 3, 1104)
    assert torch.equal(rows[..., : bias.shape[3]], bias)
    assert (rows[..., bias.shape[3] :] == 0).all()
