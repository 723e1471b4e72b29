"""merge on CUDA: the parts of a row, of its dq, and of a key's dk and dv, into one."""

import pytest
import torch
from flash_stages import CASES, DEVICE, INVALID, Call, Group, head_major, invalid_call, make_call
from flash_stages import misaligned as misalign
from numerics import assert_within_budget, self_attention

from moba_ext import reference

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16]
LAYOUTS = [lambda x: x.to(DEVICE), head_major]


class Parts:
    """Random parts of a group's rows, NaN wherever nothing may be read."""

    def __init__(self, call: Call, group: Group, dtype: torch.dtype):
        self.call, self.group = call, group
        self.positions = call.wanted_route(group, 64)[1]
        case, size = call.case, self.positions.numel()
        heads = (group.head_end - group.head_begin) * (case.heads_q // case.heads_k)
        self.out = torch.randn(size, 1, case.head_dim).to(dtype)
        self.lse = 3 * torch.randn(size)
        unused = int((self.positions >= 0).sum())
        self.out[unused:], self.lse[unused:] = torch.nan, torch.nan
        self.own = torch.randn(call.tokens_q, heads, case.head_dim).to(dtype)
        self.own_lse = 3 * torch.randn(heads, call.tokens_q)
        blind = ~call.has_keys()
        self.own[blind] = torch.nan
        self.own_lse[:, blind] = torch.inf

    def of_rows(self, dtype: torch.dtype):
        """Parts [rows, K + 1, D] and lse [rows, K + 1], the own part last."""
        heads, queries = self.group.head_end - self.group.head_begin, slice(*self.group[2:])
        own = self.own[queries].unflatten(1, (heads, -1)).transpose(0, 1).flatten(0, 2)
        own_lse = self.own_lse[:, queries].unflatten(0, (heads, -1)).transpose(1, 2).reshape(-1)
        blind = ~self.call.has_keys()[queries][None, :, None].expand(
            heads, -1, self.own.shape[1] // max(heads, 1)
        ).reshape(-1)
        at = self.positions.view(own.shape[0], self.call.ids.shape[-1])
        empty = torch.cat([at < 0, blind[:, None]], 1)
        picked, picked_lse = self.out[:, 0], self.lse
        if not picked.shape[0]:
            picked, picked_lse = own[:1], own_lse[:1]
        parts = torch.cat([picked[at.clamp(min=0)], own[:, None]], 1)
        lse = torch.cat([picked_lse[at.clamp(min=0)], own_lse[:, None]], 1)
        parts = parts.to(dtype).masked_fill(empty[..., None], 0)
        return parts, lse.to(dtype).masked_fill(empty, -torch.inf)

    def from_rows(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, ...] -> [queries, heads * G, ...]."""
        heads, queries = self.group.head_end - self.group.head_begin, self.group[3] - self.group[2]
        x = x.unflatten(0, (heads, queries, self.own.shape[1] // max(heads, 1)))
        return x.transpose(0, 1).flatten(1, 2)

    def place(self) -> tuple[slice, slice]:
        per_head = self.call.case.heads_q // self.call.case.heads_k
        return slice(*self.group[2:]), slice(self.group[0] * per_head, self.group[1] * per_head)

    def merge(self, layout, out, lse):
        torch.ops.moba.flash_merge(
            *(self.positions.int().to(DEVICE), self.out.to(DEVICE), self.lse.to(DEVICE)),
            *(layout(self.own), self.own_lse.to(DEVICE), *self.call.sequences),
            *(self.call.case.heads_k, *self.group, out, lse),
        )

    def merge_backward(self, layout, dq):
        torch.ops.moba.flash_merge_backward(
            *(self.positions.int().to(DEVICE), self.out.to(DEVICE), layout(self.own)),
            *(*self.call.sequences, self.call.case.heads_k, *self.group, dq),
        )


def outputs(call: Call, dtype: torch.dtype, layout):
    shape = (call.tokens_q, call.case.heads_q, call.case.head_dim)
    lse = torch.full((call.case.heads_q, call.tokens_q), 7.0, device=DEVICE)
    return layout(torch.full(shape, 7.0, dtype=dtype)), lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_merge(case, dtype, layout):
    call = make_call(case)
    for group in call.groups():
        parts = Parts(call, group, dtype)
        out, lse = outputs(call, dtype, layout)
        parts.merge(layout, out, lse)
        results = []
        for precision in (torch.float64, torch.float32):
            merged, merged_lse = reference.merge(*(x[None] for x in parts.of_rows(precision)))
            results.append((parts.from_rows(merged[0]), parts.from_rows(merged_lse[:, 0])))
        queries, heads = parts.place()
        (exact, exact_lse), (plain, plain_lse) = results
        assert_within_budget(out[queries, heads].cpu(), exact, plain.to(dtype))
        got_lse = lse[heads, queries].T.cpu()
        assert_within_budget(got_lse, exact_lse, plain_lse, "lse", 1.0)
        blind = ~call.has_keys()[queries]
        assert (out[queries, heads].cpu()[blind] == 0).all()
        assert got_lse[blind].isneginf().all()
        out[queries, heads], lse[heads, queries] = 7.0, 7.0
        assert (out == 7).all() and (lse == 7).all(), "wrote outside of the group"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_merge_backward(case, dtype, layout):
    call = make_call(case)
    for group in call.groups():
        parts = Parts(call, group, dtype)
        dq, _ = outputs(call, dtype, layout)
        parts.merge_backward(layout, dq)
        exact, plain = (
            parts.from_rows(parts.of_rows(precision)[0].sum(1))
            for precision in (torch.float64, torch.float32)
        )
        queries, heads = parts.place()
        assert_within_budget(dq[queries, heads].cpu(), exact, plain.to(dtype))
        assert (dq[queries, heads].cpu()[~call.has_keys()[queries]] == 0).all()
        in_place = torch.full_like(dq, 7.0)
        own = in_place[:, heads]
        own.copy_(parts.own)
        parts.merge_backward(lambda _, own=own: own, in_place)
        assert torch.equal(in_place[queries, heads], dq[queries, heads])
        dq[queries, heads] = 7.0
        assert (dq == 7).all(), "wrote outside of the group"


@pytest.mark.parametrize("which", ["own", "out"])
def test_misaligned_rows_are_refused(which):
    call = make_call(self_attention(50, 4, 2, 128, 16, 3))
    parts = Parts(call, Group(0, 2, 0, 50), torch.bfloat16)
    own, out = (misalign if name == which else LAYOUTS[0] for name in ("own", "out"))
    result, lse = outputs(call, torch.bfloat16, out)
    for merge in (lambda: parts.merge(own, result, lse), lambda: parts.merge_backward(own, result)):
        with pytest.raises(RuntimeError, match=f"{which} must have rows that are aligned to 16"):
            merge()
    assert (result == 7).all()


def test_in_place_and_repeated():
    call = make_call(self_attention(500, 4, 2, 128, 16, 8))
    parts = Parts(call, Group(0, 2, 0, 500), torch.bfloat16)
    results = []
    for _ in range(2):
        out, lse = outputs(call, torch.bfloat16, LAYOUTS[0])
        parts.merge(LAYOUTS[0], out, lse)
        results.append((out, lse))
    assert all(torch.equal(x, y) for x, y in zip(*results))
    own = parts.own.to(DEVICE)
    parts.merge(lambda _: own, own, lse)
    assert torch.equal(own, results[0][0])


def test_one_part_far_above_the_others():
    call = make_call(self_attention(300, 1, 1, 64, 16, 12))
    parts = Parts(call, Group(0, 1, 0, 300), torch.float16)
    parts.lse[::3] += 500
    parts.lse[1::3] -= 1e30
    out, lse = outputs(call, torch.float16, LAYOUTS[0])
    parts.merge(LAYOUTS[0], out, lse)
    (exact, exact_lse), (plain, plain_lse) = (
        reference.merge(*(x[None] for x in parts.of_rows(p)))
        for p in (torch.float64, torch.float32)
    )
    assert_within_budget(out[:, 0].cpu(), exact[0], plain[0].half())
    assert_within_budget(lse[0].cpu(), exact_lse[:, 0], plain_lse[:, 0], "lse", 1.0)


@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("values", INVALID)
def test_invalid_offsets_give_nan(values, topk):
    call = invalid_call(values, topk)
    group, size = Group(0, 1, 0, 100), call.ids.numel()
    _, positions, _, segment_offsets, *_ = call.route(group, 8)
    out, lse = outputs(call, torch.bfloat16, LAYOUTS[0])
    pack = torch.ones(size, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    torch.ops.moba.flash_merge(
        *(positions, pack, pack[:, 0, 0].float(), torch.ones_like(out), torch.zeros_like(lse)),
        *(*call.sequences, 1, *group, out, lse),
    )
    assert out.isnan().all() and lse.isnan().all()
    dq = torch.zeros_like(out)
    torch.ops.moba.flash_merge_backward(
        positions, pack, torch.ones_like(out), *call.sequences, 1, *group, dq
    )
    assert dq.isnan().all()
    own = torch.ones(100, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    dk, dv = torch.zeros_like(own), torch.zeros_like(own)
    torch.ops.moba.flash_reduce_keys(
        *(segment_offsets, own[:0], own[:0], own, own, *call.sequences, 16, True, True),
        *(None, None, dk, dv),
    )
    assert dk.isnan().all() and dv.isnan().all()


def key_parts(call: Call, group: Group, dtype: torch.dtype, segment_rows: int):
    """segment_offsets, two packs of random parts, and their float64 sums over segments
    [Tk, heads, D]."""
    *_, segment_offsets, segment_lists, _, _ = call.route(group, segment_rows)
    size, head_dim = call.case.block_size, call.case.head_dim
    used = int(segment_offsets[-1])
    cu_blocks = reference.block_offsets(call.cu_seqlens[1], size)
    sequence, position = reference.query_positions(call.cu_seqlens[1], call.cu_seqlens[1])
    block, within = cu_blocks[sequence] + position // size, position % size
    heads = group.head_end - group.head_begin
    packs, sums = [], []
    for _ in range(2):
        pack = torch.randn(segment_lists.numel() * size, 1, head_dim).to(dtype)
        pack[used * size :] = torch.nan
        total = torch.zeros(heads * call.num_blocks, size, head_dim, dtype=torch.float64)
        parts = pack[: used * size].view(used, size, head_dim).double()
        total.index_add_(0, segment_lists[:used].cpu().long(), parts)
        packs.append(pack.to(DEVICE))
        sums.append(total.view(call.num_blocks, heads, size, head_dim)[block, :, within])
    return segment_offsets, packs, sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", [*LAYOUTS, misalign])
@pytest.mark.parametrize("segment_rows", [3, 1000])
def test_reduce_keys(case, dtype, layout, segment_rows):
    call = make_call(case, hot=True)
    shape = (call.tokens_k, case.heads_k, case.head_dim)
    sequence, position = reference.query_positions(call.cu_seqlens[1], call.cu_seqlens[1])
    lengths_q, lengths_k = (x.long().diff()[sequence] for x in call.cu_seqlens)
    end = (position // case.block_size + 1) * case.block_size
    owned = end.minimum(lengths_k) > lengths_k - lengths_q
    own = [torch.randn(shape).to(dtype) for _ in range(2)]
    exact = [x.double().masked_fill(~owned[:, None, None], 0) for x in own]
    for x in own:
        x[~owned] = torch.nan
    cuts = [0, call.tokens_q // 2, call.tokens_q]
    for ranges in ([(0, call.tokens_q)], [*zip(cuts, cuts[1:])]):
        results = []
        for in_place in (False, True):
            torch.manual_seed(1)
            wanted = [x.clone() for x in exact]
            own_parts = [layout(x) for x in own]
            grads = [layout(torch.full(shape, 7.0, dtype=dtype)) for _ in range(2)]
            grads = own_parts if in_place else grads
            carried = [torch.full(shape, torch.nan, device=DEVICE) for _ in range(2)]
            for i, cut in enumerate(ranges):
                first, last = i == 0, i == len(ranges) - 1
                group = Group(0, case.heads_k, *cut)
                offsets, packs, sums = key_parts(call, group, dtype, segment_rows)
                torch.ops.moba.flash_reduce_keys(
                    *(offsets, *packs, *(own_parts if first else (None, None))),
                    *(*call.sequences, case.block_size, first, last),
                    *((None, None) if len(ranges) == 1 else carried),
                    *grads,
                )
                wanted = [x + y for x, y in zip(wanted, sums)]
            results.append(grads)
        for got, again, total in zip(*results, wanted):
            assert torch.equal(got, again), "the sum has one order, in place too"
            assert_within_budget(got.cpu(), total, total.float().to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_reduce_keys_of_several_segments(case, layout):
    """Without own parts, and leaving alone what has one segment."""
    call = make_call(case, hot=True)
    group = Group(0, case.heads_k, 0, call.tokens_q)
    shape = (call.tokens_k, case.heads_k, case.head_dim)
    offsets, packs, sums = key_parts(call, group, torch.bfloat16, 40)
    grads = [layout(torch.full(shape, 7.0, dtype=torch.bfloat16)) for _ in range(2)]
    torch.ops.moba.flash_reduce_keys(
        *(offsets, *packs, None, None, *call.sequences, case.block_size, True, True),
        *(None, None, *grads, True),
    )
    sequence, position = reference.query_positions(call.cu_seqlens[1], call.cu_seqlens[1])
    block = reference.block_offsets(call.cu_seqlens[1], case.block_size)[sequence]
    counts = offsets.diff().cpu().view(call.num_blocks, case.heads_k)
    one = counts[block + position // case.block_size] == 1
    for got, total in zip(grads, sums):
        total = total.masked_fill(one[..., None], 7)
        assert_within_budget(got.cpu(), total, total.float().bfloat16())


def test_offsets_past_2_31():
    tokens, heads, slots = 140_000, 16, 8
    call = make_call(self_attention(tokens, 1, 1, 8, 4096, 1))
    positions = torch.full((heads * tokens * slots,), -1, dtype=torch.int32, device=DEVICE)
    positions[-slots] = positions.numel() - 1
    options = {"dtype": torch.bfloat16, "device": DEVICE}
    part = torch.zeros(positions.numel(), 1, 128, **options)
    assert part.numel() > 2**31
    part[-1] = 3
    own, dq = (torch.ones(tokens, heads, 128, **options) for _ in range(2))
    group = Group(0, heads, 0, tokens)
    torch.ops.moba.flash_merge_backward(positions, part, own, *call.sequences, heads, *group, dq)
    assert (dq[-1, -1] == 4).all()
    dq[-1, -1] = 1
    assert (dq == 1).all()


def test_graph_replay_with_new_inputs():
    """Every op in one CUDA graph: nothing depends on values that the host saw."""
    case = self_attention([900, 0, 300], 4, 2, 64, 32, 5)
    calls = [make_call(case), make_call(self_attention([300, 500, 400], 4, 2, 64, 32, 5), hot=True)]
    calls[1] = calls[1]._replace(case=case)
    group = Group(0, 2, 100, 1200)
    q = torch.randn(1200, 4, 64, device=DEVICE).bfloat16()
    k, lse = q[:, :2], torch.randn(4, 1200, device=DEVICE)

    def run(ids, cu_seqlens_q, cu_seqlens_k):
        ops, sequences = torch.ops.moba, (cu_seqlens_q, cu_seqlens_k)
        cu_blocks, *own = ops.flash_metadata(*sequences, 1200, 1200, 900, 900, 32)
        routes = ops.flash_route(ids, cu_seqlens_q, cu_blocks, 1200, 2, 32, 64, *group)
        entries, positions, offsets, segment_offsets, segment_lists, _, cu_keys = routes
        rows, row_lse = ops.flash_gather([q], lse, entries, offsets, 2, *group)
        packs = ops.flash_gather_keys(
            k, k, cu_seqlens_k, cu_blocks, segment_lists, cu_keys, 32, 0, 2
        )
        out, dq = torch.zeros_like(q), torch.zeros_like(q)
        dk, dv, out_lse = torch.zeros_like(k), torch.zeros_like(k), torch.zeros_like(lse)
        sequences = (*sequences, cu_blocks)
        ops.flash_merge(positions, rows, row_lse, q, lse, *sequences, 2, *group, out, out_lse)
        ops.flash_merge_backward(positions, rows, q, *sequences, 2, *group, dq)
        ops.flash_reduce_keys(
            *(segment_offsets, *packs, k, k, *sequences, 32, True, True, None, None, dk, dv)
        )
        return *own, *routes[1:], out, out_lse, dq, dk, dv

    inputs = [calls[0].ids.to(DEVICE), *calls[0].sequences[:2]]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(*inputs)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(*inputs)
    for call in (calls[1], calls[0]):
        new = [call.ids.to(DEVICE), *call.sequences[:2]]
        for x, y in zip(inputs, new):
            x.copy_(y)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(results, run(*new)))
