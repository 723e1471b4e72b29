"""How the flash backend puts its stages together, on a CPU: tests/flash_in_pytorch.py stands in for
the CUDA stages and for FlashAttention."""

import flash_in_pytorch
import pytest
import torch
from numerics import (
    Case,
    assert_within_budget,
    gradients,
    recomputed_gradients,
    run_masked,
    self_attention,
)

from moba_ext import flash

CASES = [
    self_attention(300, 4, 4, 16, 16, 4),
    self_attention([0, 1, 130, 3, 0, 64, 17, 0], 4, 2, 8, 8, 8),
    self_attention(200, 8, 1, 16, 16, 12),
    Case([5, 0, 200, 1, 40], [90, 7, 240, 0, 25], 4, 2, 16, 16, 6),
    Case([50, 9], [20, 3], 2, 1, 8, 8, 2),
    self_attention([90, 0, 31], 2, 2, 16, 16, 1),
    Case([30, 50, 1], [64, 20, 33], 4, 2, 16, 16, 4),  # topk covers every sequence
    Case([0, 0], [9, 30], 2, 1, 8, 8, 2),
    Case([9, 30], [0, 0], 2, 1, 8, 8, 2),
]


@pytest.fixture(autouse=True)
def stages(monkeypatch):
    monkeypatch.setattr(flash, "_stages", flash_in_pytorch)
    monkeypatch.setattr(flash, "_forward_call", flash_in_pytorch.forward_call)
    monkeypatch.setattr(flash, "_backward_call", flash_in_pytorch.backward_call)
    for name in ("block_mean", "gate_topk"):
        stage = getattr(torch.ops.moba, name)
        monkeypatch.setattr(flash_in_pytorch, name, stage, raising=False)


def check(case: Case, with_dlse: bool) -> None:
    inputs = case.tensors(torch.float32)
    sizes = (case.max_seqlen_q, case.max_seqlen_k, case.block_size, case.topk)
    cu_seqlens = case.cu_seqlens()
    out, lse, ids = flash.forward(*inputs, *cu_seqlens, *sizes, 0.3)
    assert torch.equal(ids, torch.ops.moba.attention(*inputs, *cu_seqlens, *sizes)[2])
    dout, dlse = torch.randn_like(out), torch.randn_like(lse) * with_dlse
    got = (
        out,
        lse,
        *flash.backward(
            *(dout, dlse if with_dlse else None, *inputs, out, lse, ids, *cu_seqlens, *sizes, 0.3)
        ),
    )
    plain = run_masked(case, *inputs, ids, 0.3)
    plain += recomputed_gradients(case, *inputs, ids, dout, dlse, 0.3)
    inputs = [x.double().requires_grad_() for x in inputs]
    exact = run_masked(case, *inputs, ids, 0.3)
    exact += gradients(*exact, inputs, dout, dlse)
    for name, x, y, z in zip(("out", "lse", "dq", "dk", "dv"), got, exact, plain):
        # Rounded twice in float32: a part, then their sum.
        assert_within_budget(x, y.detach(), z, name, least_size=1.0)


@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_one_group(case, with_dlse):
    check(case, with_dlse)


@pytest.mark.parametrize("workspace", [1, 40_000, 200_000])
@pytest.mark.parametrize("case", CASES)
def test_groups_of_heads_and_queries(case, workspace, monkeypatch):
    monkeypatch.setattr(flash, "WORKSPACE_BYTES", workspace)
    monkeypatch.setattr(flash, "_ROW_TILE", 2)  # else shorter lists would not be worth a group
    check(case, True)


@pytest.mark.parametrize("case", CASES)
def test_more_sequences_than_a_call_takes(case, monkeypatch):
    monkeypatch.setattr(flash, "_MAX_SEQUENCES", 5)
    check(case, True)
