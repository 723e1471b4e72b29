"""Calls of the flash backend's internal ops, and what each must give in plain PyTorch."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from numerics import Case, self_attention
from torch import Tensor

from moba_ext import reference

DEVICE = "cuda"

# GQA 1, 4, 8, 16; empty, tiny and long sequences; chunked prefill; queries before the first key.
CASES = [
    self_attention(700, 4, 4, 64, 16, 4),
    self_attention([0, 1, 130, 3, 0, 64, 17, 0], 4, 1, 8, 8, 8),
    self_attention(300, 16, 2, 72, 32, 3),
    self_attention(200, 16, 1, 128, 16, 12),
    Case([5, 0, 200, 1, 40], [90, 7, 240, 0, 25], 8, 2, 128, 16, 6),
    Case([50, 9], [20, 3], 2, 1, 256, 8, 3),
    self_attention(90, 2, 2, 64, 16, 1),  # no slots
]


class Group(NamedTuple):
    head_begin: int
    head_end: int
    query_begin: int
    query_end: int


class Lists(NamedTuple):
    """What lists route makes, and with which segments (Routes, csrc/cuda/stages.h)."""

    every_list: bool = False
    own_first: bool = False
    range_queries: int = 0
    own_apart: bool = False


BY_BLOCK = Lists()


class Call(NamedTuple):
    """A batch on the CPU with a random choice of past blocks, and its metadata on the device."""

    case: Case
    cu_seqlens: tuple[Tensor, Tensor]
    ids: Tensor  # [Tq, Hq, K]
    cu_blocks: Tensor
    own_cu_q: Tensor
    own_cu_k: Tensor

    @property
    def tokens_q(self) -> int:
        return sum(self.case.lengths_q)

    @property
    def tokens_k(self) -> int:
        return sum(self.case.lengths_k)

    @property
    def num_blocks(self) -> int:
        return self.tokens_k // self.case.block_size + len(self.case.lengths_k)

    @property
    def sequences(self) -> tuple[Tensor, Tensor, Tensor]:
        """The device's cu_seqlens_q, cu_seqlens_k, cu_blocks."""
        return *(x.to(DEVICE) for x in self.cu_seqlens), self.cu_blocks

    def groups(self) -> list[Group]:
        """Everything in one; then every head apart, in uneven ranges of queries."""
        heads, tokens = self.case.heads_k, self.tokens_q
        cuts = [0, tokens // 3, tokens // 3, tokens]
        ranges = itertools.product(range(heads), zip(cuts, cuts[1:]))
        return [Group(0, heads, 0, tokens), *(Group(h, h + 1, *cut) for h, cut in ranges)]

    def has_keys(self) -> Tensor:
        return reference.query_positions(*self.cu_seqlens)[1] >= 0

    def route(self, group: Group, segment_rows: int, kind: Lists = BY_BLOCK):
        """entries, positions, offsets, segment_offsets, segment_lists, cu_rows, cu_keys."""
        cu_seqlens_q, cu_seqlens_k, cu_blocks = self.sequences
        case = self.case
        return torch.ops.moba.flash_route(
            *(self.ids.to(DEVICE), cu_seqlens_q, cu_blocks, self.tokens_k, case.heads_k),
            *(case.block_size, segment_rows, *group, kind.every_list, kind.own_first),
            *(cu_seqlens_k, kind.range_queries, kind.own_apart),
        )

    def wanted_route(self, group: Group, segment_rows: int, kind: Lists = BY_BLOCK):
        """The same, of entries those that are used."""
        every_list, own_first, range_queries, own_apart = kind
        cu_blocks = reference.block_offsets(self.cu_seqlens[1], self.case.block_size)
        sequence, _ = reference.query_positions(*self.cu_seqlens)
        first, blocks = cu_blocks[sequence], cu_blocks.diff()[sequence]
        head = torch.arange(self.case.heads_k)[:, None, None, None] - group.head_begin
        ids = self.by_row(self.ids.long(), group)
        first, blocks = (
            x[None, group.query_begin : group.query_end, None, None] for x in (first, blocks)
        )
        head = head[group.head_begin : group.head_end]
        queries = torch.arange(group.query_end - group.query_begin)
        ranges = max(-(-queries.numel() // range_queries), 1) if range_queries else 1
        query_range = queries // max(range_queries, 1) if range_queries else queries * 0
        sections = all_ranges = head.shape[0] * ranges
        if own_apart:  # of entries 0, 1, 3, 5, ..., the others of own queries
            sections *= 2
        lists = sections * self.num_blocks
        chosen = (ids >= 0) & (ids < blocks)
        if range_queries:
            section = head * ranges + query_range[None, :, None, None]
            if own_apart:
                section = (2 * section - 1).clamp(min=0)
            bucket = section * self.num_blocks + first + ids
        else:
            bucket = (first + ids) * head.shape[0] + head
        bucket = torch.where(chosen, bucket, lists).reshape(-1)
        bucket, entries = bucket.sort(stable=True)
        offsets = torch.searchsorted(bucket, torch.arange(lists + 1))
        entries = entries[: int(offsets[-1])]
        positions = torch.full((ids.numel(),), -1)
        positions[entries] = torch.arange(entries.numel())
        own = torch.zeros(ranges * self.num_blocks, dtype=torch.long)  # queries of a head
        if own_first or own_apart:
            position = reference.query_positions(*self.cu_seqlens)[1]
            block = reference.block_offsets(self.cu_seqlens[1], self.case.block_size)[sequence]
            block += position.clamp(min=0) // self.case.block_size
            of_group = slice(group.query_begin, group.query_end)
            block = (query_range * self.num_blocks + block[of_group])[position[of_group] >= 0]
            own += block.bincount(minlength=own.numel())
        heads = head.shape[0]
        own = own.repeat(heads) if range_queries else own.repeat_interleave(heads)
        own = -(-own * ids.shape[2] // segment_rows)
        if own_apart:
            section = (2 * torch.arange(all_ranges) + 2).clamp(max=sections - 1)
            of_ranges, own = own.view(-1, self.num_blocks), own.new_zeros(sections, self.num_blocks)
            own[section] = of_ranges
            own = own.view(-1)
        counts = own - (-offsets.diff() // segment_rows)
        counts = counts.clamp(min=int(every_list))
        segment_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        used = int(segment_offsets[-1])
        most = lists - (-ids.numel() // segment_rows)
        if own_first or own_apart:
            most -= -ids.shape[:3].numel() // segment_rows
        if own_first:
            most += lists
        segment_lists = torch.full((most,), -1)
        segment_lists[:used] = torch.arange(lists).repeat_interleave(counts)
        cu_rows = torch.full((most + 1,), entries.numel())
        of_list = segment_lists[:used]
        within = torch.arange(used) - segment_offsets[of_list] - own[of_list]
        cu_rows[:used] = offsets[segment_lists[:used]] + within.clamp(min=0) * segment_rows
        cu_keys = torch.arange(most + 1).clamp(max=used) * self.case.block_size
        return entries, positions, offsets, segment_offsets, segment_lists, cu_rows, cu_keys

    def by_row(self, x: Tensor, group: Group) -> Tensor:
        """``[Tq, Hq, ...]`` -> ``[heads, queries, G, ...]`` of the group."""
        x = x[group.query_begin : group.query_end].unflatten(1, (self.case.heads_k, -1))
        return x[:, group.head_begin : group.head_end].transpose(0, 1)


def make_call(case: Case, hot: bool = False) -> Call:
    """hot: every query that can takes block 0."""
    cu_seqlens = case.cu_seqlens()
    cu_blocks, own_cu_q, own_cu_k = metadata(case, cu_seqlens)
    sequence, position = reference.query_positions(*cu_seqlens)
    slots = reference.num_slots(case.max_seqlen_k, case.block_size, case.topk)
    past = torch.div(position, case.block_size, rounding_mode="floor").clamp(min=0)
    # Distinct ids by ranking random scores of all blocks, where those are few enough to list.
    shape = (position.numel(), case.heads_q)
    most = int(past.max()) if past.numel() else 0
    if most <= 1000:
        score = torch.rand(*shape, max(most, slots, 1))
        if hot:
            score[..., 0] = 2
        score[(torch.arange(score.shape[-1]) >= past[:, None])[:, None].expand_as(score)] = -1
        score, ids = score.topk(slots, dim=-1)
        ids = torch.where(score < 0, torch.iinfo(torch.int32).max, ids).sort(-1).values
        ids[ids == torch.iinfo(torch.int32).max] = -1
    else:
        ids = (torch.rand(*shape, slots) * past[:, None, None]).long().sort(-1).values
        ids[past == 0] = -1
    return Call(case, cu_seqlens, ids.int(), cu_blocks, own_cu_q, own_cu_k)


def metadata(case: Case, cu_seqlens: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.moba.flash_metadata(
        *(x.to(DEVICE) for x in cu_seqlens),
        *(sum(case.lengths_q), sum(case.lengths_k), case.max_seqlen_q, case.max_seqlen_k),
        case.block_size,
    )


def misaligned(x: Tensor) -> Tensor:
    """The same values on the device, in memory that no 16-byte load can read."""
    wide = torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 3), torch.nan, dtype=x.dtype)
    wide = wide.to(DEVICE)
    wide[:, 1:, 3:] = x.to(DEVICE)
    return wide[:, 1:, 3:]


def head_major(x: Tensor) -> Tensor:
    """The same values on the device, heads apart in memory."""
    return x.transpose(0, 1).contiguous().to(DEVICE).transpose(0, 1)


INVALID = [[0, 5], [1, 100], [0, 120, 100], [0, -5, 100], [0, 2**31 - 1, 100], [-(2**31), 100]]


def invalid_call(values: list[int], topk: int = 3) -> Call:
    """100 tokens whose cu_seqlens are wrong; the ids would be right for right ones."""
    call = make_call(self_attention(100, 2, 1, 64, 16, topk))
    cu_seqlens = (torch.tensor(values, dtype=torch.int32),) * 2
    return call._replace(
        cu_seqlens=cu_seqlens,
        **dict(zip(("cu_blocks", "own_cu_q", "own_cu_k"), metadata(call.case, cu_seqlens))),
    )
