"""MoBA in plain PyTorch: the definition that every backend is tested against.

One function per stage, in the order in which they run::

    block_mean -> gate_topk -> route -> attend -> merge

Everything here works on packed tensors ``[tokens, heads, head_dim]`` with ``cu_seqlens`` offsets,
on any device, in any floating dtype including float64, and differentiates through PyTorch's
autograd. It is written to be read, not to be fast: ``attend`` loops over key blocks in Python.

Vocabulary
    block       ``block_size`` consecutive keys of one sequence; its last block may be short.
    block table all blocks of a batch, sequence after sequence: block ``j`` of sequence ``b`` is
                row ``cu_blocks[b] + j``. It has ``tokens // block_size + batch`` rows, a bound
                that shapes alone give, so its last rows may be unused.
    position    index of a query among the keys of its sequence. Queries are aligned to the end of
                the keys, so query ``i`` of ``M`` with ``L`` keys sits at ``L - M + i``, which is
                negative for a query that comes before the first key.
    own block   the block that holds a query's position: always attended, causally.
    slot        column of ``block_ids``; the own block has the slot after the last column.

Source: "MoBA: Mixture of Block Attention for Long-Context LLMs" (arXiv 2502.13189), section 2.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Route",
    "attend",
    "block_mask",
    "block_mean",
    "block_offsets",
    "gate_topk",
    "masked_attention",
    "merge",
    "moba_attention_varlen",
    "naive_attention_varlen",
    "num_slots",
    "query_positions",
    "route",
]


class Route(NamedTuple):
    """Which queries chose each block, as compressed rows.

    offsets: int64 ``[Hk * num_blocks + 1]``; the list of (KV head g, block table row n) is
        ``entries[offsets[g * num_blocks + n] : offsets[g * num_blocks + n + 1]]``.
    entries: int64 ``[number of chosen (query, head, slot) triples]``, flat indices into
        ``block_ids``, ascending within each list.
    """

    offsets: Tensor
    entries: Tensor


def _accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def num_slots(max_seqlen_k: int, block_size: int, topk: int) -> int:
    """Columns of ``block_ids``: past blocks that a query can choose, ``min(topk, blocks) - 1``."""
    max_blocks = max(-(-max_seqlen_k // block_size), 1)
    return min(topk, max_blocks) - 1


def block_offsets(cu_seqlens_k: Tensor, block_size: int) -> Tensor:
    """``cu_blocks`` int64 ``[batch + 1]``: first block table row of every sequence."""
    lengths = cu_seqlens_k.long().diff()
    blocks = torch.div(lengths + block_size - 1, block_size, rounding_mode="floor")
    return torch.cat([blocks.new_zeros(1), blocks.cumsum(0)])


def query_positions(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[Tensor, Tensor]:
    """``(sequence, position)``, both int64 ``[Tq]``, of every query; position < 0 means no keys."""
    lengths_q, lengths_k = cu_seqlens_q.long().diff(), cu_seqlens_k.long().diff()
    batch = torch.arange(lengths_q.numel(), device=cu_seqlens_q.device)
    sequence = torch.repeat_interleave(batch, lengths_q)
    query = (
        torch.arange(sequence.numel(), device=cu_seqlens_q.device) - cu_seqlens_q.long()[sequence]
    )
    return sequence, query + (lengths_k - lengths_q)[sequence]


def block_mean(k: Tensor, cu_seqlens_k: Tensor, block_size: int) -> Tensor:
    """Mean of the keys of every complete block.

    k: ``[Tk, Hk, D]``. Returns kbar ``[Tk // block_size + batch, Hk, D]`` in k's dtype: summed in
    float32 (float64 for float64), rounded once. Rows of short tail blocks, which no query may
    choose, and unused rows are zero.
    """
    table = k.new_zeros(k.shape[0] // block_size + cu_seqlens_k.numel() - 1, *k.shape[1:])
    starts = cu_seqlens_k.tolist()
    for first, begin, end in zip(
        block_offsets(cu_seqlens_k, block_size).tolist(), starts, starts[1:]
    ):
        complete = (end - begin) // block_size
        blocks = k[begin : begin + complete * block_size].detach()
        blocks = blocks.reshape(complete, block_size, *k.shape[1:])
        table[first : first + complete] = blocks.to(_accumulator_dtype(k.dtype)).mean(1).to(k.dtype)
    return table


def gate_topk(
    q: Tensor,
    kbar: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    block_size: int,
    topk: int,
) -> tuple[Tensor, Tensor]:
    """The ``topk - 1`` past blocks of every query with the largest ``<q, kbar>``.

    q: ``[Tq, Hq, D]``, kbar: ``[blocks, Hk, D]``; query head ``h`` uses KV head ``h // (Hq //
        Hk)``. Ties go to the lower block, NaN ranks below -inf. Returns ``block_ids`` int32
        ``[Tq, Hq, K]``, local to the sequence, ascending, padded with -1, and their scores
        (float32, float64 for float64; -inf where padded), with ``K = num_slots(max_seqlen_k,
        block_size, topk)``.
    """
    tokens, heads_q, _ = q.shape
    slots = num_slots(max_seqlen_k, block_size, topk)
    dtype = _accumulator_dtype(q.dtype)
    ids = torch.full((tokens, heads_q, slots), -1, dtype=torch.int32, device=q.device)
    scores = torch.full((tokens, heads_q, slots), -torch.inf, dtype=dtype, device=q.device)
    if slots == 0 or tokens == 0:
        return ids, scores
    group = heads_q // kbar.shape[1]
    _, position = query_positions(cu_seqlens_q, cu_seqlens_k)
    starts_q = cu_seqlens_q.tolist()
    cu_blocks = block_offsets(cu_seqlens_k, block_size).tolist()
    for begin, end, first, last in zip(starts_q, starts_q[1:], cu_blocks, cu_blocks[1:]):
        if begin == end or first == last:
            continue
        centroids = kbar[first:last].detach().to(dtype).repeat_interleave(group, dim=1)
        gate = torch.einsum("qhd,nhd->qhn", q[begin:end].detach().to(dtype), centroids)
        block = torch.arange(last - first, device=q.device)
        past = block < torch.div(position[begin:end, None], block_size, rounding_mode="floor")
        # Rank by (is a past block, is a number, score), ties to the lower block: three stable
        # sorts, the least significant first.
        order = torch.argsort(gate.nan_to_num(nan=-torch.inf), dim=-1, descending=True, stable=True)
        for key in (~gate.isnan(), past[:, None].expand_as(gate)):
            rank = key.gather(-1, order).int()
            order = order.gather(-1, torch.argsort(rank, dim=-1, descending=True, stable=True))
        chosen = order[..., :slots]
        valid = past[:, None].expand_as(gate).gather(-1, chosen)
        chosen = torch.where(valid, chosen, last - first).sort(-1).values
        valid = chosen < last - first
        kept = gate.gather(-1, chosen.clamp(max=last - first - 1))
        width = chosen.shape[-1]
        ids[begin:end, :, :width] = torch.where(valid, chosen, -1).int()
        scores[begin:end, :, :width] = kept.masked_fill(~valid, -torch.inf)
    return ids, scores


def route(
    block_ids: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    num_blocks: int,
    heads_k: int,
    block_size: int,
) -> Route:
    """Turn ``block_ids [Tq, Hq, K]`` around: for every (KV head, block), who chose it, in order."""
    tokens, heads_q, slots = block_ids.shape
    sequence, _ = query_positions(cu_seqlens_q, cu_seqlens_k)
    row = block_offsets(cu_seqlens_k, block_size)[sequence][:, None, None] + block_ids
    head_k = torch.arange(heads_q, device=block_ids.device) // (heads_q // heads_k)
    bucket = torch.where(
        block_ids >= 0, head_k[None, :, None] * num_blocks + row, heads_k * num_blocks
    )
    bucket, entries = bucket.reshape(-1).sort(stable=True)
    edges = torch.arange(heads_k * num_blocks + 1, device=block_ids.device)
    offsets = torch.searchsorted(bucket, edges)
    return Route(offsets, entries[: int(offsets[-1])])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query over each of its blocks apart.

    Returns normalised partial outputs ``[Tq, Hq, K + 1, D]`` and their natural-log ``lse
    [Tq, Hq, K + 1]`` (float32, float64 for float64). Slot ``K`` is the own block, where a query
    sees the keys up to its position. A slot without a block has output 0 and lse -inf.
    """
    tokens, heads_q, slots = block_ids.shape
    heads_k, head_dim = k.shape[1:]
    group, dtype = heads_q // heads_k, _accumulator_dtype(q.dtype)
    starts_k = cu_seqlens_k.tolist()
    cu_blocks = block_offsets(cu_seqlens_k, block_size).tolist()
    num_blocks = k.shape[0] // block_size + len(starts_k) - 1
    offsets, entries = route(block_ids, cu_seqlens_q, cu_seqlens_k, num_blocks, heads_k, block_size)
    edges = offsets.tolist()
    sequence, position = query_positions(cu_seqlens_q, cu_seqlens_k)

    # The empty first entries keep q, k and v in the autograd graph when no query has a key.
    rows, outs, lses = (
        [position[:0]],
        [q[:0, 0].to(dtype) + k[:0, 0] + v[:0, 0]],
        [q[:0, 0, 0].to(dtype)],
    )
    for b, (begin, end) in enumerate(zip(starts_k, starts_k[1:])):
        for j in range(cu_blocks[b + 1] - cu_blocks[b]):
            first, last = begin + j * block_size, min(begin + (j + 1) * block_size, end)
            own = (sequence == b) & (position // block_size == j)
            own = own.nonzero().squeeze(1)
            for g in range(heads_k):
                bucket = g * num_blocks + cu_blocks[b] + j
                routed = entries[edges[bucket] : edges[bucket + 1]]
                # (query, head, slot) of every row that reads this block: the routed ones, then
                # the own ones.
                heads = torch.arange(g * group, (g + 1) * group, device=q.device)
                query = torch.cat([routed // max(slots * heads_q, 1), own.repeat_interleave(group)])
                head = torch.cat([routed // max(slots, 1) % heads_q, heads.repeat(own.numel())])
                slot = torch.cat(
                    [routed % max(slots, 1), torch.full_like(own, slots).repeat_interleave(group)]
                )
                if query.numel() == 0:
                    continue
                scores = q[query, head].to(dtype) @ k[first:last, g].to(dtype).T * softmax_scale
                seen = torch.arange(j * block_size, j * block_size + last - first, device=q.device)
                scores = scores.masked_fill(seen > position[query][:, None], -torch.inf)
                rows.append((query * heads_q + head) * (slots + 1) + slot)
                outs.append(scores.softmax(-1) @ v[first:last, g].to(dtype))
                lses.append(scores.logsumexp(-1))
    out = torch.zeros(tokens * heads_q * (slots + 1), head_dim, dtype=dtype, device=q.device)
    lse = torch.full((tokens * heads_q * (slots + 1),), -torch.inf, dtype=dtype, device=q.device)
    index = torch.cat(rows)
    out = out.index_put((index,), torch.cat(outs))
    lse = lse.index_put((index,), torch.cat(lses))
    return out.view(tokens, heads_q, slots + 1, head_dim), lse.view(tokens, heads_q, slots + 1)


def merge(partial_out: Tensor, partial_lse: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax over the union of the slots.

    partial_out: ``[Tq, Hq, K + 1, D]``, partial_lse: ``[Tq, Hq, K + 1]``. Returns out ``[Tq, Hq,
        D]`` and lse ``[Hq, Tq]``; a row whose slots are all empty has out 0 and lse -inf.
    """
    empty = partial_lse.isneginf().all(-1)
    # Rows without keys: log-sum-exp of a constant, so that no NaN enters the gradient.
    lse = partial_lse.masked_fill(empty[..., None], 0.0).logsumexp(-1)
    weight = (partial_lse - lse[..., None]).exp().masked_fill(empty[..., None], 0.0)
    out = (weight[..., None] * partial_out).sum(-2)
    return out, lse.masked_fill(empty, -torch.inf).T


def moba_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    block_size: int,
    topk: int,
    softmax_scale: float | None = None,
    block_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The five stages in a row.

    q: ``[Tq, Hq, D]``, k and v: ``[Tk, Hk, D]``. ``block_ids`` skips the gate and attends to a
        given selection. Returns out ``[Tq, Hq, D]`` in q's dtype, lse ``[Hq, Tq]`` (float32,
        float64 for float64) and block_ids int32 ``[Tq, Hq, K]``.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if block_ids is None:
        kbar = block_mean(k, cu_seqlens_k, block_size)
        block_ids, _ = gate_topk(
            q, kbar, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, block_size, topk
        )
    partial_out, partial_lse = attend(
        q, k, v, block_ids, cu_seqlens_q, cu_seqlens_k, block_size, scale
    )
    out, lse = merge(partial_out, partial_lse)
    return out.to(q.dtype), lse, block_ids


def block_mask(
    block_ids: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, block_size: int
) -> Tensor:
    """Boolean ``[Tq, Hq, max blocks]``: does the query attend to this block of its sequence.

    The own block is included; a picture of one head is ``plt.imshow(mask[:, head])``.
    """
    _, position = query_positions(cu_seqlens_q, cu_seqlens_k)
    own = torch.div(position, block_size, rounding_mode="floor")
    max_blocks = (
        int(block_offsets(cu_seqlens_k, block_size).diff().max()) if cu_seqlens_k.numel() > 1 else 0
    )
    block = torch.arange(max_blocks, device=block_ids.device)
    chosen = (block_ids.long()[..., None] == block).any(-2)
    return chosen | (own[:, None, None] == block)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Dense causal attention under a block mask: MoBA without blocks, partials or merging.

    mask: boolean ``[Tq, Hq, max blocks]`` from :func:`block_mask`. Materialises every score, O(M
        * L) per head. Returns out ``[Tq, Hq, D]`` in the accumulator dtype and lse ``[Hq, Tq]``.
    """
    dtype, group = _accumulator_dtype(q.dtype), q.shape[1] // k.shape[1]
    _, position = query_positions(cu_seqlens_q, cu_seqlens_k)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = (
        [q.new_zeros(0, *q.shape[1:], dtype=dtype)],
        [q.new_zeros(q.shape[1], 0, dtype=dtype)],
    )
    for begin_q, end_q, begin_k, end_k in zip(starts_q, starts_q[1:], starts_k, starts_k[1:]):
        keys = k[begin_k:end_k].to(dtype).repeat_interleave(group, dim=1)
        values = v[begin_k:end_k].to(dtype).repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[begin_q:end_q].to(dtype), keys) * softmax_scale
        index = torch.arange(end_k - begin_k, device=q.device)
        seen = mask[begin_q:end_q].transpose(0, 1)[:, :, index // block_size]
        seen = seen & (index <= position[begin_q:end_q, None])
        # A query before the first key sees nothing: let it see all, then erase its output.
        blind = ~seen.any(-1, keepdim=True)
        scores = scores.masked_fill(~(seen | blind), -torch.inf)
        weight = scores.softmax(-1).masked_fill(blind, 0.0)
        outs.append(torch.einsum("hqk,khd->qhd", weight, values))
        lses.append(scores.logsumexp(-1).masked_fill(blind.squeeze(-1), -torch.inf))
    return torch.cat(outs), torch.cat(lses, dim=1)


def naive_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    block_size: int,
    topk: int,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Gate, then dense attention under the mask of the selection, O(M * L) per head.

    Returns out ``[Tq, Hq, D]`` in q's dtype and the block mask of :func:`block_mask`.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    cu_seqlens = cu_seqlens_q, cu_seqlens_k
    kbar = block_mean(k, cu_seqlens_k, block_size)
    block_ids, _ = gate_topk(q, kbar, *cu_seqlens, max_seqlen_k, block_size, topk)
    mask = block_mask(block_ids, *cu_seqlens, block_size)
    out, _ = masked_attention(q, k, v, mask, *cu_seqlens, block_size, scale)
    return out.to(q.dtype), mask
