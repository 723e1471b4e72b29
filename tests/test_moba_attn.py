"""MoBA in short: what a new user runs first. Everything here goes through the public functions."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_within_budget, max_error

import moba_ext


def batch(length: int, heads_q: int, heads_k: int, head_dim: int, dtype=torch.float32):
    shapes = [(1, length, heads, head_dim) for heads in (heads_q, heads_k, heads_k)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def full_attention(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("block_size", "topk"), [(64, 4), (32, 8), (100, 3), (256, 1), (1000, 1), (16, 99)]
)
def test_all_blocks_is_full_causal_attention(dtype, block_size, topk):
    """The free test: topk * block_size >= length."""
    inputs = batch(256, 4, 2, 64, dtype)
    dout = torch.randn(1, 256, 4, 64).to(dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    results = []
    for function, tensors in (
        (lambda *x: moba_ext.moba_attention(*x, block_size=block_size, topk=topk), inputs),
        (full_attention, exact_inputs),
        (full_attention, inputs),
    ):
        out = function(*tensors)
        results.append((out, *torch.autograd.grad(out, tensors, dout.to(out.dtype))))
    for name, got, exact, plain in zip(("out", "dq", "dk", "dv"), *results):
        assert_within_budget(got.detach(), exact.detach(), plain.detach(), name)


@pytest.mark.parametrize("moba_topk", [1, 2, 3, 5])
@pytest.mark.parametrize("moba_chunk_size", [32, 50])
@pytest.mark.parametrize("heads_k", [1, 2, 4])
def test_efficient_equals_naive(heads_k, moba_chunk_size, moba_topk):
    """Block-sparse attention against the same under a dense mask, forward and backward."""
    cu_seqlens = torch.tensor([0, 170, 171, 400], dtype=torch.int32)
    q, k, v = (x[0] for x in batch(400, 4, heads_k, 32))
    args = (cu_seqlens, 229, moba_chunk_size, moba_topk)
    dout = torch.randn(400, 4, 32)
    out = moba_ext.moba_attn_varlen(q, k, v, *args)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    naive, mask = moba_ext.moba_attn_varlen_naive(q, k, v, *args, return_mask=True)
    naive_grads = torch.autograd.grad(naive, (q, k, v), dout)
    assert mask.sum(-1).max() == min(moba_topk, -(-229 // moba_chunk_size))
    for name, got, wanted in zip(("out", "dq", "dk", "dv"), (out, *grads), (naive, *naive_grads)):
        assert max_error(got.detach(), wanted.detach().double()) < 2e-5, name


def test_sparse_attention_differs_from_full():
    q, k, v = batch(512, 2, 2, 32)
    sparse = moba_ext.moba_attention(q, k, v, block_size=32, topk=2)
    assert max_error(sparse[:, 300:], full_attention(q, k, v)[:, 300:].double()) > 0.05
    # ... but not where topk blocks are all there is.
    assert max_error(sparse[:, :64], full_attention(q, k, v)[:, :64].double()) < 1e-5


def test_a_needle_is_found():
    """A query that matches one far block reads its value; the other blocks stay out."""
    q, k, v = torch.randn(3, 1, 2048, 1, 64).unbind()
    k[:, 256:320] += 3 * q[:, -1:]
    v[:, 256:320] = 7.0
    out = moba_ext.moba_attention(q, k, v, block_size=64, topk=2)
    chosen = moba_ext.select_blocks(q[0], k[0], block_size=64, topk=2)
    assert chosen.block_ids[-1, 0].tolist() == [4] and chosen.counts[-1, 0] == 1
    assert torch.allclose(out[0, -1], torch.full((1, 64), 7.0), atol=1e-3)


def test_keys_that_were_not_chosen_do_not_matter():
    q, k, v = (x.detach() for x in batch(640, 1, 1, 32))
    out = moba_ext.moba_attention(q, k, v, block_size=64, topk=3)
    chosen = moba_ext.select_blocks(q[0], k[0], block_size=64, topk=3).block_ids[-1, 0].tolist()
    left_out = next(block for block in range(9) if block not in chosen)
    v[:, left_out * 64 : (left_out + 1) * 64] = torch.nan
    again = moba_ext.moba_attention(q, k, v, block_size=64, topk=3)
    assert torch.equal(out[0, -1], again[0, -1])


def test_training_learns_a_teacher():
    def attend(layer, x):
        q, k, v = layer(x).unflatten(-1, (3, 2, 16)).unbind(2)
        return moba_ext.moba_attention(q, k, v, block_size=20, topk=3)

    teacher, student = torch.nn.Linear(32, 3 * 32), torch.nn.Linear(32, 3 * 32)
    x = torch.randn(1, 200, 32)
    target = attend(teacher, x).detach()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = (attend(student, x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
