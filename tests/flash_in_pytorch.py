"""The flash backend's CUDA stages and FlashAttention itself as plain PyTorch on any device.

They hold what moba_ext/flash.py composes apart from the kernels, so that its groups, ranges and
bookkeeping are tested without a GPU. What the real ones leave unwritten is NaN here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moba_ext import reference


def flash_metadata(cu_q, cu_k, tokens_q, tokens_k, max_q, max_k, block_size):
    queries, keys = [0], [0]
    cu_blocks = reference.block_offsets(cu_k, block_size)
    for length_q, length_k in zip(cu_q.diff().tolist(), cu_k.diff().tolist()):
        assert length_q <= max_q and length_k <= max_k
        bounds = [max(length_k - length_q, 0), *range(block_size, length_k, block_size), length_k]
        queries.append(max(length_q - length_k, 0))
        keys.append(0)
        for begin in range(0, length_k, block_size):
            end = min(begin + block_size, length_k)
            queries.append(max(end - max(begin, bounds[0]), 0))
            keys.append(end - begin)
    unused = [0] * (tokens_k // block_size + 2 * (len(cu_q) - 1) + 1 - len(queries))
    return cu_blocks, *(torch.tensor(x + unused).cumsum(0).int() for x in (queries, keys))


def _row_places(entries: Tensor, slots: int, group: int, bounds) -> tuple[Tensor, Tensor]:
    """Query and query head of entries."""
    head_begin, _, query_begin, query_end = bounds
    row = torch.div(entries, slots, rounding_mode="floor")
    of_query, member = row // group, row % group
    head = head_begin + of_query // (query_end - query_begin)
    return query_begin + of_query % (query_end - query_begin), head * group + member


def flash_route(ids, cu_q, cu_blocks, tokens_k, heads_k, block_size, segment_rows, *bounds):
    head_begin, head_end, query_begin, query_end = bounds
    heads, group = head_end - head_begin, ids.shape[1] // heads_k
    num_blocks = tokens_k // block_size + len(cu_q) - 1
    lists = heads * num_blocks
    query = torch.arange(query_begin, query_end)
    first = cu_blocks[torch.searchsorted(cu_q[1:].long(), query, right=True)]
    mine = ids[query_begin:query_end].long().unflatten(1, (heads_k, group))[:, head_begin:head_end]
    mine = mine.transpose(0, 1)
    bucket = (first[None, :, None, None] + mine) * heads + torch.arange(heads)[:, None, None, None]
    bucket = torch.where(mine >= 0, bucket, lists).reshape(-1)
    bucket, entries = bucket.sort(stable=True)
    offsets = torch.searchsorted(bucket, torch.arange(lists + 1))
    total = int(offsets[-1])
    positions = torch.full((entries.numel(),), -1)
    positions[entries[:total]] = torch.arange(total)
    counts = -(-offsets.diff() // segment_rows)
    segment_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    used, most = int(segment_offsets[-1]), lists - (-entries.numel() // segment_rows)
    segment_lists = torch.full((most,), -1)
    segment_lists[:used] = torch.arange(lists).repeat_interleave(counts)
    cu_rows = torch.full((most + 1,), total)
    within = torch.arange(used) - segment_offsets[segment_lists[:used]]
    cu_rows[:used] = offsets[segment_lists[:used]] + within * segment_rows
    cu_keys = torch.arange(most + 1).clamp(max=used) * block_size
    results = entries, positions, offsets, segment_offsets, segment_lists, cu_rows, cu_keys
    return tuple(x.int() for x in results)


def flash_gather(sources, lse, entries, offsets, heads_k, *bounds):
    heads_q = sources[0].shape[1]
    rows = (bounds[1] - bounds[0]) * (bounds[3] - bounds[2]) * (heads_q // heads_k)
    used = int(offsets[-1])
    query, head = _row_places(
        entries[:used].long(), entries.numel() // rows, heads_q // heads_k, bounds
    )
    packed = []
    for source in sources:
        to = torch.full((entries.numel(), 1, source.shape[2]), torch.nan, dtype=source.dtype)
        to[:used, 0] = source[query, head]
        packed.append(to)
    if lse is not None:
        packed.append(torch.full((entries.numel(),), torch.nan))
        packed[-1][:used] = lse[head, query]
    return packed


def flash_gather_keys(
    k, v, cu_k, cu_blocks, segment_lists, cu_keys, block_size, head_begin, head_end
):
    packs = [
        torch.full((len(segment_lists), block_size, k.shape[2]), torch.nan, dtype=k.dtype)
        for _ in range(2)
    ]
    for i, place in enumerate(segment_lists.tolist()):
        if place < 0:
            continue
        row, head = divmod(place, head_end - head_begin)
        sequence = int(torch.searchsorted(cu_blocks[1:], row, right=True))
        begin = int(cu_k[sequence]) + (row - int(cu_blocks[sequence])) * block_size
        for pack, x in zip(packs, (k, v)):
            pack[i] = x[begin : begin + block_size, head_begin + head]
    return tuple(pack.view(-1, 1, k.shape[2]) for pack in packs)


def _parts(positions, part, own, cu_q, cu_k, heads_k, bounds, out):
    """Rows' parts [heads, queries, G, K + 1, ...], which are empty, and the place in `out`."""
    head_begin, head_end, query_begin, query_end = bounds
    heads, group = head_end - head_begin, out.shape[1] // heads_k
    own = own[query_begin:query_end].unflatten(1, (heads, group)).transpose(0, 1)
    at = positions.long().view(heads, query_end - query_begin, group, -1)
    blind = (reference.query_positions(cu_q, cu_k)[1] < 0)[query_begin:query_end]
    empty = torch.cat([at < 0, blind[None, :, None, None].expand(*at.shape[:3], 1)], -1)
    picked = part[at.clamp(min=0)] if at.shape[-1] else own[:, :, :, None][:, :, :, :0]
    place = slice(query_begin, query_end), slice(head_begin * group, head_end * group)
    return torch.cat([picked, own[:, :, :, None]], 3), empty, place


