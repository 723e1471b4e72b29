"""What the kernels of the sm90 backend compute, each alone, on a Hopper GPU."""

import math

import flash_checks
import pytest
import torch
from flash_checks import NAMES
from flash_stages import (
    CASES,
    DEVICE,
    INVALID,
    Call,
    Group,
    Lists,
    head_major,
    invalid_call,
    make_call,
    misaligned,
)
from numerics import Case, assert_within_budget, self_attention
from torch import Tensor

from moba_ext import groups

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("flash_attention")]

DTYPES = [torch.bfloat16, torch.float16]
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", [1, 16, 64, 100, 128, 192, 300, 512])
def test_block_sizes(block_size, head_dim, dtype, poisoned):
    call = make_call(self_attention([900, 0, 1100], 4, 2, head_dim, block_size, 3), hot=True)
    for group in call.groups():
        Attended(call, group, stage_inputs(call, dtype), head_dim**-0.5).check()


@pytest.mark.parametrize("case", [c for c in CASES if c.head_dim in (64, 128) and c.topk > 1])
def test_groups_and_short_segments(case, poisoned):
    call = make_call(case)
    for group in call.groups():
        for rows in (1, 7, 64, 65, 128):
            inputs = stage_inputs(call, torch.bfloat16)
            Attended(call, group, inputs, 0.2, rows).check()


# By how much, in nats, the scores of a tile of keys are above those of the one before: four tiles,
# two, and one stay within what a maximum may be behind, 5.5 nats.
@pytest.mark.parametrize("step", [1.0, 4.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_rise_within_a_block(dtype, step, poisoned):
    scale, block_size = 0.125, 4 * groups.KEY_TILE
    call = make_call(self_attention([1100, 700], 1, 1, 128, block_size, 3))
    for group in call.groups():
        q, k, v = stage_inputs(call, dtype)
        token = torch.cat([torch.arange(n, device=DEVICE) for n in call.case.lengths_k])
        tile = token % block_size // groups.KEY_TILE
        q[..., 0], k[..., 0] = 1.0, (tile * step / scale)[:, None]
        Attended(call, group, [q, k, v], scale).check()


def backward_inputs(call: Call, dtype: torch.dtype) -> list[torch.Tensor]:
    """dout, q, k, v, lse_log2, delta: the last two as if they were of rows with more keys."""
    q, k, v = stage_inputs(call, dtype)
    lse_log2, delta = (torch.randn(q.shape[1::-1], device=DEVICE) for _ in range(2))
    return [torch.randn_like(q), q, k, v, lse_log2 + 3, delta]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", [16, 64, 100, 128, 192, 256, 300, 512])
def test_backward_block_sizes(block_size, head_dim, dtype, poisoned):
    call = make_call(self_attention([900, 0, 1, 1100], 4, 2, head_dim, block_size, 3), hot=True)
    inputs = backward_inputs(call, dtype)
    for group in call.groups():
        for rows in (1024, 64, 37):
            Backward(call, group, inputs, head_dim**-0.5, rows).check()


SMALL = [
    Case([5, 0, 200, 1, 40], [90, 7, 240, 0, 25], 8, 2, 128, 16, 6),
    Case([300, 2, 0], [700, 500, 300], 4, 2, 64, 160, 3),
    self_attention([90, 0, 31], 3, 1, 64, 1, 4),
    self_attention([300, 9], 6, 2, 128, 130, 3),
    self_attention(450, 16, 1, 64, 150, 2),
    self_attention(1300, 16, 1, 64, 600, 2),  # own rows of more than a segment
]


@pytest.mark.parametrize("case", SMALL)
def test_backward_of_groups_and_short_segments(case, poisoned):
    call = make_call(case)
    inputs = backward_inputs(call, torch.bfloat16)
    for group in call.groups():
        for rows in (7, 65):
            Backward(call, group, inputs, 0.1, rows).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", [16, 64, 100, 128, 192, 256, 300, 512])
def test_own_block_sizes(block_size, head_dim, dtype, poisoned):
    call = make_call(self_attention([900, 0, 1, 130, 1100], 6, 2, head_dim, block_size, 3))
    inputs = backward_inputs(call, dtype)
    for heads in ((0, 2), (1, 2)):
        group = Group(*heads, 0, call.tokens_q)
        Attended(call, group, inputs[1:4], head_dim**-0.5).check()
        Backward(call, group, inputs, head_dim**-0.5, 1024).check()


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (16, 1)])
@pytest.mark.parametrize("block_size", [1, 20, 128, 150])
def test_own_blocks(block_size, heads, poisoned):
    call = make_call(self_attention([70, 0, 1, 303], *heads, 64, block_size, 1))
    inputs = backward_inputs(call, torch.bfloat16)
    for group in call.groups():
        Attended(call, group, inputs[1:4], 0.1).check()
        Backward(call, group, inputs, 0.1, 64).check()


