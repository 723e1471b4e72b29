"""The internal ops of the sm90 backend on routed rows, and what each must give in plain PyTorch."""

import math

import flash_checks
import torch
from flash_checks import NAMES
from flash_stages import DEVICE, Call, Group, Lists
from numerics import assert_within_budget
from torch import Tensor

from moba_ext import groups

SEGMENT_ROWS = 128


def to_halves(rows: Tensor) -> Tensor:
    """``[n, D]`` -> ``[2, n, D / 2]`` as csrc/cuda/sm90/stages.h has dq; D is 16, 32, 64 or 128."""
    return _swapped(rows.unflatten(1, (2, -1)).transpose(0, 1))


def from_halves(halves: Tensor) -> Tensor:
    return _swapped(halves).transpose(0, 1).flatten(1)


def _swapped(halves: Tensor) -> Tensor:
    """8 columns, the vector j of row i, go to j ^ i, which also takes them back."""
    vectors = halves.unflatten(2, (-1, 8))
    row, vector = (torch.arange(n, device=halves.device) for n in vectors.shape[1:3])
    return vectors[:, row[:, None], vector ^ row[:, None] % len(vector)].flatten(2)


class Routed:
    """The routed rows of a group, and what the ops take of them."""

    def __init__(self, call: Call, group: Group, rows: int, every_list=False, own_first=False):
        routes = call.route(group, rows, Lists(every_list, own_first))
        entries, _, offsets, segment_offsets, segment_lists, cu_rows, _ = routes
        self.call, self.group = call, group
        self.used, segments = int(offsets[-1]), int(segment_offsets[-1])
        self.entries = entries[: self.used].long()
        self.segments = cu_rows[: segments + 1]  # offsets of those that are used
        self.lists, self.counts = segment_lists[:segments].long(), segment_offsets.diff()
        _, cu_seqlens_k, cu_blocks = call.sequences
        self.arguments = (
            *(entries, segment_offsets, segment_lists, cu_rows, cu_seqlens_k, cu_blocks),
            call.case.block_size,
        )

    def places(self):
        """Query, query head and KV head of the used rows, and the tokens of their blocks."""
        case, group = self.call.case, self.group
        slots, per_head = self.call.ids.shape[-1], case.heads_q // case.heads_k
        row = torch.div(self.entries, slots, rounding_mode="floor")
        queries = group.query_end - group.query_begin
        of_query = torch.div(row, per_head, rounding_mode="floor")
        head_k = group.head_begin + torch.div(of_query, queries, rounding_mode="floor")
        query, head = group.query_begin + of_query % queries, head_k * per_head + row % per_head
        block = self.call.ids.to(DEVICE)[query, head, self.entries % slots].long()
        cu_q, cu_k = (x.long() for x in self.call.sequences[:2])
        first = cu_k[torch.searchsorted(cu_q[1:], query, right=True)] + block * case.block_size
        return query, head, head_k, first[:, None] + torch.arange(case.block_size, device=DEVICE)


def assert_rows_within_budget(got, exact, plain, what: str) -> None:
    """Of tensors [rows, heads, D], plain still to be rounded: altogether and by 16 rows."""
    plain = plain.to(got.dtype)
    assert_within_budget(got, exact, plain, what)
    flash_checks.assert_tiles_within_budget(got, exact, plain, what)


class Attended(Routed):
    """out and lse from the kernel, those of own blocks behind the others."""

    def __init__(self, call: Call, group: Group, inputs, scale: float, rows=SEGMENT_ROWS) -> None:
        super().__init__(call, group, rows, own_first=True)
        self.inputs, self.scale = inputs, scale
        results = torch.ops.moba.sm90_attend(
            *(*inputs, call.sequences[0], *self.arguments, scale, *group)
        )
        places = self.arguments[0].numel()
        self.out, self.lse = (x[:places] for x in results)
        self.own = [x[places:] for x in results]

    def exact(self, dtype: torch.dtype):
        """out and lse of the used rows, computed in a dtype."""
        q, k, v = self.inputs
        query, head, head_k, token = self.places()
        keys, values = (x[token, head_k[:, None]].to(dtype) for x in (k, v))
        scores = torch.einsum("nd,nkd->nk", q[query, head].to(dtype), keys) * self.scale
        return torch.einsum("nk,nkd->nd", scores.softmax(-1), values), scores.logsumexp(-1)

    def check(self) -> None:
        out, lse = self.out[: self.used], self.lse[: self.used]
        with flash_checks.ordinary_memory():
            (exact_out, exact_lse), (plain_out, plain_lse) = map(
                self.exact, (torch.float64, torch.float32)
            )
            size = flash_checks.score_size(*self.inputs[:2], self.scale)
            assert_rows_within_budget(out, exact_out[:, None], plain_out[:, None], "out")
            assert_within_budget(lse, exact_lse, plain_lse, "lse", max(1.0, size))
        OwnAttended(self).check()


