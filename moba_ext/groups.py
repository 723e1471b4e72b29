"""How a call on CUDA tensors is cut into groups: KV heads x queries, routed and merged at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import varlen

ROW_TILE = 128  # rows of a tile of FlashAttention, and of a segment of sm90's forward
KEY_TILE = 128  # keys that either has on chip


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class Call(NamedTuple):
    """The sizes of a call, tokens and heads of all sequences together."""

    batch: int
    tokens_q: int
    tokens_k: int
    max_seqlen_k: int
    heads_q: int
    heads_k: int
    head_dim: int
    block_size: int
    topk: int

    def tensor_bytes(self, backward: bool) -> int:
        """Of q, k, v and out, in the backward also their gradients."""
        rows = self.heads_q * self.tokens_q + self.heads_k * self.tokens_k
        return (2 if backward else 1) * 4 * self.head_dim * rows

    def counts(self, heads: int, queries: int, segment_rows: int) -> tuple[int, int]:
        """Entries of a group, and the segments that hold them, of blocks that are routed."""
        entries = heads * queries * (self.heads_q // self.heads_k) * (self.topk - 1)
        lists = heads * (self.tokens_k // self.block_size + self.batch)
        return entries, lists + ceil_div(entries, segment_rows)


class Plan(NamedTuple):
    """How a call runs.

    dense: topk * block_size covers every sequence: one causal call, no routing.
    block_size: of own blocks and routing; the longest sequence where dense.
    slots: past blocks per query that are routed, 0 where dense or topk is 1: then no group is.
    segment_rows: most rows of a segment of a block's list.
    heads_per_group, queries_per_group: what is routed and merged at a time.
    at_once: groups of heads that run at the same time, on two streams.
    own_heads: KV heads whose own blocks are attended at once (the backward of flash).
    merging: a group has all queries; rows of queries_per_group of a head are merged by the kernel
        that attends the next ones (the forward of sm90).
    """

    dense: bool
    block_size: int
    slots: int
    segment_rows: int
    heads_per_group: int
    queries_per_group: int
    heads: int
    queries: int
    at_once: int
    own_heads: int = 0
    merging: bool = False

    def head_ranges(self) -> list[tuple[int, int]]:
        return varlen.ranges(self.heads, self.heads_per_group)

    def query_ranges(self) -> list[tuple[int, int]]:
        return varlen.ranges(self.queries, self.queries_per_group)


def make_plan(
    call: Call, segment_rows: int, fits: Callable[[int, int], bool], at_once: int = 1
) -> Plan:
    """The fewest groups of equal size of which ``fits(entries, segments)``; else the smallest."""
    longest = max(min(call.max_seqlen_k, call.tokens_k), 1)
    heads_k, tokens_q = call.heads_k, call.tokens_q
    dense = call.topk * call.block_size >= longest
    if dense or call.topk == 1:
        block_size = longest if dense else call.block_size
        return Plan(dense, block_size, 0, 1, heads_k, tokens_q, heads_k, tokens_q, 1)

    def small(heads: int, queries: int) -> bool:
        entries, segments = call.counts(heads, queries, segment_rows)
        offsets = entries, segments * call.block_size, 2 * heads * call.tokens_k  # int32
        return max(offsets) < 2**31 and fits(entries, segments)

    counts = (ceil_div(heads_k, sets) for sets in range(1, heads_k))
    heads = next((n for n in counts if small(n, tokens_q)), 1)
    # Shorter ranges copy each block's keys for ever fewer rows: a tile per list is the least.
    lists = call.tokens_k // call.block_size + call.batch
    least = ceil_div(ROW_TILE * lists, call.heads_q // heads_k * (call.topk - 1))
    parts = (ceil_div(tokens_q, n) for n in range(1, ceil_div(tokens_q, least)))
    queries = next((n for n in parts if small(heads, n)), min(least, tokens_q))
    sizes = call.topk - 1, segment_rows, heads, queries, heads_k, tokens_q
    return Plan(False, call.block_size, *sizes, at_once)
