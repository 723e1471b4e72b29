"""The ``flash`` backend: our CUDA gate and routing around FlashAttention's varlen API.

The own blocks of all queries are one causal varlen call, every block its own sequence. The chosen
past blocks go group by group (KV heads x queries, :func:`make_plan`): route lists the rows that
chose each block and cuts the lists into segments, gather packs the rows and, per segment, the
block's keys, one varlen call attends, merge puts the parts of a row together. The backward goes
the same way from the merged out and lse, so merge needs no backward: dq is a sum over the parts of
a row, dk and dv over the segments of a block, in a fixed order. Sizes come from shapes alone:
nothing waits for the device, and a CUDA graph can hold it all.

Sources: arXiv 2502.13189, algorithm 1; arXiv 2307.08691 (FlashAttention-2).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import groups, reference, varlen

WORKSPACE_BYTES: int | None = None
"""Bound on what the groups that run at once hold beside inputs and outputs; assign to change it.

None: 1.5 GiB, or 3/8 of what q, k, v, out and in the backward their gradients take, whichever is
more; sm90, which packs no rows, has 1 GiB or 3/16, or 1/4 in a forward that merges rows along. At
least one KV head and as many queries as fill the lists of its blocks are held, which exceeds the
bound where the keys alone do.
"""

# The stages in C++ and CUDA.
_stages = torch.ops.moba


@functools.cache
def _second_stream(first: torch.cuda.Stream) -> torch.cuda.Stream:
    return torch.cuda.Stream(first.device)


def _take_turns(run: Callable, groups: list[tuple], at_once: int, device: torch.device) -> None:
    """Run the groups on the current stream, or by turns on it and a second one.

    FlashAttention's last thread blocks leave most multiprocessors idle: the other group's work runs
    there. What a group allocates belongs to its stream, so its memory is not used again by the
    other; what both use was there before and outlives the last wait.
    """
    if at_once == 1:
        for group in groups:
            run(*group)
        return
    first = torch.cuda.current_stream(device)
    second = _second_stream(first)
    second.wait_stream(first)
    try:
        for i, group in enumerate(groups):
            with torch.cuda.stream((first, second)[i % 2]):
                run(*group)
    finally:
        first.wait_stream(second)


def make_plan(*sizes: int, backward: bool) -> groups.Plan:
    """The plan of a call of these sizes, those of :class:`groups.Call`."""
    call = groups.Call(*sizes)
    # FlashAttention's deterministic backward has one thread block for all keys of a segment: long
    # ones leave the others waiting, short ones copy the block's keys more often.
    most = min(2 * call.block_size, 4096) if backward else 4 * call.block_size
    segment_rows = max(1024, most)
    bound = WORKSPACE_BYTES
    if bound is None:
        bound = max(3 << 29, call.tensor_bytes(backward) * 3 // 8)

    def fits(entries: int, segments: int, at_once: int) -> bool:
        size = _group_bytes(entries, segments, call.block_size, call.head_dim, backward)
        return at_once * size <= bound and segments <= varlen.MAX_SEQUENCES

    def plan(at_once: int) -> groups.Plan:
        of_one = functools.partial(fits, at_once=at_once)
        return groups.make_plan(call, segment_rows, of_one, at_once)

    one = plan(1)
    if not backward:
        return one
    one = one._replace(own_heads=_own_heads(call, one.block_size, bound))
    if one.heads_per_group == call.heads_k:
        return one
    # Two at once cost shorter ranges where one fills the workspace. That pays where a thread block
    # takes all keys of a segment in turn: such are few and long.
    two = plan(2)
    pays = two.queries_per_group == one.queries_per_group or varlen.needs_order(
        call.block_size, call.head_dim
    )
    counts = call.counts(two.heads_per_group, two.queries_per_group, segment_rows)
    return two._replace(own_heads=one.own_heads) if pays and fits(*counts, 2) else one


def _own_heads(call: groups.Call, block_size: int, bound: int) -> int:
    """As many as fit into the workspace: one by one they leave multiprocessors idle, for 4 % of B's
    backward and 6 % of E's."""
    group = call.heads_q // call.heads_k
    parts = _own_parts(call, block_size)
    most = varlen.most_heads(call.tokens_q, parts, call.head_dim) // group
    counts = range(min(call.heads_k, most), 1, -1)
    heads = next((n for n in counts if _own_bytes(call, block_size, n) <= bound), 1)
    return groups.ceil_div(call.heads_k, groups.ceil_div(call.heads_k, heads))


