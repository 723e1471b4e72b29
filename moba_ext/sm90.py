"""The ``sm90`` backend: our own kernels for Hopper, from the gate to the merge, behind one op for
the forward and one for the backward (csrc/cuda/sm90/attention.cpp). Here is what they are told:
groups and a positive scale. Calls in which ``topk * block_size`` covers every sequence are
FlashAttention's.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import flash, varlen

# Offsets are int32, so no sequence is longer, whatever bound the caller gave.
_LONGEST = 2**31 - 1


def _plan_of(q, k, cu_seqlens_k, max_seqlen_k, block_size, topk, *, backward: bool):
    sizes = cu_seqlens_k.shape[0] - 1, q.shape[0], k.shape[0], max_seqlen_k
    heads = q.shape[1], k.shape[1], q.shape[2]
    return _plan(flash.WORKSPACE_BYTES, *sizes, *heads, block_size, topk, backward)


@functools.lru_cache(256)  # 5 us for every call of the same sizes
def _plan(workspace: int | None, *call) -> flash.FlashPlan:
    *sizes, backward = call
    return flash.make_plan(*sizes, backward=backward, sm90=True)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_size: int,
    topk: int,
    softmax_scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``moba::attention`` on CUDA tensors of a Hopper -> out, lse, block_ids."""
    sequences = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    plan = _plan_of(q, k, cu_seqlens_k, max_seqlen_k, block_size, topk, backward=False)
    if plan.dense or q.shape[0] == 0:
        return flash.forward(q, k, v, *sequences, block_size, topk, softmax_scale)
    q, k, v = varlen.aligned(q), varlen.aligned(k), varlen.aligned(v)
    attended_q, scale, _ = flash.positive_scale(q, softmax_scale)
    return torch.ops.moba.sm90_forward.default(
        *(q, attended_q, k, v, cu_seqlens_q, cu_seqlens_k),
        *(min(max_seqlen_q, _LONGEST), min(max_seqlen_k, _LONGEST), block_size, topk, scale),
        *(plan.segment_rows, plan.heads_per_group, plan.queries_per_group),
    )


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_ids: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_size: int,
    topk: int,
    softmax_scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``moba::attention_backward`` on CUDA tensors of a Hopper -> dq, dk, dv."""
    sequences = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    plan = _plan_of(q, k, cu_seqlens_k, max_seqlen_k, block_size, topk, backward=True)
    if plan.dense or q.shape[0] == 0:
        saved = q, k, v, out, lse, block_ids
        return flash.backward(dout, dlse, *saved, *sequences, block_size, topk, softmax_scale)
    q, k, v, out, dout = (varlen.aligned(x) for x in (q, k, v, out, dout))
    q, scale, sign = flash.positive_scale(q, softmax_scale)
    dq, dk, dv = torch.ops.moba.sm90_backward.default(
        *(dout, None if dlse is None else dlse.contiguous(), q, k, v, out, lse, block_ids),
        *(cu_seqlens_q, cu_seqlens_k, min(max_seqlen_q, _LONGEST), min(max_seqlen_k, _LONGEST)),
        *(block_size, scale, plan.segment_rows, plan.heads_per_group, plan.queries_per_group),
    )
    return (dq if sign == 1 else dq * sign), dk, dv