def _put(out, place, rows):
    out[place] = rows.transpose(0, 1).flatten(1, 2).to(out.dtype)


def flash_merge(positions, part_out, part_lse, own_out, own_lse, cu_q, cu_k, _, heads_k, *rest):
    *bounds, out, lse = rest
    sequences = cu_q, cu_k, heads_k, bounds, out
    parts, empty, place = _parts(positions, part_out[:, 0].float(), own_out.float(), *sequences)
    lses, _, _ = _parts(positions, part_lse.reshape(-1), own_lse.T, *sequences)
    lses = lses.masked_fill(empty, -torch.inf)
    parts = parts.masked_fill(empty[..., None], 0)
    top = lses.logsumexp(-1)
    weight = (lses - top[..., None]).exp().masked_fill(empty, 0)
    _put(out, place, (weight[..., None] * parts).sum(3))
    _put(lse.T, place, top)


def flash_merge_backward(positions, part_dq, own_dq, cu_q, cu_k, _, heads_k, *rest):
    *bounds, dq = rest
    sequences = cu_q, cu_k, heads_k, bounds, dq
    parts, empty, place = _parts(positions, part_dq[:, 0].float(), own_dq.float(), *sequences)
    _put(dq, place, parts.masked_fill(empty[..., None], 0).sum(3))


