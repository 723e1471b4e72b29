"""merge: the partials of a row into one softmax, forward and backward."""

import pytest
import torch
from numerics import (
    Case,
    assert_within_budget,
    check_against_reference,
    run_masked,
    run_op,
    self_attention,
)

from moba_ext import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topk", [2, 3, 8, 20])
def test_union_of_blocks(dtype, topk, poisoned):
    check_against_reference(self_attention([400, 3, 0, 33], 4, 2, 64, 16, topk), dtype)


def test_one_partial_far_above_the_others():
    case = self_attention(256, 1, 1, 16, 16, 4)
    q, k, v = case.tensors(torch.float32)
    k[32:48] *= 40  # lse of that block is hundreds above the rest
    out, lse, ids = run_op(case, q, k, v)
    exact, exact_lse = run_masked(case, *(x.double() for x in (q, k, v)), ids)
    plain, plain_lse = run_masked(case, q, k, v, ids)
    assert_within_budget(out, exact, plain)
    assert_within_budget(lse, exact_lse, plain_lse)


def test_rows_without_keys(poisoned):
    case = Case([20, 5], [12, 0], 2, 1, 16, 4, 3)
    q, k, v = case.tensors(torch.float32, requires_grad=True)
    out, lse, _ = run_op(case, q, k, v)
    blind = torch.tensor([True] * 8 + [False] * 12 + [True] * 5)
    assert bool((out[blind] == 0).all()) and bool(lse[:, blind].isneginf().all())
    assert lse[:, ~blind].isfinite().all()
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert bool((dq[blind] == 0).all())
    assert all(x.isfinite().all() for x in (dq, dk, dv))


def test_reference_merge_of_empty_slots():
    out, lse = torch.randn(4, 2, 3, 8), torch.randn(4, 2, 3)
    lse[0] = lse[1, 0, 1:] = -torch.inf
    merged, merged_lse = reference.merge(out, lse)
    assert bool((merged[0] == 0).all()) and bool(merged_lse[:, 0].isneginf().all())
    assert torch.equal(merged[1, 0], out[1, 0, 0]) and merged_lse[0, 1] == lse[1, 0, 0]


def test_block_nobody_reads_gets_zero_gradient(poisoned):
    # Two queries at the end of a long sequence: most blocks are read by no one.
    case = Case([2], [400], 1, 1, 16, 16, 2)
    q, k, v = case.tensors(torch.float32, requires_grad=True)
    out, _, ids = run_op(case, q, k, v)
    _, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    read = torch.zeros(25, dtype=torch.bool)
    read[ids.flatten().long()] = True
    read[24] = True
    assert torch.equal((dk != 0).flatten(1).any(1).view(25, 16).any(1), read)
    assert torch.equal((dv != 0).flatten(1).any(1).view(25, 16).any(1), read)
