"""The ``sm90`` backend: our own kernels for Hopper, from the gate to the merge, behind one op for
the forward and one for the backward (csrc/cuda/sm90/attention.cpp). Here is what they are told:
groups and a positive scale. Calls in which ``topk * block_size`` covers every sequence are
FlashAttention's.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import _C, flash, groups, varlen

# Offsets are int32, so no sequence is longer, whatever bound the caller gave.
_LONGEST = 2**31 - 1


def make_plan(*sizes: int, backward: bool) -> groups.Plan:
    """The plan of a call of these sizes, those of :class:`groups.Call`; the forward's segments of
    own blocks come on top."""
    call = groups.Call(*sizes)
    bound = flash.WORKSPACE_BYTES
    if bound is None:
        bound = max(1 << 30, call.tensor_bytes(backward) * 3 // 16)

    def fits(entries: int, segments: int) -> bool:
        size = group_bytes(entries, segments, call.block_size, call.head_dim, backward)
        return size <= bound and segments <= 2**30

    return groups.make_plan(call, 4096 if backward else groups.ROW_TILE, fits)


def group_bytes(entries: int, segments: int, block_size: int, head_dim: int, backward: bool) -> int:
    """What a group holds at once: the routing and what attend returns."""
    if not backward:
        return entries * (2 * 4 + 2 * head_dim + 4)
    dq = (4 if block_size > groups.KEY_TILE else 2) * head_dim
    return entries * (2 * 4 + dq) + segments * block_size * 4 * head_dim


def _plan_of(q, k, cu_seqlens_k, max_seqlen_k, block_size, topk, *, backward: bool):
    sizes = cu_seqlens_k.shape[0] - 1, q.shape[0], k.shape[0], max_seqlen_k
    heads = q.shape[1], k.shape[1], q.shape[2]
    return _plan(flash.WORKSPACE_BYTES, *sizes, *heads, block_size, topk, backward)


@functools.lru_cache(256)  # 5 us for every call of the same sizes
def _plan(workspace: int | None, *call) -> groups.Plan:
    *sizes, backward = call
    return make_plan(*sizes, backward=backward)


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


def _arrays(*sizes: int) -> int:
    """Bytes of an allocation that holds arrays of these bytes (csrc/cuda/sm90/attention.cpp)."""
    return sum(-(-size // 256) * 256 for size in sizes)


def planned_sizes(**sizes: int) -> dict:
    """What ``moba_ext.plan`` reports of a call: the bytes that it asks torch for at once."""
    call = groups.Call(**sizes)
    plans = [_plan(flash.WORKSPACE_BYTES, *call, backward) for backward in (False, True)]
    if plans[0].dense or call.tokens_q == 0:
        return flash.planned_sizes(**sizes)
    tokens_q, heads_q, heads_k, head_dim = call.tokens_q, call.heads_q, call.heads_k, call.head_dim
    block_size, group = call.block_size, heads_q // heads_k
    num_blocks = call.tokens_k // block_size + call.batch
    slots = call.topk - 1  # of any sequence that is longer than topk blocks
    of_call = _arrays(8 * (call.batch + 1))
    row, several_tiles = 2 * head_dim, block_size > groups.KEY_TILE
    held = []
    for plan, backward in zip(plans, (False, True)):
        heads = plan.heads_per_group
        own_rows, lists, keys = heads * tokens_q * group, heads * num_blocks, heads * call.tokens_k
        rows_of_head = plan.queries_per_group * group
        entries, segments = call.counts(heads, plan.queries_per_group, plan.segment_rows)
        if not backward:  # own blocks have segments of their own
            segments += lists + groups.ceil_div(heads * rows_of_head, plan.segment_rows)
        table = _C.route_table(heads, rows_of_head * slots, num_blocks)
        lengths = entries, entries, lists + 1, lists + 1, segments, segments + 1
        routed = [4 * length for length in (*lengths, table)]
        if backward:
            sums = 4 * keys * head_dim if len(plan.query_ranges()) > 1 else 0
            stats = _arrays(*[4 * heads_q * tokens_q] * 2)
            dq = row * (2 if several_tiles else 1)
            own = _arrays(own_rows * dq, *[sums] * 2)
            turns = entries // 64 + segments + own_rows // 64 + lists + 2 if several_tiles else 0
            routed += [entries * dq, 4 * (1 + turns), *[segments * block_size * row] * 2]
            held.append(of_call + stats + own + _arrays(*routed))
        else:
            scores = 4 * tokens_q * heads_q * slots if slots > 32 else 0
            gate = _arrays(num_blocks * heads_k * row, scores) if slots else 0
            rows = entries + own_rows
            routed += [rows * row, 4 * rows, 4]
            held.append(of_call + max(gate, _arrays(*routed)))
    return {
        "dense": False,
        "forward_bytes": held[0],
        "backward_bytes": held[1],
        "heads_per_group": plans[0].heads_per_group,
        "queries_per_group": plans[0].queries_per_group,
        "groups": len(plans[0].head_ranges()) * len(plans[0].query_ranges()),
    }
