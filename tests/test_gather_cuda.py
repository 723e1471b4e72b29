"""gather on CUDA: routed rows, and the keys of every segment's block, packed."""

import pytest
import torch
from flash_stages import CASES, DEVICE, Call, Group, head_major, make_call, metadata, misaligned
from numerics import self_attention

pytestmark = pytest.mark.gpu

LAYOUTS = [lambda x: x.to(DEVICE), misaligned, head_major]


def assert_gathered(call: Call, group: Group, sources: list, layout, lse=None) -> None:
    entries, _, offsets, *_ = call.route(group, 64)
    *packs, last = torch.ops.moba.flash_gather(
        [layout(x) for x in sources],
        None if lse is None else lse.to(DEVICE),
        *(entries, offsets, call.case.heads_k, *group),
    )
    used, slots = int(offsets[-1]), call.ids.shape[-1]
    row = entries[:used].cpu().long() // max(slots, 1)
    packs, lses = (packs, last) if lse is not None else ([*packs, last], None)
    assert len(packs) == len(sources)
    for pack, source in zip(packs, sources):
        assert pack.shape == (entries.numel(), 1, source.shape[-1])
        assert torch.equal(pack[:used, 0].cpu(), call.by_row(source, group).flatten(0, 2)[row])
    if lses is not None:
        assert torch.equal(lses[:used].cpu(), call.by_row(lse.T, group).reshape(-1)[row])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_rows(case, layout, poisoned):
    call = make_call(case)
    shape = (call.tokens_q, case.heads_q, case.head_dim)
    sources = [torch.randn(shape).bfloat16() for _ in range(3)]
    lse = torch.randn(case.heads_q, call.tokens_q)
    for group in call.groups():
        assert_gathered(call, group, sources[:1], layout)
        assert_gathered(call, group, sources, layout, lse)


@pytest.mark.parametrize("head_dim", [1, 5, 8, 200, 256])
def test_head_dims(head_dim, poisoned):
    call = make_call(self_attention([300, 60], 2, 1, head_dim, 16, 3))
    source = torch.randn(360, 2, head_dim).half()
    assert_gathered(call, Group(0, 1, 10, 350), [source], LAYOUTS[0])
    assert_keys(call, Group(0, 1, 10, 350), [source[:, :1]] * 2, LAYOUTS[0], 8)


def assert_keys(call: Call, group: Group, sources: list, layout, segment_rows: int) -> None:
    *_, segment_offsets, segment_lists, _, cu_keys = call.route(group, segment_rows)
    _, cu_seqlens_k, cu_blocks = call.sequences
    packs = torch.ops.moba.flash_gather_keys(
        *(layout(x) for x in sources),
        *(cu_seqlens_k, cu_blocks, segment_lists, cu_keys, call.case.block_size),
        *group[:2],
    )
    size = call.case.block_size
    used = segment_lists[: int(segment_offsets[-1])].cpu().long()
    heads = group.head_end - group.head_begin
    head, block = group.head_begin + used % heads, used // heads
    first = cu_blocks.cpu()
    sequence = torch.searchsorted(first, block, right=True) - 1
    begin = call.cu_seqlens[1].long()[sequence] + (block - first[sequence]) * size
    token = begin[:, None] + torch.arange(size)
    for pack, source in zip(packs, sources):
        assert pack.shape == (segment_lists.numel() * size, 1, source.shape[-1])
        got = pack[: used.numel() * size, 0].cpu().unflatten(0, (-1, size))
        short = token >= call.cu_seqlens[1].long()[sequence + 1][:, None]
        wanted = source[token.clamp(max=source.shape[0] - 1), head[:, None]]
        assert torch.equal(got, wanted.masked_fill(short[..., None], 0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_keys(case, layout, poisoned):
    call = make_call(case, hot=True)
    sources = [torch.randn(call.tokens_k, case.heads_k, case.head_dim).bfloat16() for _ in "kv"]
    for group in call.groups():
        for segment_rows in (5, 1000):
            assert_keys(call, group, sources, layout, segment_rows)


def test_short_block_is_filled_with_zeros():
    """The gate never chooses one, but ids are data."""
    call = make_call(self_attention([20, 33], 1, 1, 16, 8, 4))
    call = call._replace(ids=torch.randint(-1, 6, call.ids.shape, dtype=torch.int32))
    keys = torch.randn(53, 1, 16).half()
    keys[20:] = torch.nan
    keys[20:] = torch.randn(33, 1, 16)
    assert_keys(call, Group(0, 1, 0, 53), [keys, -keys], LAYOUTS[0], 4)


def test_offsets_past_2_31():
    tokens, heads = 300_000, 64
    case = self_attention(tokens, heads, heads, 128, 4096, 2)
    cu_seqlens = case.cu_seqlens()
    ids = torch.zeros(tokens, heads, 1, dtype=torch.int32)
    call = Call(case, cu_seqlens, ids, *metadata(case, cu_seqlens))
    source = torch.randn(tokens, heads, 128, dtype=torch.bfloat16, device=DEVICE)
    assert source.numel() > 2**31
    group = Group(heads - 1, heads, tokens - 1000, tokens)
    entries, _, offsets, *_ = call.route(group, 64)
    (pack,) = torch.ops.moba.flash_gather([source], None, entries, offsets, heads, *group)
    assert int(offsets[-1]) == 1000
    assert torch.equal(pack[:, 0], source[tokens - 1000 :, heads - 1])
