"""The op on CUDA tensors: the reference over our block_mean, reached by the same calls."""

import pytest
import torch
from numerics import Case, assert_within_budget, gradients, run_masked, self_attention

import moba_ext

pytestmark = pytest.mark.gpu

CASES = [
    self_attention([300, 1, 64], 4, 2, 64, 32, 3),
    Case([20, 0, 90], [60, 7, 90], 2, 2, 128, 16, 4),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case, dtype):
    inputs = [x.cuda().requires_grad_() for x in case.tensors(dtype)]
    cu_seqlens = [x.cuda() for x in case.cu_seqlens()]
    sizes = (case.max_seqlen_q, case.max_seqlen_k, case.block_size, case.topk)
    out, lse, ids = torch.ops.moba.attention(*inputs, *cu_seqlens, *sizes)
    assert out.is_cuda and out.dtype == dtype and lse.dtype == torch.float32
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    grads = gradients(out, lse, inputs, dout, dlse)
    results = []
    for precision in (torch.float64, dtype):
        again = [x.detach().cpu().to(precision).requires_grad_() for x in inputs]
        values = run_masked(case, *again, ids.cpu())
        results.append((*values, *gradients(*values, again, dout.cpu(), dlse.cpu())))
    for name, got, exact, plain in zip(
        ("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), *results
    ):
        assert_within_budget(got.detach().cpu(), exact.detach(), plain.detach(), name)


def test_public_function_warns_that_it_is_slow():
    q = torch.randn(1, 100, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    moba_ext.attention._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="taken only when named"):
        out = moba_ext.moba_attention(q, q, q, block_size=16, topk=3)
    out.sum().backward()
    assert q.grad.isfinite().all()
    chosen = moba_ext.select_blocks(q[0], q[0], block_size=16, topk=3)
    assert chosen.block_ids.is_cuda and chosen.block_ids.shape == (100, 2, 2)


def test_second_device_and_side_stream():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    q = torch.randn(100, 2, 64, device=device)
    cu_seqlens = torch.tensor([0, 100], dtype=torch.int32, device=device)
    wanted = torch.ops.moba.block_mean(q, cu_seqlens, 16)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        got = torch.ops.moba.block_mean(q, cu_seqlens, 16)
    stream.synchronize()
    assert torch.equal(got, wanted)