def _own_parts(call: groups.Call, block_size: int) -> int:
    return call.tokens_k // block_size + 2 * call.batch


def _own_bytes(call: groups.Call, block_size: int, heads: int) -> int:
    """What FlashAttention's backward of the own blocks of KV heads holds beside its results."""
    row, group = 2 * call.head_dim, call.heads_q // call.heads_k
    heads_q, parts = heads * group, _own_parts(call, block_size)
    held = _accumulator_bytes(call.tokens_q, parts, heads_q, block_size, call.head_dim)
    if group > 1:  # dk, dv per query head
        held += 2 * row * heads_q * call.tokens_k
    if varlen.package() is None:  # copies of dout and out; dq, dk, dv, which are copied
        held += row * (3 * heads_q * call.tokens_q + 2 * heads * call.tokens_k)
    return held


def _group_bytes(
    entries: int, segments: int, block_size: int, head_dim: int, backward: bool
) -> int:
    """What a group holds at once: packed rows and keys, and FlashAttention's own buffers."""
    row, key = 2 * head_dim, 2 * head_dim
    routing = 2 * 4 * entries
    if not backward:  # q, out, lse; k, v
        return routing + entries * (2 * row + 4) + segments * block_size * 2 * key
    # q, dout, out, lse, dq unless it takes the place of out, and FlashAttention's dq and delta in
    # fp32; k, v, dk, dv.
    rows = 4 if varlen.package() is None else 3
    accumulators = _accumulator_bytes(entries, segments, 1, block_size, head_dim)
    return routing + entries * (rows * row + 4) + accumulators + segments * block_size * 4 * key


def _accumulator_bytes(
    rows: int, sequences: int, heads: int, block_size: int, head_dim: int
) -> int:
    """FlashAttention's dq and delta in fp32: its deterministic backward has one dq per split of the
    keys, as many as give every multiprocessor a thread block."""
    dq = 4 * varlen.accumulator_width(head_dim)
    if varlen.needs_order(block_size, head_dim):
        dq *= groups.ceil_div(_multiprocessors(), sequences * heads)
    return heads * varlen.accumulator_rows(rows, sequences) * (dq + 4)


@functools.cache
def _multiprocessors() -> int:
    if not torch.cuda.is_available():
        return 132  # of an H100 or H200
    return torch.cuda.get_device_properties().multi_processor_count


def planned_sizes(**sizes: int) -> dict:
    """What ``moba_ext.plan`` reports of a call; bytes of the largest group, own blocks included."""
    call, held = groups.Call(**sizes), []
    plans = [make_plan(*call, backward=backward) for backward in (False, True)]
    for plan, backward in zip(plans, (False, True)):
        routed, whole = 0, plan.heads_per_group == plan.heads and len(plan.query_ranges()) == 1
        if plan.slots:
            counts = call.counts(plan.heads_per_group, plan.queries_per_group, plan.segment_rows)
            routed = _group_bytes(*counts, plan.block_size, call.head_dim, backward)
        lse = 4 * call.heads_q * call.tokens_q
        own = _own_bytes(call, plan.block_size, plan.own_heads) if backward else 0
        # Own blocks come before the groups, or once the rows of the only one are packed.
        held.append(lse + (own + routed if whole else max(own, plan.at_once * routed)))
    plan = plans[0]
    return {
        "dense": plan.dense,
        "forward_bytes": held[0],
        "backward_bytes": held[1],
        "heads_per_group": plan.heads_per_group,
        "queries_per_group": plan.queries_per_group,
        "groups": len(plan.head_ranges()) * len(plan.query_ranges()),
    }


