"""attend: one partial per (query, block). With topk = 1 a call is one partial, the own block's."""

import pytest
import torch
from numerics import Case, assert_within_budget, check_against_reference, run_op, self_attention

from moba_ext import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 5, 16, 63, 64, 65, 130])
def test_own_block_alone(dtype, block_size, poisoned):
    check_against_reference(self_attention([0, 1, 64, 70], 2, 2, 64, block_size, 1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 16, 24, 72, 96, 128, 192, 256])
def test_head_dims(dtype, head_dim, poisoned):
    check_against_reference(self_attention([150, 70], 2, 1, head_dim, 48, 2), dtype)


@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 1100), (128, 600), (256, 300)])
def test_blocks_of_several_chunks(head_dim, block_size, poisoned):
    # K and V are packed 512, 256 and 128 keys at a time at these head_dims.
    check_against_reference(
        self_attention(2 * block_size + 77, 1, 1, head_dim, block_size, 2), torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [3e4, 1e5, 1e9])
def test_large_scores(dtype, size):
    """Weights are at most 1 however coarse the scores' rounding is (scale is no power of two)."""
    case = self_attention(70, 2, 1, 128, 16, 5)
    q, k, v = case.tensors(torch.float32)
    q, k, v = (q * size).to(dtype), (k * size).to(dtype), v.to(dtype)
    out, lse, _ = run_op(case, q, k, v)
    assert out.isfinite().all() and lse.isfinite().all()
    assert out.abs().max() <= v.abs().max()
    _, exact = reference.masked_attention(
        *(x.double() for x in (q, k, v)),
        reference.block_mask(run_op(case, q, k, v)[2], *case.cu_seqlens(), case.block_size),
        *(*case.cu_seqlens(), case.block_size, case.head_dim**-0.5),
    )
    assert ((lse - exact) / exact).abs().max() < 1e-5


def test_a_query_group_of_every_size():
    # 1 to 50 rows per block: every width of a row tile, with and without idle lanes.
    for queries in range(1, 51):
        check_against_reference(Case([queries], [queries + 30], 1, 1, 8, 16, 2), torch.float16)


def test_reference_attend_is_masked_softmax():
    case = self_attention([30, 0, 7], 4, 2, 8, 4, 3)
    q, k, v = case.tensors(torch.float64)
    _, _, ids = run_op(case, q.float(), k.float(), v.float())
    cu_seqlens = case.cu_seqlens()[0]
    out, lse = reference.attend(q, k, v, ids, cu_seqlens, cu_seqlens, 4, 0.3)
    mask = torch.zeros(37, 4, 8, dtype=torch.bool)
    own = torch.cat([torch.arange(30), torch.arange(7)]) // 4
    mask[torch.arange(37), :, own] = True
    wanted, wanted_lse = reference.masked_attention(q, k, v, mask, cu_seqlens, cu_seqlens, 4, 0.3)
    assert_within_budget(out[:, :, -1], wanted, wanted)
    assert_within_budget(lse[:, :, -1].T, wanted_lse, wanted_lse)


@pytest.mark.parametrize("scale", [1e-3, 0.5, -1.0, 30.0])
def test_extreme_scores(scale, poisoned):
    check_against_reference(
        self_attention(260, 2, 1, 32, 32, 3), torch.float32, softmax_scale=scale
    )