def part_gradients(dtype: torch.dtype, dout, q, k, v, lse_log2, delta, scale, seen=None):
    """dq, dk, dv of rows [..., n, D] against keys [..., B, D], or those that are seen [n, B].

    Computed in a dtype; in float32 P and dS are rounded before the products, as for tensor cores.
    """
    rounded = q.dtype
    dout, q, k, v, lse_log2, delta = (x.to(dtype) for x in (dout, q, k, v, lse_log2, delta))
    p = (q @ k.mT * scale - lse_log2[..., None] * math.log(2)).exp()
    p = p if seen is None else p.masked_fill(~seen, 0)
    ds = p * (dout @ v.mT - delta[..., None])
    if dtype == torch.float32:
        p, ds = (x.to(rounded).float() for x in (p, ds))
    return ds @ k * scale, ds.mT @ q * scale, p.mT @ dout


def rows_of_dq(part_dq: torch.Tensor, block_size: int, dtype: torch.dtype) -> torch.Tensor:
    """[n, D], whichever way the kernel leaves it."""
    halves = block_size > groups.KEY_TILE
    assert part_dq.dtype == (torch.float32 if halves else dtype)
    return from_halves(part_dq) if halves else part_dq[:, 0]


class Own:
    """The own blocks of some KV heads."""

    def __init__(self, call: Call, heads: tuple[int, int], inputs, scale: float) -> None:
        self.call, self.heads, self.inputs, self.scale = call, heads, inputs, scale
        case = call.case
        self.group = case.heads_q // case.heads_k

    def by_token(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows as a kernel leaves them, [heads * Tq * G, ...] -> [Tq, heads * G, ...]."""
        sizes = self.heads[1] - self.heads[0], self.call.tokens_q, self.group
        return rows.unflatten(0, sizes).transpose(0, 1).flatten(1, 2)

    def blocks(self, query_begin: int = 0, query_end: int = 2**31):
        """Queries and keys of every block that has both, and which of the keys its rows see."""
        cu_q, cu_k = self.call.own_cu_q.tolist(), self.call.own_cu_k.tolist()
        for queries, keys in zip(zip(cu_q, cu_q[1:]), zip(cu_k, cu_k[1:])):
            queries, keys = slice(*queries), slice(*keys)
            if queries.start < queries.stop and keys.start < keys.stop:
                key = torch.arange(keys.start - keys.stop, 0, device=DEVICE)
                query = torch.arange(queries.start - queries.stop, 0, device=DEVICE)
                first, last = (
                    min(max(x, query_begin), query_end) for x in (queries.start, queries.stop)
                )
                query = query[first - queries.start : last - queries.start]
                if first < last:
                    seen = key <= query.repeat_interleave(self.group)[:, None]
                    yield slice(first, last), keys, seen

    def rows(self, queries: slice, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Of [Tq, Hq, ...] tensors, [heads, n * G, ...]."""
        group = Group(*self.heads, queries.start, queries.stop)
        return [self.call.by_row(x, group).flatten(1, 2) for x in tensors]

    def keys(self, keys: slice, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Of [Tk, Hk, D] tensors, [heads, B, D]."""
        return [x[keys, slice(*self.heads)].transpose(0, 1) for x in tensors]


class OwnAttended(Own):
    """out and lse [Tq, heads * G, 1] of own blocks, NaN beyond the group's queries."""

    def __init__(self, attended: Attended) -> None:
        self.queries = attended.group[2:]
        super().__init__(attended.call, attended.group[:2], attended.inputs, attended.scale)
        out, lse = attended.own
        self.results = self.by_token(out[:, 0]), self.by_token(lse[:, None])

    def exact(self, dtype: torch.dtype):
        """The same, computed in a dtype; NaN where a query has no keys."""
        q, k, v = self.inputs
        results = [torch.full_like(x, torch.nan, dtype=dtype) for x in self.results]
        for queries, keys, seen in self.blocks(*self.queries):
            (rows,), (of_k, of_v) = self.rows(queries, q.to(dtype)), self.keys(keys, k, v)
            scores = (rows @ of_k.to(dtype).mT * self.scale).masked_fill(~seen, -torch.inf)
            parts = scores.softmax(-1) @ of_v.to(dtype), scores.logsumexp(-1)[..., None]
            for to, x in zip(results, parts):
                to[queries] = x.unflatten(1, (-1, self.group)).transpose(0, 1).flatten(1, 2)
        return results

    def check(self) -> None:
        """Wants ``poisoned``: results are NaN exactly where exact() says so."""
        with flash_checks.ordinary_memory():
            exact, plain = map(self.exact, (torch.float64, torch.float32))
            for name, x, y, z in zip(NAMES, self.results, exact, plain):
                there = ~y[:, 0, 0].isnan()
                assert bool(x[~there].isnan().all()), f"{name}: written where nothing is"
                self.check_rows(name, x[there], y[there], z[there])

    def check_rows(self, name: str, got, exact, plain) -> None:
        if name == "out":
            return assert_rows_within_budget(got, exact, plain, name)
        size = flash_checks.score_size(*self.inputs[:2], self.scale)
        return assert_within_budget(got, exact, plain, name, max(1.0, size))


class Backward(Routed):
    """Gradients from the kernel, of dout, q, k, v, lse_log2, delta; check() wants ``poisoned``."""

    def __init__(self, call: Call, group: Group, inputs, scale: float, rows: int) -> None:
        super().__init__(call, group, rows, every_list=True)
        self.inputs, self.scale = inputs, scale
        self.own = Own(call, group[:2], inputs, scale)
        dq, own_dq, *results = torch.ops.moba.sm90_attend_backward(
            *inputs, call.sequences[0], *self.arguments, scale, *group
        )
        self.packs, self.grads = results[:2], results[2:]
        dq, own_dq = (rows_of_dq(x, call.case.block_size, inputs[1].dtype) for x in (dq, own_dq))
        self.dq, self.own_dq = dq[:, None], self.own.by_token(own_dq)

    def keys(self):
        """Tokens of the used segments' blocks, which of them exist, and the KV heads."""
        case, (_, cu_k, cu_blocks) = self.call.case, self.call.sequences
        heads = self.group.head_end - self.group.head_begin
        block = torch.div(self.lists, heads, rounding_mode="floor")
        sequence = torch.searchsorted(cu_blocks[1:], block, right=True)
        in_use = sequence < len(cu_k) - 1
        sequence = sequence.clamp(max=len(cu_k) - 2)
        first = cu_k[sequence] + (block - cu_blocks[sequence]) * case.block_size
        token = first[:, None] + torch.arange(case.block_size, device=DEVICE)
        there = (token < cu_k[sequence + 1][:, None]) & in_use[:, None]
        return token.where(there, 0), there, (self.group.head_begin + self.lists % heads)[:, None]

    def by_segment(self) -> list[torch.Tensor]:
        """dk and dv [segments, B, D], NaN beyond the keys of a block: a list's only segment writes
        the tensors themselves, if it has all queries."""
        size, (token, there, head_k) = self.call.case.block_size, self.keys()
        queries = self.group.query_end - self.group.query_begin
        direct = there & (self.counts[self.lists] == 1)[:, None] & (queries == self.call.tokens_q)
        results = []
        for pack, grad in zip(self.packs, self.grads):
            rest, pack = pack[there.numel() :], pack[: there.numel(), 0].unflatten(0, (-1, size))
            assert bool(pack[direct | ~there].isnan().all() & rest.isnan().all()), "wrote elsewhere"
            results.append(torch.where(direct[..., None], grad[token, head_k], pack))
            grad[token[direct], head_k.expand_as(token)[direct]] = torch.nan
            assert bool(grad.isnan().all()), "wrote what other segments, or heads, have a part in"
        return results

    def results(self) -> tuple[torch.Tensor, ...]:
        """dq of the used rows and of own blocks', dk and dv by segment, without NaN."""
        return self.dq[: self.used], *(x.nan_to_num(7) for x in (self.own_dq, *self.by_segment()))

    def exact(self, dtype: torch.dtype):
        """dq of the used rows, own_dq, dk and dv by segment, computed in a dtype: rows by segment,
        [segments, rows of the longest]. NaN where there is nothing to write."""
        dout, q, k, v, lse_log2, delta = self.inputs
        token, exists, head_k = self.keys()
        first, last = self.segments[:-1, None].long(), self.segments[1:, None]
        row = first + torch.arange(max(int((last - first).max()), 1), device=DEVICE)
        there = row < last
        query, head, *_ = self.places() if self.used else 2 * [self.lists.new_zeros(1)]
        query, head = (x[row.clamp(max=max(self.used - 1, 0))] for x in (query, head))
        of_rows = lse_log2[head, query].masked_fill(~there, torch.inf), delta[head, query]
        dq, *dkv = part_gradients(
            *(dtype, dout[query, head], q[query, head], k[token, head_k], v[token, head_k]),
            *(*of_rows, self.scale),
        )
        own_dq, *own_dkv = self.exact_own(dtype)
        first_of_list = self.lists.diff(prepend=self.lists.new_full((1,), -1)) != 0
        for x, own in zip(dkv, own_dkv):
            own = own[token, head_k - self.group.head_begin].nan_to_num(0)
            x += own.where(first_of_list[:, None, None], 0)
            x[~exists] = torch.nan
        return dq[there][:, None], own_dq, *dkv

    def exact_own(self, dtype: torch.dtype):
        """dq [Tq, heads * G, D], dk and dv [Tk, heads, D] of own blocks and the group's queries;
        NaN for queries without keys and keys without queries."""
        own, (dout, q, k, v, lse_log2, delta) = self.own, self.inputs
        tensors = self.own_dq, *(x[:, slice(*self.group[:2])] for x in (k, v))
        grads = [torch.full_like(x, torch.nan, dtype=dtype) for x in tensors]
        for queries, keys, seen in own.blocks(*self.group[2:]):
            dout_rows, q_rows, *of_rows = own.rows(queries, dout, q, lse_log2.T, delta.T)
            of_keys = own.keys(keys, k, v)
            dq, *dkv = part_gradients(
                dtype, dout_rows, q_rows, *of_keys, *of_rows, self.scale, seen
            )
            grads[0][queries] = dq.unflatten(1, (-1, own.group)).transpose(0, 1).flatten(1, 2)
            for grad, x in zip(grads[1:], dkv):
                grad[keys] = x.transpose(0, 1)
        return grads

    def check(self) -> None:
        assert bool(self.dq[self.used :].isnan().all()), "wrote beyond what is used"
        results = self.dq[: self.used], self.own_dq, *self.by_segment()
        with flash_checks.ordinary_memory():
            exact, plain = map(self.exact, (torch.float64, torch.float32))
            for name, x, y, z in zip(("dq", "own dq", "dk", "dv"), results, exact, plain):
                there = ~y[..., 0].isnan()
                assert bool(x[~there].isnan().all()), f"{name}: written where nothing is"
                if there.any():
                    x, y, z = (t[there][:, None] for t in (x, y, z))
                    assert_rows_within_budget(x.to(self.inputs[1].dtype), y, z, name)


def stage_inputs(call: Call, dtype: torch.dtype) -> list[torch.Tensor]:
    case = call.case
    heads = case.heads_q, case.heads_k, case.heads_k
    tokens = call.tokens_q, call.tokens_k, call.tokens_k
    shapes = [(t, h, case.head_dim) for t, h in zip(tokens, heads)]
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
