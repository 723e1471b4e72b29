"""route: block_ids -> for every (KV head, block), who chose it."""

import pytest
import torch
from numerics import Case, run_op, self_attention

from moba_ext import reference


def both(case: Case, ids):
    cu_seqlens_q, cu_seqlens_k = case.cu_seqlens()
    tokens_k, num_blocks = (
        sum(case.lengths_k),
        sum(case.lengths_k) // case.block_size + len(case.lengths_k),
    )
    offsets, entries = torch.ops.moba.route(
        ids, cu_seqlens_q, cu_seqlens_k, tokens_k, case.heads_k, case.block_size
    )
    wanted = reference.route(
        ids, cu_seqlens_q, cu_seqlens_k, num_blocks, case.heads_k, case.block_size
    )
    return offsets, entries, wanted


@pytest.mark.parametrize(
    "case",
    [
        self_attention(300, 4, 2, 8, 16, 4),
        self_attention([1, 0, 100, 16, 15, 17], 4, 4, 8, 16, 3),
        Case([5, 0, 200, 1], [90, 1, 240, 0], 6, 1, 8, 8, 9),
        self_attention(40, 2, 1, 8, 8, 1),  # no slots
    ],
)
def test_matches_reference(case, poisoned):
    _, _, ids = run_op(case, *case.tensors(torch.float32))
    offsets, entries, wanted = both(case, ids)
    assert torch.equal(offsets, wanted.offsets)
    assert torch.equal(entries[: wanted.entries.numel()], wanted.entries)
    assert bool((entries[wanted.entries.numel() :] == -1).all())


def test_a_block_that_everyone_chooses():
    case = self_attention(2048, 2, 1, 8, 16, 2)
    ids = torch.zeros(2048, 2, 1, dtype=torch.int32)
    ids[:16] = -1
    offsets, entries, wanted = both(case, ids)
    assert torch.equal(offsets, wanted.offsets) and torch.equal(entries[:4064], wanted.entries)
    assert offsets[1] == 4064


def test_ids_out_of_range_are_refused():
    case = self_attention(64, 1, 1, 8, 16, 2)
    ids = torch.full((64, 1, 1), 4, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="block_ids has 4, but sequence 0 has 4 blocks"):
        both(case, ids)