@pytest.mark.parametrize("block_size", [16, 100, 150])
def test_own_blocks_of_chunked_queries(block_size, poisoned):
    """Also more queries than keys, and none of either."""
    call = make_call(SMALL[0]._replace(block_size=block_size))
    inputs = backward_inputs(call, torch.float16)
    for group in call.groups():
        Attended(call, group, inputs[1:4], 0.1).check()
        Backward(call, group, inputs, 0.1, 200).check()


@pytest.mark.parametrize("block_size", [64, 150])
def test_layouts_give_the_same_bits(block_size, poisoned):
    call = make_call(self_attention([310, 77], 4, 2, 64, block_size, 3))
    inputs = backward_inputs(call, torch.bfloat16)
    views = [*map(head_major, inputs[:4]), *inputs[4:]]
    results = [
        (
            *Backward(call, call.groups()[0], x, 0.1, 64).results(),
            *Attended(call, call.groups()[0], x[1:4], 0.1).own,
        )
        for x in (inputs, views)
    ]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("layout", [torch.clone, head_major])
@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1000, 4, 64), (77, 3, 128), (1, 1, 64), (0, 2, 128)])
def test_row_stats_layouts(shape, dtype, with_dlse, layout, poisoned):
    out, dout = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    lse, dlse = (5 * torch.randn(shape[1::-1], device=DEVICE) for _ in range(2))
    lse[:, ::3] = -torch.inf
    got = torch.ops.moba.sm90_row_stats(layout(out), layout(dout), lse, dlse if with_dlse else None)

    def of_rows(precision: torch.dtype):
        x, y, z, dz = (x.to(precision) for x in (lse, out, dout, dlse * with_dlse))
        return (x / math.log(2)).masked_fill(x.isinf(), torch.inf), (y * z).sum(-1).T - dz

    results = zip(("lse_log2", "delta"), got, of_rows(torch.float64), of_rows(torch.float32))
    for name, x, exact, plain in results:
        assert_within_budget(x, exact, plain, name)


