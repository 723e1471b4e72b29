"""The ``sm90`` backend: our own kernels for Hopper, from the gate to the merge, behind one op for
the forward and one for the backward (csrc/cuda/sm90/attention.cpp). Here is what they are told:
groups and a positive scale. Calls in which ``topk * block_size`` covers every sequence are
FlashAttention's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _C, flash, groups, varlen

_stages = torch.ops.moba
# Offsets are int32, so no sequence is longer, whatever bound the caller gave.
_LONGEST = 2**31 - 1
# Parts of a phase, whose rows are merged while the next one is attended: with fewer, thread blocks
# wait for each other. And the phases in memory at a time.
PHASE_PARTS = 2**19
_BUFFERS = 3
_MERGED_PARTS = 8  # of a row at most (csrc/cuda/sm90/stages.h)


def make_plan(*sizes: int, backward: bool) -> groups.Plan:
    """The plan of a call of these sizes, those of :class:`groups.Call`; the forward's segments of
    own blocks come on top."""
    call = groups.Call(*sizes)
    bound = flash.WORKSPACE_BYTES

    def fits(entries: int, segments: int) -> bool:
        size = group_bytes(entries, segments, call.block_size, call.head_dim, backward)
        most = max(1 << 30, call.tensor_bytes(backward) * 3 // 16) if bound is None else bound
        return size <= most and segments <= 2**30

    plan = groups.make_plan(call, 4096 if backward else groups.ROW_TILE, fits)
    if backward or plan.slots == 0:
        return plan
    return _merging_plan(call, plan, bound) or plan


def _merging_plan(call: groups.Call, plan: groups.Plan, bound: int | None) -> groups.Plan | None:
    """The same with rows merged along, where blocks, parts and the memory allow it."""
    of_query = call.heads_q // call.heads_k  # rows
    parts = call.tokens_q * of_query * call.topk  # of a head
    if call.block_size > groups.KEY_TILE or call.topk > _MERGED_PARTS or parts < PHASE_PARTS // 4:
        return None
    # A range of queries copies each block's keys anew: at least for three tiles of rows.
    lists = call.tokens_k // call.block_size + call.batch
    rows = 3 * groups.ROW_TILE * lists // plan.slots, PHASE_PARTS // call.topk
    queries = groups.ceil_div(call.tokens_q, max(call.tokens_q * of_query // max(rows), 1))
    if bound is None:
        bound = max(1 << 30, call.tensor_bytes(False) // 4)

    def fits(heads: int) -> bool:
        sizes = MergingSizes.of(call, heads, queries)
        most = max(sizes.segments * call.block_size, sizes.entries, sizes.rows)
        return most < 2**31 and sizes.bytes(call.head_dim) <= bound

    counts = (groups.ceil_div(call.heads_k, sets) for sets in range(1, call.heads_k + 1))
    heads = next((n for n in counts if fits(n)), None)
    if heads is None:
        return None
    return plan._replace(heads_per_group=heads, queries_per_group=queries, merging=True)


class MergingSizes(NamedTuple):
    """Of a group of heads whose rows are merged along, in ranges of queries."""

    phases: int
    lists: int
    entries: int
    segments: int
    rows: int  # of the buffers

    @staticmethod
    def of(call: groups.Call, heads: int, queries: int) -> MergingSizes:
        of_query = call.heads_q // call.heads_k
        phases = heads * groups.ceil_div(call.tokens_q, queries)
        lists = phases * (call.tokens_k // call.block_size + call.batch)
        own = heads * call.tokens_q * of_query
        entries = own * (call.topk - 1)
        segments = 2 * lists + sum(groups.ceil_div(n, groups.ROW_TILE) for n in (own, entries))
        rows = min(phases, _BUFFERS) * queries * of_query * call.topk
        return MergingSizes(phases, lists, entries, segments, rows)

    def bytes(self, head_dim: int) -> int:
        """What the group holds at once: the routing and the buffers."""
        return self.entries * 2 * 4 + self.rows * (2 * head_dim + 4)


def group_bytes(entries: int, segments: int, block_size: int, head_dim: int, backward: bool) -> int:
    """What a group holds at once: the routing and what attend returns."""
    if not backward:
        return entries * (2 * 4 + 2 * head_dim + 4)
    dq = (4 if block_size > groups.KEY_TILE else 2) * head_dim
    return entries * (2 * 4 + dq) + segments * block_size * 4 * head_dim


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
    sizes = max_seqlen_q, max_seqlen_k, block_size, topk
    plan = flash.plan_of(
        make_plan, q, k, cu_seqlens_k, max_seqlen_k, block_size, topk, backward=False
    )
    if plan.dense or q.shape[0] == 0:
        return flash.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, *sizes, softmax_scale)
    q, k, v = varlen.aligned(q), varlen.aligned(k), varlen.aligned(v)
    attended_q, scale, _ = flash.positive_scale(q, softmax_scale)
    numbers = _forward_numbers(plan, *sizes, scale)
    return _stages.sm90_forward.default(q, attended_q, k, v, cu_seqlens_q, cu_seqlens_k, *numbers)


def _forward_numbers(plan: groups.Plan, max_q: int, max_k: int, *sizes) -> tuple:
    """What ``moba::sm90_forward`` takes after its tensors."""
    return (
        *(min(max_q, _LONGEST), min(max_k, _LONGEST), *sizes),
        *(plan.segment_rows, plan.heads_per_group, plan.queries_per_group, plan.merging),
    )


def prepare(tensors: tuple[Tensor, ...], sizes: tuple) -> tuple | None:
    """What makes :func:`forward_prepared` the same as ``forward(*tensors, *sizes)``, for all
    tensors of these sizes and strides that begin at multiples of 16 bytes; None if nothing does."""
    q, k, v, _, cu_seqlens_k = tensors
    *sizes, softmax_scale = sizes
    _, max_seqlen_k, block_size, topk = sizes
    plan = flash.plan_of(
        make_plan, q, k, cu_seqlens_k, max_seqlen_k, block_size, topk, backward=False
    )
    positive = softmax_scale is None or softmax_scale > 0
    rows = positive and all(map(varlen.has_aligned_rows, (q, k, v)))
    if plan.dense or q.shape[0] == 0 or not rows:
        return None
    scale = flash.positive_scale(q, softmax_scale)[1]
    return _forward_numbers(plan, *sizes, scale)


def forward_prepared(q, k, v, cu_seqlens_q, cu_seqlens_k, prepared: tuple):
    return _stages.sm90_forward.default(q, q, k, v, cu_seqlens_q, cu_seqlens_k, *prepared)


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
    plan = flash.plan_of(
        make_plan, q, k, cu_seqlens_k, max_seqlen_k, block_size, topk, backward=True
    )
    if plan.dense or q.shape[0] == 0:
        saved = q, k, v, out, lse, block_ids
        return flash.backward(dout, dlse, *saved, *sequences, block_size, topk, softmax_scale)
    q, k, v, out, dout = (varlen.aligned(x) for x in (q, k, v, out, dout))
    q, scale, sign = flash.positive_scale(q, softmax_scale)
    dq, dk, dv = _stages.sm90_backward.default(
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
    plans = [make_plan(*call, backward=backward) for backward in (False, True)]
    if plans[0].dense or call.tokens_q == 0:
        return flash.planned_sizes(**sizes)
    tokens_q, heads_q, heads_k, head_dim = call.tokens_q, call.heads_q, call.heads_k, call.head_dim
    block_size, group = call.block_size, heads_q // heads_k
    num_blocks = call.tokens_k // block_size + call.batch
    slots = call.topk - 1  # of any sequence that is longer than topk blocks
    of_call = 8 * (call.batch + 1)
    row, several_tiles = 2 * head_dim, block_size > groups.KEY_TILE
    held = []
    for plan, backward in zip(plans, (False, True)):
        heads, queries = plan.heads_per_group, plan.queries_per_group
        own_rows, lists, keys = heads * tokens_q * group, heads * num_blocks, heads * call.tokens_k
        ranges = 1
        if plan.merging:
            phases, lists, entries, segments, rows = MergingSizes.of(call, heads, queries)
            ranges = phases // heads
        else:
            entries, segments = call.counts(heads, queries, plan.segment_rows)
            rows = entries + (0 if several_tiles else own_rows)
            if not backward:  # own blocks have segments of their own
                segments += lists + groups.ceil_div(heads * queries * group, plan.segment_rows)
                lists *= 2 if several_tiles else 1
        table = _C.route_table(heads * ranges, queries * group * slots, num_blocks)
        lengths = entries, entries, lists + 1, lists + 1, segments, segments + 1
        routed = [4 * length for length in (*lengths, table)]
        if backward:
            sums = 4 * keys * head_dim if len(plan.query_ranges()) > 1 else 0
            stats = _arrays(*[4 * heads_q * tokens_q] * 2)
            dq = row * (2 if several_tiles else 1)
            own = _arrays(own_rows * dq, *[sums] * 2)
            turns = entries // 64 + segments + own_rows // 64 + lists + 2 if several_tiles else 0
            routed += [entries * dq, 4 * (1 + turns), *[segments * block_size * row] * 2]
            held.append(_arrays(of_call) + stats + own + _arrays(*routed))
        else:
            kbar = num_blocks * heads_k * row if slots else 0
            scores = 4 * tokens_q * heads_q * slots if slots > 32 else 0
            counters = 2 * phases + 1 if plan.merging else 1 + heads if several_tiles else 0
            routed += [rows * row, 4 * rows, 4 * counters]
            held.append(_arrays(of_call, kbar) + max(scores, _arrays(*routed)))
    forward = plans[0]
    queries = tokens_q if forward.merging else forward.queries_per_group
    return {
        "dense": False,
        "forward_bytes": held[0],
        "backward_bytes": held[1],
        "heads_per_group": forward.heads_per_group,
        "queries_per_group": queries,
        "groups": len(forward.head_ranges()) * groups.ceil_div(tokens_q, queries),
    }