def flash_reduce_keys(segment_offsets, dk_pack, dv_pack, own_dk, own_dv, cu_q, cu_k, cu_blocks,
                      block_size, first, last, sum_dk, sum_dv, dk, dv):  # fmt: skip
    _, heads, head_dim = dk.shape
    for pack, own, carried, out in (
        (dk_pack, own_dk, sum_dk, dk),
        (dv_pack, own_dv, sum_dv, dv),
    ):
        total = own.float() if first else carried.clone()
        pack = pack.view(-1, block_size, head_dim).float()
        for b, (begin, end) in enumerate(zip(cu_k.tolist(), cu_k.tolist()[1:])):
            owned = end - int(cu_q[b + 1] - cu_q[b])  # first key whose position is a query's
            for j in range(int(cu_blocks[b + 1] - cu_blocks[b])):
                keys = slice(begin + j * block_size, min(begin + (j + 1) * block_size, end))
                if first and keys.stop <= owned:
                    total[keys] = 0
                for head in range(heads):
                    row = (int(cu_blocks[b]) + j) * heads + head
                    for segment in range(*segment_offsets[row : row + 2].tolist()):
                        total[keys, head] += pack[segment, : keys.stop - keys.start]
        if carried is not None:
            carried.copy_(total)
        if last:
            out.copy_(total)


def _calls(sequences):
    """Rows (as many as FlashAttention looks at) and keys of every sequence."""
    bounds_q, bounds_k = sequences.cu_q.tolist(), sequences.cu_k.tolist()
    for b in range(len(bounds_q) - 1):
        length_q = min(bounds_q[b + 1] - bounds_q[b], sequences.max_q)
        assert bounds_k[b + 1] - bounds_k[b] <= sequences.max_k
        if length_q > 0:
            yield slice(bounds_q[b], bounds_q[b] + length_q), slice(*bounds_k[b : b + 2])


def _scores(q, k, scale, causal):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    if causal:
        index = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
        s = s.masked_fill(torch.arange(k.shape[0]) > index, -torch.inf)
    return s


def forward_call(q, k, v, sequences, scale, causal):
    out = torch.full_like(q, torch.nan)  # with the strides of q, as torch's own FlashAttention does
    lse = torch.full((q.shape[1], q.shape[0]), torch.nan)
    group = q.shape[1] // k.shape[1]
    for rows, keys in _calls(sequences):
        s = _scores(q[rows], k[keys], scale, causal)
        if s.shape[-1] == 0:
            out[rows], lse[:, rows] = 0, torch.inf
            continue
        values = v[keys].float().repeat_interleave(group, 1)
        out[rows] = torch.einsum("hqk,khd->qhd", s.softmax(-1), values).to(q.dtype)
        lse[:, rows] = s.logsumexp(-1)
    return out, lse


def backward_call(dout, q, k, v, out, lse, sequences, scale, causal, places=(None, None, None)):
    out = out.clone()  # may be the place of dq
    grads = [
        x.new_full(x.shape, torch.nan) if place is None else place.fill_(torch.nan)
        for x, place in zip((q, k, v), places)
    ]
    begin, end = sequences.cu_k[0], sequences.cu_k[-1]
    for grad in grads[1:]:
        grad[begin:end] = 0
    delta = (dout.float() * out.float()).sum(-1).T
    for rows, keys in _calls(sequences):
        inputs = dout[rows], q[rows], k[keys], v[keys], lse[:, rows], delta[:, rows]
        _put_gradients(grads, rows, keys, _gradients(*inputs, scale, causal))
    return tuple(grads)


def _gradients(dout, q, k, v, lse, delta, scale, causal):
    """Of q, k, v, by the weights that lse [heads, rows] gives."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
    p = (_scores(q, k, scale, causal) - lse[..., None]).exp()
    dp = torch.einsum("qhd,khd->hqk", dout.float(), values)
    ds = p * (dp - delta[..., None]) * scale
    return (
        torch.einsum("hqk,khd->qhd", ds, keys),
        torch.einsum("hqk,qhd->khd", ds, q.float()).unflatten(1, (-1, group)).sum(2),
        torch.einsum("hqk,qhd->khd", p, dout.float()).unflatten(1, (-1, group)).sum(2),
    )


def _put_gradients(grads, rows: slice, keys: slice, results) -> None:
    for grad, place, result in zip(grads, (rows, keys, keys), results):
        grad[place] = result.to(grad.dtype)


def take_turns(run, groups, at_once, device):
    """Without streams."""
    for group in groups:
        run(*group)
