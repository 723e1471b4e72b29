"""gate_topk: q, kbar -> block_ids, scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import Case, check_selection, self_attention

from moba_ext import reference


def gate(case: Case, q, kbar):
    cu_seqlens_q, cu_seqlens_k = case.cu_seqlens()
    return torch.ops.moba.gate_topk(
        q,
        kbar,
        cu_seqlens_q,
        cu_seqlens_k,
        sum(case.lengths_k),
        case.max_seqlen_k,
        case.block_size,
        case.topk,
    )


def random_gate(case: Case, dtype=torch.float32):
    q, k, _ = case.tensors(dtype)
    kbar = torch.ops.moba.block_mean(k, case.cu_seqlens()[1], case.block_size)
    return q, kbar, *gate(case, q, kbar)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("topk", [1, 2, 3, 8, 31, 64, 1000])
def test_selection_by_score(dtype, topk, poisoned):
    case = self_attention([1, 0, 300, 16, 15, 17, 513], 4, 2, 64, 16, topk)
    q, kbar, ids, scores = random_gate(case, dtype)
    check_selection(case, q, kbar, ids, scores)


@pytest.mark.parametrize("head_dim", [8, 40, 72, 128, 256])
def test_head_dims_and_chunked_queries(head_dim):
    case = Case([3, 40, 0, 90], [50, 40, 30, 60], 6, 2, head_dim, 8, 4)
    q, kbar, ids, scores = random_gate(case)
    check_selection(case, q, kbar, ids, scores)
    before_first_key = slice(43, 43 + 30)  # the last sequence has 30 queries more than keys
    assert bool((ids[before_first_key] == -1).all())


def test_scores_that_rise_with_recency():
    # Every block beats all earlier ones: the list changes at every block.
    case = self_attention(1024, 1, 1, 8, 8, 6)
    k = torch.arange(1024.0)[:, None, None].expand(-1, 1, 8).contiguous()
    q = torch.ones(1024, 1, 8)
    kbar = torch.ops.moba.block_mean(k, case.cu_seqlens()[1], 8)
    ids, _ = gate(case, q, kbar)
    own = torch.arange(1024) // 8
    wanted = own[:, None] - torch.arange(5, 0, -1)
    assert torch.equal(ids[own >= 5, 0].long(), wanted[own >= 5])


def test_ties_take_the_lower_block():
    case = self_attention(20 * 4, 1, 1, 8, 4, 4)
    kbar = torch.ones(21, 1, 8)
    kbar[7] = 2.0
    ids, _ = gate(case, torch.ones(80, 1, 8), kbar)
    assert ids[-1, 0].tolist() == [0, 1, 7]
    kbar[[3, 5]] = 2.0
    kbar[[2, 9]] = 3.0
    ids, _ = gate(case, torch.ones(80, 1, 8), kbar)
    assert ids[-1, 0].tolist() == [2, 3, 9]


def test_negative_zero_ties_with_zero():
    case = self_attention(6 * 4, 1, 1, 8, 4, 2)
    kbar = torch.zeros(7, 1, 8)
    kbar[:2] = -0.0  # -0 is no worse than the +0 of later blocks
    q = torch.ones(24, 1, 8)
    assert gate(case, q, kbar)[0][-1, 0].tolist() == [0]


def test_nan_ranks_below_minus_infinity():
    case = self_attention(8 * 4, 1, 1, 8, 4, 4)
    kbar = torch.full((9, 1, 8), torch.nan)
    kbar[1] = -torch.inf
    kbar[5] = 1.0
    ids, scores = gate(case, torch.ones(32, 1, 8), kbar)
    assert ids[-1, 0].tolist() == [0, 1, 5]  # 5, then -inf, then the first NaN
    assert scores[-1, 0, 0].isnan() and scores[-1, 0, 1].isneginf() and scores[-1, 0, 2] == 8.0
    wanted, _ = reference.gate_topk(torch.ones(32, 1, 8), kbar, *case.cu_seqlens(), 32, 4, 4)
    assert torch.equal(ids, wanted)


def test_each_query_head_selects_for_itself():
    case = self_attention(512, 8, 2, 32, 32, 3)
    q, kbar, ids, _ = random_gate(case)
    for head in range(8):
        alone = case._replace(heads_q=1, heads_k=1)
        one, _ = gate(
            alone,
            q[:, head : head + 1].contiguous(),
            kbar[:, head // 4 : head // 4 + 1].contiguous(),
        )
        assert torch.equal(ids[:, head], one[:, 0])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=5),
    st.integers(1, 20),
    st.integers(1, 30),
    st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]),
    st.integers(0, 2**31),
)
def test_ragged_batches(lengths, block_size, topk, heads, seed):
    torch.manual_seed(seed)
    case = self_attention(lengths, *heads, 16, block_size, topk)
    q, kbar, ids, scores = random_gate(case)
    check_selection(case, q, kbar, ids, scores)
