"""block_mean on CUDA: k -> kbar."""

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from moba_ext import reference

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def offsets(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


def assert_mean(k: torch.Tensor, cu_seqlens: torch.Tensor, block_size: int) -> None:
    kbar = torch.ops.moba.block_mean(k, cu_seqlens, block_size)
    exact = reference.block_mean(k.double(), cu_seqlens, block_size)
    assert kbar.dtype == k.dtype and kbar.shape == exact.shape
    # Half an ulp for the one rounding, and the fp32 sum's share: an ulp of mean |k| per key.
    size = reference.block_mean(k.double().abs(), cu_seqlens, block_size)
    finfo = torch.finfo(k.dtype)
    bound = 0.5 * finfo.eps * exact.abs() + (block_size + 8) * 2**-24 * size + finfo.tiny
    assert ((kbar.double() - exact).abs() <= bound).all()
    again = torch.ops.moba.block_mean(k, cu_seqlens, block_size)
    assert torch.equal(kbar, again), "the sum has one fixed order"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 5, 8, 64, 72, 128, 200, 256])
@pytest.mark.parametrize("block_size", [1, 7, 64, 512])
def test_matches_reference(dtype, head_dim, block_size):
    lengths = [0, 1, block_size - 1, block_size, block_size + 1, 0, 3 * block_size + 2, 0]
    cu_seqlens = offsets(*lengths)
    tokens = sum(lengths)
    options = {"dtype": dtype, "device": "cuda"}
    assert_mean(torch.randn(tokens, 3, head_dim, **options), cu_seqlens, block_size)
    misaligned = torch.randn(tokens, 4, head_dim + 3, **options)[:, 1:3, 3:]
    assert_mean(misaligned, cu_seqlens, block_size)
    head_major = torch.randn(3, tokens, head_dim, **options).transpose(0, 1)
    assert_mean(head_major, cu_seqlens, block_size)


@pytest.mark.parametrize("batch", [254, 255, 256, 5000])
def test_many_sequences(batch):
    lengths = torch.randint(0, 9, (batch,)).tolist()
    k = torch.randn(sum(lengths), 1, 8, device="cuda")
    assert_mean(k, offsets(*lengths), 3)


@pytest.mark.parametrize(("tokens", "launches"), [(32_767, 1), (32_768, 2)])
def test_launches(tokens, launches):
    """Up to 2^20 elements of kbar the kernel finds the blocks by itself."""
    k, cu_seqlens = torch.randn(tokens, 2, 64, device="cuda"), offsets(tokens)
    assert_mean(k, cu_seqlens, 4)
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        torch.ops.moba.block_mean(k, cu_seqlens, 4)
        torch.cuda.synchronize()
    assert sum("moba::cuda" in event.name for event in prof.events()) == launches


def test_no_tokens():
    assert_mean(torch.randn(0, 2, 64, device="cuda"), offsets(0, 0), 16)


@pytest.mark.parametrize(
    "values",
    [[0, 5], [1, 100], [0, 120, 100], [0, -5, 100], [0, 2**31 - 1, 100], [-(2**31), 100]],
)
@pytest.mark.parametrize("empty", [0, 300])  # sequences behind the others
def test_invalid_offsets_give_nan(values, empty):
    k = torch.randn(100, 2, 64, dtype=torch.bfloat16, device="cuda")
    values = values + values[-1:] * empty
    cu_seqlens = torch.tensor(values, dtype=torch.int32, device="cuda")
    assert torch.ops.moba.block_mean(k, cu_seqlens, 16).isnan().all()


def test_neighbouring_sequence_is_not_read():
    k = torch.randn(70, 1, 8, device="cuda")
    k[40:] = torch.nan
    kbar = torch.ops.moba.block_mean(k, offsets(40, 30), 16)
    assert kbar[:2].isfinite().all() and (kbar[2] == 0).all() and kbar[3].isnan().all()


def test_runs_on_the_current_stream():
    k = torch.randn(4096, 4, 64, device="cuda")
    cu_seqlens, stream = offsets(4096), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        k.fill_(2.0)
        kbar = torch.ops.moba.block_mean(k, cu_seqlens, 64)
    stream.synchronize()
    assert (kbar[:64] == 2).all() and (kbar[64:] == 0).all()


def test_offsets_past_2_31():
    block_size, tokens = 4096, 600_000
    k = torch.randn(tokens, 32, 128, dtype=torch.bfloat16, device="cuda")
    assert k.numel() > 2**31
    last = tokens // block_size - 1
    kbar = torch.ops.moba.block_mean(k, offsets(tokens), block_size)[last]
    block = k[last * block_size : (last + 1) * block_size]
    assert torch.allclose(kbar.float(), block.float().mean(0), rtol=2**-8, atol=1e-5)


def test_arguments_are_checked_before_the_launch():
    k, cu_seqlens = torch.randn(64, 2, 64, device="cuda"), offsets(64)
    for bad_k, bad_cu_seqlens, block_size, message in (
        (k[:, 0], cu_seqlens, 16, "k must be .Tk, Hk, D., got 2 dimensions"),
        (k.long(), cu_seqlens, 16, "k must be float32, float16 or bfloat16 on CUDA"),
        (k.transpose(1, 2), cu_seqlens, 16, "k must be contiguous in its last dimension"),
        (k, cu_seqlens.long(), 16, "cu_seqlens_k must be contiguous int32"),
        (k, cu_seqlens.cpu(), 16, "cu_seqlens_k must be on the CUDA device of k"),
        (k, cu_seqlens, 0, "block_size must be at least 1, got 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.moba.block_mean(bad_k, bad_cu_seqlens, block_size)