class _Own(NamedTuple):
    """The own blocks of all queries."""

    cu_blocks: Tensor
    sequences: varlen.Sequences


def _own_blocks(
    cu_q: Tensor, cu_k: Tensor, tokens_q: int, tokens_k: int, max_q: int, max_k: int, block: int
) -> _Own:
    # Offsets are int32, so no sequence is longer, whatever bound the caller gave.
    max_q, max_k = min(max_q, 2**31 - 1), min(max_k, 2**31 - 1)
    cu_blocks, own_cu_q, own_cu_k = _stages.flash_metadata(
        cu_q, cu_k, tokens_q, tokens_k, max_q, max_k, block
    )
    bounds = min(block, max(max_q, 1)), min(block, max(max_k, 1))
    return _Own(cu_blocks, varlen.Sequences(own_cu_q, own_cu_k, *bounds))


class _Routed(NamedTuple):
    """A group's rows by the block that they chose."""

    entries: Tensor
    positions: Tensor
    offsets: Tensor
    segment_offsets: Tensor
    segment_lists: Tensor
    cu_rows: Tensor
    cu_keys: Tensor


def _route(ids, k, cu_q, own: _Own, plan: groups.Plan, group) -> _Routed:
    tokens_k, heads_k = k.shape[:2]
    return _Routed(
        *_stages.flash_route(
            *(ids, cu_q, own.cu_blocks, tokens_k, heads_k, plan.block_size, plan.segment_rows),
            *group,
        )
    )


class _Keys(NamedTuple):
    """Keys of every segment's block, packed."""

    k: Tensor
    v: Tensor
    sequences: varlen.Sequences


def _gather_keys(routed: _Routed, k, v, cu_k, own: _Own, plan: groups.Plan, group) -> _Keys:
    segments = routed.segment_lists, routed.cu_keys
    packs = _stages.flash_gather_keys(
        k, v, cu_k, own.cu_blocks, *segments, plan.block_size, *group[:2]
    )
    bounds = plan.segment_rows, plan.block_size
    return _Keys(*packs, varlen.Sequences(routed.cu_rows, routed.cu_keys, *bounds))


@functools.lru_cache(256)  # 10 to 130 us for every call of the same sizes
def _plan(make_plan: Callable, workspace: int | None, backward: bool, *sizes: int) -> groups.Plan:
    return make_plan(*sizes, backward=backward)


def plan_of(
    make_plan: Callable, q, k, cu_k, max_k: int, block_size: int, topk: int, *, backward: bool
) -> groups.Plan:
    """make_plan of flash or sm90 for the sizes of these tensors and the present workspace."""
    tokens_q, heads_q, head_dim = q.shape
    tokens_k, heads_k, _ = k.shape
    sizes = cu_k.shape[0] - 1, tokens_q, tokens_k, max_k, heads_q, heads_k, head_dim
    return _plan(make_plan, WORKSPACE_BYTES, backward, *sizes, block_size, topk)


