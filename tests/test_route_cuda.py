"""route on CUDA: block_ids -> for every (KV head, block), who chose it, in segments."""

import re

import pytest
import torch
from flash_stages import CASES, DEVICE, INVALID, Call, Group, Lists, invalid_call, make_call
from numerics import Case, self_attention
from torch.profiler import ProfilerActivity, profile

from moba_ext import reference

pytestmark = pytest.mark.gpu

NAMES = ["positions", "offsets", "segment_offsets", "segment_lists", "cu_rows", "cu_keys"]


def assert_routed(call: Call, group: Group, segment_rows: int, *ranges: int) -> None:
    """ranges: lists of ranges of so many queries, too."""
    kinds = [Lists(), Lists(every_list=True), Lists(own_first=True)]
    for queries in ranges:
        kinds += [Lists(own_first=True, range_queries=queries)]
        kinds += [Lists(own_apart=True, range_queries=queries)]
    for kind in kinds:
        got = call.route(group, segment_rows, kind)
        wanted = call.wanted_route(group, segment_rows, kind)
        used = wanted[0].numel()
        assert all(x.dtype == torch.int32 for x in got)
        assert torch.equal(got[0][:used].cpu(), wanted[0].int()), "entries"
        for name, x, y in zip(NAMES, got[1:], wanted[1:]):
            assert torch.equal(x.cpu(), y.int()), name
        again = call.route(group, segment_rows, kind)
        assert torch.equal(again[0][:used], got[0][:used])
        assert all(torch.equal(x, y) for x, y in zip(got[1:], again[1:]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("hot", [False, True])
def test_matches_pytorch(case, hot, poisoned):
    call = make_call(case, hot)
    for group in call.groups():
        for segment_rows in (7, 64, 10**6):
            assert_routed(call, group, segment_rows, 1, 50, 10**9)


def test_many_tiles(poisoned):
    """Several tiles of entries per KV head."""
    assert_routed(
        *(make_call(self_attention([3000, 500, 4000], 8, 2, 8, 64, 8)), Group(0, 2, 0, 7500), 128),
        *(1000, 5000),
    )
    hot = make_call(self_attention(6000, 4, 1, 8, 512, 3), hot=True)
    assert_routed(hot, Group(0, 1, 0, 6000), 1024)
    assert_routed(hot, Group(0, 1, 1000, 5999), 1024, 2222)


@pytest.mark.parametrize("topk", [4, 6])  # ranked by comparison, and row by row
@pytest.mark.parametrize("hot", [False, True])
def test_many_lists(topk, hot, poisoned):
    """More than one launch routes, whose thread blocks would have to sum them all up."""
    call = make_call(self_attention([400, 300, 0, 7], 16, 16, 8, 1, topk), hot)
    assert_routed(call, Group(0, 16, 0, 707), 64, 500)
    assert_routed(call, Group(1, 16, 11, 700), 3)


@pytest.mark.parametrize(
    ("queries", "launches"),
    [
        (8192, {"route_small_kernel"}),
        (8191, {"count_kernel", "tiles_kernel", "lists_kernel", "place_sorted_kernel"}),
    ],
)
def test_launches(queries, launches):
    """A small call takes one, but not a group of it, which may run beside another."""
    call = make_call(self_attention(8192, 16, 16, 8, 128, 8))
    group = Group(0, 16, 0, queries)
    call.route(group, 128)
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        call.route(group, 128)
        torch.cuda.synchronize()
    names = "|".join(sorted({*launches, "route_small_kernel", "place_kernel"}))
    found = [re.search(names, event.name) for event in prof.events()]
    assert sorted(match[0] for match in found if match) == sorted(launches)
    assert_routed(call, group, 128)


@pytest.mark.parametrize("length", [1500, 3000, 5000, 40_000])
@pytest.mark.parametrize("hot", [False, True])
def test_many_blocks(length, hot, poisoned):
    """One launch; entries sorted in shared memory, counters alone there, and counters that don't
    fit."""
    call = make_call(Case([length // 2], [length], 2, 1, 8, 1, 4), hot)
    assert_routed(call, Group(0, 1, 0, length // 2), 256, length // 5)
    assert_routed(call, Group(0, 1, 17, length // 2 - 5), 1)


@pytest.mark.parametrize("length", [2000, 5000])  # eight tiles in a thread block, and four
@pytest.mark.parametrize("alike", [(0, 0), (2, 0), (4, 0), (2, 2), (3, 2), (5, 0), (16, 16)])
def test_lanes_that_meet(length, alike, poisoned):
    """Of 32 entries that a warp takes at a time so many have one block, and another one."""
    call = make_call(Case([length], [length], 1, 1, 8, 1, 2))
    query = torch.arange(length)
    place = query % 32
    for first, count in zip((0, 16), alike):
        among = (place >= first) & (place < first + count)
        query = torch.where(among, query - place + first, query)
    assert_routed(call._replace(ids=call.ids[query]), Group(0, 1, 0, length - 1), 64)


def test_many_sequences(poisoned):
    lengths = torch.randint(0, 9, (3000,)).tolist()
    call = make_call(self_attention(lengths, 2, 2, 8, 2, 3))
    for group in call.groups():
        assert_routed(call, group, 4, 700)


@pytest.mark.parametrize("case", [*CASES, self_attention(0, 2, 1, 8, 16, 3)])
def test_public_op(case, poisoned):
    call = make_call(case)
    on_device = call.ids.to(DEVICE), *call.sequences[:2], call.tokens_k, case.heads_k
    offsets, entries = torch.ops.moba.route(*on_device, case.block_size)
    wanted = reference.route(
        *(call.ids, *call.cu_seqlens, call.num_blocks, case.heads_k, case.block_size)
    )
    assert torch.equal(offsets.cpu(), wanted.offsets)
    used = wanted.entries.numel()
    assert torch.equal(entries[:used].cpu(), wanted.entries) and (entries[used:] == -1).all()


@pytest.mark.parametrize("topk", [4, 6])  # ranked by comparison, and row by row
def test_ids_that_are_no_blocks_count_as_empty(topk, poisoned):
    call = make_call(self_attention([64, 80, 0, 120], 4, 2, 8, 16, topk))
    slots = call.ids.shape[-1]
    wild = torch.randint(-3, 8, call.ids.shape, dtype=torch.int32)
    if slots >= 4:  # each at most once: the order of equal ones in a row is left open there
        wild = torch.rand(*call.ids.shape[:2], 11).argsort(-1)[..., :slots].int() - 3
    wild[::7] = 2**31 - 1
    wild[3::7] = -(2**31)
    call = call._replace(ids=wild)
    for group in call.groups():
        assert_routed(call, group, 16)


@pytest.mark.parametrize("values", INVALID)
def test_invalid_offsets_route_nothing(values, poisoned):
    call = invalid_call(values)
    assert call.cu_blocks[0] == -1
    assert (call.own_cu_q == 0).all() and (call.own_cu_k == 0).all()
    _, positions, *others = call.route(Group(0, 1, 0, 100), 8)
    assert (positions == -1).all()
    assert all((x == (-1 if i == 2 else 0)).all() for i, x in enumerate(others))
    offsets, entries = torch.ops.moba.route(call.ids.to(DEVICE), *call.sequences[:2], 100, 1, 16)
    assert (offsets == 0).all() and (entries == -1).all()


@pytest.mark.parametrize("case", [*CASES, self_attention([0, 0], 2, 1, 8, 16, 3)])
def test_own_blocks(case, poisoned):
    """Parts of the batch: queries before the first key, then each block with its own queries."""
    call = make_call(case)
    queries, keys = [0], [0]
    for length_q, length_k in zip(case.lengths_q, case.lengths_k):
        before = length_k - length_q
        own = [0] * (-(-length_k // case.block_size))
        for position in range(max(before, 0), length_k):
            own[position // case.block_size] += 1
        sizes = [min(case.block_size, length_k - i * case.block_size) for i in range(len(own))]
        queries += [max(-before, 0), *own]
        keys += [0, *sizes]
    unused = [0] * (call.num_blocks + len(case.lengths_q) + 1 - len(queries))
    for got, sizes in ((call.own_cu_q, queries), (call.own_cu_k, keys)):
        assert torch.equal(got.cpu(), torch.tensor(sizes + unused).cumsum(0).int())
    wanted = reference.block_offsets(call.cu_seqlens[1], case.block_size)
    assert torch.equal(call.cu_blocks.cpu(), wanted)


def test_arguments_are_checked_before_the_launch():
    call = make_call(self_attention(64, 2, 1, 8, 16, 3))
    for group, segment_rows, message in (
        (Group(0, 2, 0, 64), 8, "head range 0 to 2 of 1"),
        (Group(0, 1, 0, 65), 8, "query range 0 to 65 of 64"),
        (Group(0, 1, 9, 8), 8, "query range 9 to 8 of 64"),
        (Group(0, 1, 0, 64), 0, "segment_rows must be at least 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call.route(group, segment_rows)
    with pytest.raises(RuntimeError, match="range_queries must be at least 0, got -1"):
        call.route(Group(0, 1, 0, 64), 8, Lists(range_queries=-1))
    with pytest.raises(RuntimeError, match="own_apart needs range_queries, and excludes own_first"):
        call.route(Group(0, 1, 0, 64), 8, Lists(own_apart=True))
    with pytest.raises(RuntimeError, match="block_ids has the wrong dtype"):
        call._replace(ids=call.ids.long()).route(Group(0, 1, 0, 64), 8)
