"""The reference against itself: stages against a dense mask, gradients against differences."""

import pytest
import torch
from numerics import Case, run_masked, self_attention

from moba_ext import reference

CASES = [
    self_attention(20, 2, 1, 8, 4, 3),
    self_attention([9, 0, 1, 14], 2, 2, 8, 4, 2),
    Case([5, 12, 0], [17, 6, 4], 4, 2, 8, 4, 3),
]


def run_reference(case, q, k, v, **kwargs):
    sizes = case.max_seqlen_k, case.block_size, case.topk
    return reference.moba_attention_varlen(q, k, v, *case.cu_seqlens(), *sizes, **kwargs)


@pytest.mark.parametrize("case", CASES)
def test_stages_equal_masked_attention(case):
    q, k, v = case.tensors(torch.float64)
    out, lse, ids = run_reference(case, q, k, v)
    wanted, wanted_lse = run_masked(case, q, k, v, ids)
    assert torch.allclose(out, wanted, atol=1e-13) and torch.allclose(lse, wanted_lse, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_gradients_by_finite_differences(case):
    inputs = case.tensors(torch.float64, requires_grad=True)
    _, _, ids = run_reference(case, *inputs)

    def function(q, k, v):
        out, lse, _ = run_reference(case, q, k, v, block_ids=ids)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_gate_takes_no_gradient():
    """The gradient with the gate in the graph is the gradient at a fixed selection."""
    case = CASES[0]
    inputs = case.tensors(torch.float64, requires_grad=True)
    out, _, ids = run_reference(case, *inputs)
    dout = torch.randn_like(out)
    through = torch.autograd.grad(out, inputs, dout)
    fixed = torch.autograd.grad(run_reference(case, *inputs, block_ids=ids)[0], inputs, dout)
    assert all(torch.equal(a, b) for a, b in zip(through, fixed))


def test_selection_of_a_hand_made_gate():
    # Keys of block j are all s[j] * e0, so the score of block j is s[j]; B = 2, own block of the
    # last query is 4.
    scores = torch.tensor([0.5, 2.0, -1.0, 1.0, 9.0])
    k = torch.zeros(10, 1, 8)
    k[:, 0, 0] = scores.repeat_interleave(2)
    q = torch.zeros(10, 1, 8)
    q[:, 0, 0] = 1.0
    cu_seqlens = torch.tensor([0, 10], dtype=torch.int32)
    kbar = reference.block_mean(k, cu_seqlens, 2)
    assert kbar[:, 0, 0].tolist() == [0.5, 2.0, -1.0, 1.0, 9.0, 0.0]
    ids, chosen = reference.gate_topk(q, kbar, cu_seqlens, cu_seqlens, 10, 2, 3)
    assert ids[-1, 0].tolist() == [1, 3] and chosen[-1, 0].tolist() == [2.0, 1.0]
    assert ids[5, 0].tolist() == [0, 1]  # two past blocks, both taken
    assert ids[2, 0].tolist() == [0, -1] and chosen[2, 0].tolist() == [0.5, -torch.inf]
    assert ids[0, 0].tolist() == [-1, -1]
    mask = reference.block_mask(ids, cu_seqlens, cu_seqlens, 2)
    assert mask[-1, 0].tolist() == [False, True, False, True, True]