@pytest.mark.parametrize("layout", [torch.clone, head_major])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_merge_layouts(head_dim, dtype, layout):
    """Own parts by row, as sm90's kernels leave them, give the bits of those by token; dq in halves
    is summed in float32, in the order of the slots, the own part last."""
    call = make_call(self_attention([300, 60], 6, 2, head_dim, 16, 6))
    group = Group(0, 2, 50, 333)
    positions = call.route(group, 64)[1]
    used = int(positions.max()) + 1
    parts, own = (torch.randn(n, head_dim, device=DEVICE) for n in (positions.numel(), 360 * 6))
    part_lse, own_lse = (3 * torch.randn(n, device=DEVICE) for n in (positions.numel(), 360 * 6))
    parts[used:], part_lse[used:] = torch.nan, torch.nan
    rest = *call.sequences, 2, *group
    zeros = torch.zeros(360, 6, head_dim, dtype=dtype, device=DEVICE)

    def by_token(rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(0, (2, 360, 3)).transpose(0, 1).flatten(1, 2)

    def merge(own_out, own_lse) -> list[torch.Tensor]:
        out, dq = layout(zeros), layout(zeros)
        lse, rounded = torch.zeros(6, 360, device=DEVICE), parts[:, None].to(dtype)
        torch.ops.moba.flash_merge(positions, rounded, part_lse, own_out, own_lse, *rest, out, lse)
        torch.ops.moba.flash_merge_backward(positions, rounded, own_out, *rest, dq)
        return [out, lse, dq]

    by_row = merge(own[:, None].to(dtype), own_lse)
    wanted = merge(by_token(own).to(dtype), by_token(own_lse).T.contiguous())
    assert all(map(torch.equal, by_row, wanted))

    dq = layout(zeros)
    torch.ops.moba.flash_merge_backward(positions, to_halves(parts), to_halves(own), *rest, dq)
    at = positions.view(2, 283, 3, -1).long()
    picked = parts[at.clamp(min=0)].masked_fill(at[..., None] < 0, 0)
    total = sum(picked.unbind(3)).transpose(0, 1).flatten(1, 2) + by_token(own)[50:333]
    assert torch.equal(dq[50:333], total.to(dtype))
    assert not dq[:50].any() and not dq[333:].any(), "wrote outside of the group"


@pytest.mark.parametrize("block_size", [128, 512])
def test_repeated_runs_are_bit_equal(block_size, poisoned):
    """Also with fewer rows around each: a row's bits depend on itself and its block."""
    call = make_call(self_attention(20_000, 8, 2, 128, block_size, 8), hot=True)
    inputs, group = stage_inputs(call, torch.bfloat16), Group(0, 2, 0, 20_000)
    first = Attended(call, group, inputs, 0.1)
    for rows in [SEGMENT_ROWS] * 100 + [100, 31]:
        again = Attended(call, group, inputs, 0.1, rows)
        assert torch.equal(first.out[: first.used], again.out[: first.used])
        assert torch.equal(first.lse[: first.used], again.lse[: first.used])
        assert all(map(torch.equal, first.own, again.own))


@pytest.mark.parametrize("block_size", [128, 512])
def test_repeated_backwards_are_bit_equal(block_size, poisoned):
    """dq also with fewer rows around each."""
    call = make_call(self_attention(20_000, 8, 2, 128, block_size, 8), hot=True)
    inputs, group = backward_inputs(call, torch.bfloat16), Group(0, 2, 0, 20_000)
    first = Backward(call, group, inputs, 0.1, 1024).results()
    for _ in range(100):
        assert all(map(torch.equal, first, Backward(call, group, inputs, 0.1, 1024).results()))
    for rows in (100, 31):
        assert torch.equal(first[0], Backward(call, group, inputs, 0.1, rows).results()[0])


@pytest.mark.parametrize("block_size", [16, 150])
@pytest.mark.parametrize("values", INVALID)
def test_invalid_offsets_leave_results_alone(values, block_size, poisoned):
    call = invalid_call(values)
    call = call._replace(case=call.case._replace(block_size=block_size))
    inputs = backward_inputs(call, torch.bfloat16)
    backward = Backward(call, Group(0, 1, 0, 100), inputs, 0.1, 64)
    attended = Attended(call, Group(0, 1, 0, 100), inputs[1:4], 0.1)
    torch.cuda.synchronize()
    assert backward.used == attended.used == 0
    for x in (backward.dq, backward.own_dq, *backward.packs, *backward.grads, *attended.own):
        assert bool(x.isnan().all())


@pytest.mark.parametrize("values", INVALID)
def test_invalid_offsets_attend_nothing(values):
    call = invalid_call(values)
    attended = Attended(call, Group(0, 1, 0, 100), stage_inputs(call, torch.bfloat16), 0.1)
    torch.cuda.synchronize()
    assert attended.used == 0


def test_arguments_are_checked_before_the_launch():
    call = make_call(self_attention(64, 2, 1, 64, 16, 3))
    q, k, v = stage_inputs(call, torch.bfloat16)
    group = Group(0, 1, 0, 64)
    for inputs, scale, message in (
        ([x[..., :32] for x in (q, k, v)], 0.1, "head_dim must be 64 or 128, got 32"),
        ([q, k, v], -0.1, "softmax_scale must not be negative"),
        ([q.float(), k.float(), v.float()], 0.1, "q must be float16 or bfloat16"),
        ([q, k, v[:10]], 0.1, "v must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            Attended(call, group, inputs, scale)
    arguments = Attended(call, group, [q, k, v], 0.1).arguments
    for cu_seqlens_q in wrong_offsets(call):
        with pytest.raises(RuntimeError, match="cu_seqlens_q must be a contiguous"):
            torch.ops.moba.sm90_attend(q, k, v, cu_seqlens_q, *arguments, 0.1, *group)


def wrong_offsets(call: Call) -> list[torch.Tensor]:
    right = call.sequences[0]
    return [right[:-1], right.long()]


def test_arguments_of_the_backward_are_checked_before_the_launch():
    call = make_call(self_attention(64, 2, 1, 64, 16, 3))
    dout, q, k, v, lse_log2, delta = right = backward_inputs(call, torch.bfloat16)
    narrow, in_float = (
        [f(x) for x in right[:4]] for f in (lambda x: x[..., :32], torch.Tensor.float)
    )
    stats = lse_log2, delta
    for inputs, scale, message in (
        ([*narrow, *stats], 0.1, "head_dim must be 64 or 128, got 32"),
        (right, -0.1, "softmax_scale must not be negative"),
        ([*in_float, *stats], 0.1, "q must be float16 or bfloat16"),
        ([dout.half(), q, k, v, *stats], 0.1, "dout has another dtype than q"),
        ([dout[:10], q, k, v, *stats], 0.1, "dout must be"),
        ([misaligned(dout), q, k, v, *stats], 0.1, "dout must have rows that are aligned"),
        ([dout, q, misaligned(k), v, *stats], 0.1, "k must have rows that are aligned"),
        ([dout, q, k, v, lse_log2.double(), delta], 0.1, "lse_log2 has the wrong dtype"),
        ([dout, q, k, v, lse_log2, delta[:1]], 0.1, "delta must be contiguous with"),
    ):
        with pytest.raises(RuntimeError, match=message):
            Backward(call, Group(0, 1, 0, 64), inputs, scale, 64)
    arguments = Backward(call, Group(0, 1, 0, 64), right, 0.1, 64).arguments
    for cu_seqlens_q in wrong_offsets(call):
        with pytest.raises(RuntimeError, match="cu_seqlens_q must be a contiguous"):
            torch.ops.moba.sm90_attend_backward(*right, cu_seqlens_q, *arguments, 0.1, 0, 1, 0, 64)
    for out, dlse, message in (
        (narrow[1], None, "head_dim must be 64 or 128, got 32"),
        (in_float[1], None, "out must be float16 or bfloat16"),
        (misaligned(q), None, "out must have rows that are aligned"),
        (q, delta.T.contiguous().T, "dlse must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.moba.sm90_row_stats(out, out, lse_log2, dlse)