def positive_scale(q: Tensor, softmax_scale: float | None) -> tuple[Tensor, float, int]:
    """q and a scale above 0 with the same scores, and the sign that q has lost, its gradient's too.

    Kernels take the maximum of masked scores before they scale: below 0 that overflows, at 0 a
    masked one is not a number.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if not math.isfinite(scale):
        raise ValueError(f"softmax_scale is {scale}, must be finite")
    if scale == 0:
        return torch.zeros_like(q), 1.0, 0
    return (-q, -scale, -1) if scale < 0 else (q, scale, 1)


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
    """``moba::attention`` on CUDA tensors, bfloat16 or float16 -> out, lse, block_ids."""
    tokens_q, heads_q, head_dim = q.shape
    tokens_k, heads_k, _ = k.shape
    q, k, v = (varlen.aligned(x) for x in (q, k, v))
    attended_q, scale, _ = positive_scale(q, softmax_scale)
    lse = q.new_empty(heads_q, tokens_q, dtype=torch.float32)
    if tokens_q == 0 or tokens_k == 0:
        slots = reference.num_slots(max_seqlen_k, block_size, topk)
        ids = q.new_full((tokens_q, heads_q, slots), -1, dtype=torch.int32)
        return q.new_zeros(q.shape), lse.fill_(-torch.inf), ids
    plan = plan_of(make_plan, q, k, cu_seqlens_k, max_seqlen_k, block_size, topk, backward=False)
    own = _own_blocks(
        *(cu_seqlens_q, cu_seqlens_k, tokens_q, tokens_k, max_seqlen_q, max_seqlen_k),
        plan.block_size,
    )
    kbar = _stages.block_mean(k, cu_seqlens_k, block_size)
    ids = _stages.gate_topk(
        *(q, kbar, cu_seqlens_q, cu_seqlens_k, tokens_k, max_seqlen_k, block_size, topk)
    )[0]

    def pack(group) -> tuple[Tensor, Tensor, _Keys]:
        routed = _route(ids, k, cu_seqlens_q, own, plan, group)
        keys = _gather_keys(routed, k, v, cu_seqlens_k, own, plan, group)
        rows = routed.entries, routed.offsets, heads_k, *group
        return routed.positions, _stages.flash_gather([attended_q], None, *rows)[0], keys

    @functools.cache
    def attend_own() -> tuple[Tensor, Tensor, Tensor]:
        own_out, own_lse = varlen.forward(attended_q, k, v, own.sequences, scale, causal=True)
        # merge writes a row of out after it has read that of the own block: one buffer serves both,
        # unless FlashAttention gave it the strides of q.
        return own_out, own_lse, own_out if own_out.is_contiguous() else q.new_empty(q.shape)

    def run_group(heads: tuple[int, int], queries: tuple[int, int]) -> None:
        group = (*heads, *queries)
        packed = pack(group) if plan.slots else None
        # Only now: a short call's device copies rows while the host calls FlashAttention.
        own_out, own_lse, out = attend_own()
        if packed is not None:
            positions, rows, keys = packed
            part_out, part_lse = varlen.forward(rows, *keys, scale, causal=False)
        else:
            positions, part_lse = ids.new_empty(0), lse.new_empty(0)
            part_out = q.new_empty(0, 1, head_dim)
        of_q = slice(*(h * (heads_q // heads_k) for h in heads))
        _stages.flash_merge(
            *(positions, part_out, part_lse, own_out[:, of_q], own_lse[of_q]),
            *(cu_seqlens_q, cu_seqlens_k, own.cu_blocks, heads_k, *group, out, lse),
        )

    for heads in plan.head_ranges():
        for queries in plan.query_ranges():
            run_group(heads, queries)
    *_, out = attend_own()
    return out, lse, ids


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
    """``moba::attention_backward`` on CUDA tensors -> dq, dk, dv."""
    tokens_q, heads_q, head_dim = q.shape
    tokens_k, heads_k, _ = k.shape
    if tokens_q == 0 or tokens_k == 0:
        return tuple(x.new_zeros(x.shape) for x in (q, k, v))
    q, k, v, out, dout = (varlen.aligned(x) for x in (q, k, v, out, dout))
    q, scale, sign = positive_scale(q, softmax_scale)
    plan = plan_of(make_plan, q, k, cu_seqlens_k, max_seqlen_k, block_size, topk, backward=True)
    ranges = plan.query_ranges()
    if dlse is not None:
        out, dlse = varlen.lse_grad(dlse, lse.isneginf(), dout, out)
    own = _own_blocks(
        *(cu_seqlens_q, cu_seqlens_k, tokens_q, tokens_k, max_seqlen_q, max_seqlen_k),
        plan.block_size,
    )
    batch = cu_seqlens_q, cu_seqlens_k, own.cu_blocks

    def of(heads: tuple[int, int]) -> tuple[slice, slice]:
        """Query and KV heads of a range of KV heads."""
        return slice(*(h * (heads_q // heads_k) for h in heads)), slice(*heads)

    def attend_own(heads: tuple[int, int], own_lse: Tensor, grads: tuple[Tensor, ...]) -> None:
        of_q, of_k = of(heads)
        own_dlse = None if dlse is None else dlse._replace(dout=dlse.dout[:, of_q])
        places = tuple(x[:, part] for x, part in zip(grads, (of_q, of_k, of_k)))
        results = varlen.backward(
            *(dout[:, of_q], own_dlse, q[:, of_q], k[:, of_k], v[:, of_k], out[:, of_q]),
            *(own_lse[of_q], own.sequences, scale, True, places),
        )
        for result, place in zip(results, places):
            if result is not place:
                place.copy_(result)

    @functools.cache
    def own_grads() -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of the own blocks, to which groups add in place."""
        grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
        # FlashAttention writes +inf where a row has no keys; with -inf it would make NaN of it.
        own_lse = lse.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=torch.inf)
        for heads in varlen.ranges(heads_k, plan.own_heads):
            attend_own(heads, own_lse, grads)
        return grads

    def run_heads(heads: tuple[int, int]) -> None:
        sums = [None, None]
        if len(ranges) > 1:
            shape = (tokens_k, heads[1] - heads[0], head_dim)
            sums = [k.new_empty(shape, dtype=torch.float32) for _ in range(2)]
        for queries in ranges:
            run_group(heads, queries, sums)

    def run_group(heads: tuple[int, int], queries: tuple[int, int], sums) -> None:
        group = (*heads, *queries)
        if plan.slots:
            routed = _route(block_ids, k, cu_seqlens_q, own, plan, group)
            packed = pack(routed, group)
        # A short call's device copies rows while the host calls FlashAttention.
        dq, *dkv = own_grads()
        of_q, of_k = of(heads)
        if plan.slots:
            places = packed[5], None, None  # dq may take the place of out
            part_dq, *part_dkv = varlen.backward(*packed, scale, False, places)
            positions, segment_offsets = routed.positions, routed.segment_offsets
        else:
            lists = (heads[1] - heads[0]) * (tokens_k // plan.block_size + len(cu_seqlens_k) - 1)
            positions, segment_offsets = block_ids.new_empty(0), block_ids.new_zeros(lists + 1)
            part_dq, part_dk = dq.new_empty(0, 1, head_dim), q.new_empty(0, 1, head_dim)
            part_dkv = part_dk, part_dk
        dkv = [x[:, of_k] for x in dkv]
        _stages.flash_merge_backward(positions, part_dq, dq[:, of_q], *batch, heads_k, *group, dq)
        _stages.flash_reduce_keys(
            *(segment_offsets, *part_dkv, *dkv, *batch, plan.block_size),
            *(queries == ranges[0], queries == ranges[-1], *sums, *dkv),
        )

    def pack(routed: _Routed, group) -> tuple:
        """The first arguments of varlen.backward."""
        keys = _gather_keys(routed, k, v, cu_seqlens_k, own, plan, group)
        rows = routed.entries, routed.offsets, heads_k, *group
        q_rows, dout_rows, out_rows, lse_rows = _stages.flash_gather([q, dout, out], lse, *rows)
        part_dlse = None
        if dlse is not None:
            part_dlse = dlse._replace(dout=_stages.flash_gather([dlse.dout], None, *rows)[0])
        rows = dout_rows, part_dlse, q_rows, keys.k, keys.v, out_rows, lse_rows[None]
        return *rows, keys.sequences

    by_heads = [(heads,) for heads in plan.head_ranges()]
    if len(by_heads) * len(ranges) > 1:
        own_grads()  # FlashAttention's buffers have gone then before rows are packed
    _take_turns(run_heads, by_heads, plan.at_once, q.device)
    dq, dk, dv = own_grads()
    return (dq if sign == 1 else dq * sign), dk, dv
