"""block_mean: k -> kbar."""

import pytest
import torch
from numerics import assert_within_budget, self_attention

from moba_ext import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 24, 64, 128, 200, 256])
def test_matches_reference(dtype, head_dim, poisoned):
    case = self_attention([0, 1, 31, 32, 33, 150, 0, 4], 2, 2, head_dim, 32, 1)
    _, k, _ = case.tensors(dtype)
    cu_seqlens = case.cu_seqlens()[1]
    kbar = torch.ops.moba.block_mean(k, cu_seqlens, 32)
    assert kbar.dtype == dtype
    exact = reference.block_mean(k.double(), cu_seqlens, 32)
    assert_within_budget(kbar, exact, reference.block_mean(k, cu_seqlens, 32), "kbar")
    assert torch.equal(kbar == 0, exact.to(dtype) == 0), "tail and unused rows must be zero"


@pytest.mark.parametrize("block_size", [1, 7, 64, 65, 1000, 4096])
def test_error_does_not_grow_with_block_size(block_size):
    # A mean far from zero is the hard case for a running sum.
    k = torch.randn(4096 * 2, 1, 16) + 100
    cu_seqlens = torch.tensor([0, k.shape[0]], dtype=torch.int32)
    kbar = torch.ops.moba.block_mean(k, cu_seqlens, block_size)
    exact = reference.block_mean(k.double(), cu_seqlens, block_size)
    # 64 keys in a run, up to 64 runs: at most 128 roundings, each of half an ulp of 100.
    assert (kbar.double() - exact).abs().max() < 128 * 0.5 * 2**-17
    assert_within_budget(kbar, exact, reference.block_mean(k, cu_seqlens, block_size))


def test_reads_strided_keys():
    packed = torch.randn(100, 3, 2, 16)  # q, k, v side by side
    k = packed[:, 1]
    cu_seqlens = torch.tensor([0, 60, 100], dtype=torch.int32)
    assert torch.equal(
        torch.ops.moba.block_mean(k, cu_seqlens, 16),
        torch.ops.moba.block_mean(k.contiguous(), cu_seqlens, 16),
    )


def test_neighbouring_sequence_is_not_read():
    k = torch.randn(70, 1, 8)
    k[40:] = torch.nan
    kbar = torch.ops.moba.block_mean(k, torch.tensor([0, 40, 70], dtype=torch.int32), 16)
    assert kbar[:2].isfinite().all() and bool((kbar[2] == 0).all()) and kbar[3].isnan().all()
