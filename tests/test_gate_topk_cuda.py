"""gate_topk on CUDA: q, kbar -> block_ids, scores."""

import pytest
import torch
from numerics import Case, check_selection, self_attention

from moba_ext import reference

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF_DTYPES = [torch.bfloat16, torch.float16]


def gate(case: Case, q, kbar, cu_seqlens=None):
    cu_seqlens_q, cu_seqlens_k = (x.cuda() for x in cu_seqlens or case.cu_seqlens())
    sizes = sum(case.lengths_k), case.max_seqlen_k, case.block_size, case.topk
    return torch.ops.moba.gate_topk(q.cuda(), kbar.cuda(), cu_seqlens_q, cu_seqlens_k, *sizes)


def random_inputs(case: Case, dtype):
    q, k, _ = case.tensors(dtype)
    return q, torch.ops.moba.block_mean(k, case.cu_seqlens()[1], case.block_size)


def integer_inputs(case: Case, dtype):
    """Scores are small integers: exact in any order of additions, with many ties."""
    q, kbar = random_inputs(case, torch.float32)
    return (torch.randint(-2, 3, x.shape).to(dtype) for x in (q, kbar))


def assert_by_score(case: Case, q, kbar) -> None:
    ids, scores = gate(case, q, kbar)
    assert scores.dtype == torch.float32
    check_selection(case, q, kbar, ids.cpu(), scores.cpu())
    again = gate(case, q, kbar)
    assert torch.equal(ids, again[0]) and torch.equal(scores, again[1]), "two runs differ"


def assert_exact(case: Case, q, kbar) -> None:
    ids, scores = gate(case, q, kbar)
    wanted = reference.gate_topk(
        q.float(),
        kbar.float(),
        *case.cu_seqlens(),
        case.max_seqlen_k,
        case.block_size,
        case.topk,
    )
    assert torch.equal(ids.cpu(), wanted[0])
    torch.testing.assert_close(scores.cpu(), wanted[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 200, 256])
@pytest.mark.parametrize("topk", [3, 8])
def test_head_dims(dtype, head_dim, topk, poisoned):
    case = self_attention([1, 0, 300, 16, 15, 17, 1013], 4, 2, head_dim, 8, topk)
    assert_by_score(case, *random_inputs(case, dtype))
    assert_exact(case, *integer_inputs(case, dtype))


# Every capacity of the lists, one below and above it, both heaps, and more than there are blocks.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [128, 200])
@pytest.mark.parametrize(
    "topk", [1, 2, 4, 5, 6, 8, 9, 10, 16, 17, 18, 32, 33, 34, 64, 65, 100, 300, 1000]
)
def test_topk(dtype, head_dim, topk, poisoned):
    case = self_attention([900, 40], 2, 1, head_dim, 2, topk)
    assert_by_score(case, *random_inputs(case, dtype))
    assert_exact(case, *integer_inputs(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 1), (8, 1), (16, 2), (12, 4), (200, 1)])
def test_head_groups(dtype, heads):
    case = self_attention([333, 70, 129], *heads, 64, 4, 8)
    assert_by_score(case, *random_inputs(case, dtype))
    assert_exact(case, *integer_inputs(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 3, 16, 128, 1000, 2**40])
def test_block_sizes(dtype, block_size):
    case = self_attention([700, 0, 1, 515], 2, 1, 64, block_size, 7)
    assert_by_score(case, *random_inputs(case, dtype))
    assert_exact(case, *integer_inputs(case, dtype))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("topk", [3, 8])
def test_rows_with_other_numbers_of_blocks_than_their_neighbours(dtype, topk):
    """In a thread block some warps have a whole tile of past blocks, others not yet: all must take
    the same way (synccheck)."""
    case = self_attention([1100, 40], 2, 1, 128, 8, topk)
    assert_by_score(case, *random_inputs(case, dtype))
    assert_exact(case, *integer_inputs(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topk", [3, 20, 50])
def test_many_tiny_sequences(dtype, topk):
    lengths = torch.randint(0, 12, (3000,)).tolist() + [0, 0, 200, 0, 64, 65, 66]
    case = self_attention(lengths, 2, 2, 16, 1, topk)
    assert_exact(case, *integer_inputs(case, dtype))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("topk", [4, 12, 40])
def test_chunked_queries_and_queries_before_the_first_key(dtype, topk):
    case = Case([3, 40, 0, 300, 7, 1], [500, 40, 30, 130, 0, 900], 6, 2, 72, 4, topk)
    assert_by_score(case, *random_inputs(case, dtype))
    assert_exact(case, *integer_inputs(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_queries_no_keys_no_sequences(dtype):
    for case in (
        Case([0], [100], 2, 1, 64, 16, 3),
        Case([5], [0], 2, 1, 64, 16, 3),
        Case([0, 0], [0, 0], 2, 1, 64, 16, 3),
    ):
        ids, scores = gate(case, *random_inputs(case, dtype))
        assert ids.shape == scores.shape and ids.shape[:2] == (sum(case.lengths_q), 2)
        assert (ids == -1).all() and scores.isneginf().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topk", [3, 8, 14, 30, 60, 320])
def test_nan_infinity_and_negative_zero(dtype, topk):
    case = self_attention([800, 150], 4, 2, 64, 2, topk)
    q, kbar = integer_inputs(case, dtype)
    q = q.abs() + 1
    for value in (torch.nan, torch.inf, -torch.inf, 0.0, -0.0):
        kbar[torch.rand(kbar.shape[:2]) < 0.2] = value
    q[torch.rand(q.shape[:2]) < 0.1] = torch.nan
    q[torch.rand(q.shape[:2]) < 0.1] = 0.0
    assert_exact(case, q, kbar)


# 2**-41: what the thresholds are above where marked scores go in as they are.
@pytest.mark.parametrize(
    "dtype, exponent", [*((d, 0) for d in DTYPES), *((torch.bfloat16, e) for e in (-38, -45, -70))]
)
@pytest.mark.parametrize("topk", [3, 8, 14, 40])
def test_odd_centroids_below_positive_thresholds(dtype, exponent, topk):
    case = self_attention([1_500, 700], 2, 1, 64, 2, topk)
    q, kbar = integer_inputs(case, dtype)
    kbar *= 2.0**exponent
    # Few of +inf, or the thresholds soon are, too.
    for value, share in ((torch.nan, 0.1), (-torch.inf, 0.04), (-0.0, 0.04), (torch.inf, 0.004)):
        kbar[torch.rand(kbar.shape[:2]) < share] = value
    assert_exact(case, q.abs() + 1, kbar)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topk", [3, 8, 14, 30, 60, 320])
def test_all_scores_equal(dtype, topk):
    case = self_attention(800, 2, 1, 64, 2, topk)
    q, kbar = integer_inputs(case, dtype)
    assert_exact(case, q * 0, kbar)
    assert_exact(case, q.fill_(torch.nan), kbar)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_no_query_may_choose_is_not_seen(dtype):
    # Own and future blocks, rows of short tails and the other sequence hold NaN or +inf.
    case = self_attention([330, 200], 2, 1, 128, 4, 6)
    q, kbar = integer_inputs(case, dtype)
    first = reference.block_offsets(case.cu_seqlens()[1], 4).tolist()[1]
    wanted = [x.cpu() for x in gate(case, q, kbar)]
    for value in (torch.nan, torch.inf):
        for poisoned_rows, queries in (
            (slice(40, None), slice(0, 40 * 4 + 4)),
            (slice(0, first), slice(330, 530)),
        ):
            poisoned_kbar = kbar.clone()
            poisoned_kbar[poisoned_rows] = value
            got = [x.cpu() for x in gate(case, q, poisoned_kbar)]
            assert all(torch.equal(g[queries], w[queries]) for g, w in zip(got, wanted))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_misaligned_inputs(dtype):
    case = self_attention([500, 77], 4, 2, 64, 4, 8)
    q, kbar = (x.cuda() for x in random_inputs(case, dtype))
    wanted = gate(case, q, kbar)
    tokens = q.shape[0]
    head_major = q.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.full((tokens, 7, 75), torch.nan, dtype=dtype, device="cuda")
    wide[:, 2:6, 3:67] = q
    storage = torch.full((kbar.numel() + 1,), torch.nan, dtype=dtype, device="cuda")
    shifted = storage[1:].view(kbar.shape).copy_(kbar)
    for other_q, other_kbar in ((head_major, kbar), (wide[:, 2:6, 3:67], kbar), (q, shifted)):
        assert not (other_q.is_contiguous() and other_kbar.data_ptr() % 16 == 0)
        got = gate(case, other_q, other_kbar)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    with pytest.raises(RuntimeError, match="q must be contiguous in its last dimension"):
        gate(case, q.transpose(1, 2), kbar)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("topk", [3, 8, 40])
def test_chunks_are_bit_equal_to_one_shot(dtype, head_dim, topk):
    case = self_attention(700, 6, 2, head_dim, 2, topk)
    q, kbar = (x.cuda() for x in random_inputs(case, dtype))
    ids, scores = gate(case, q, kbar)
    for begin, end in ((699, 700), (0, 1), (100, 233), (37, 700)):
        keys = -(-end // 2)  # blocks that a cache of `end` keys has
        chunk = case._replace(lengths_q=[end - begin], lengths_k=[end])
        slots = min(topk, keys) - 1
        got = gate(chunk, q[begin:end], kbar[: end // 2 + 1])
        assert torch.equal(got[0], ids[begin:end, :, :slots])
        assert torch.equal(got[1], scores[begin:end, :, :slots])


def ramp(length: int, block_size: int, dtype, rising: bool, heads: int = 2):
    """q, kbar whose score of block j is j, or -j: exact in every dtype up to 16,383 blocks."""
    block = torch.arange(length // block_size + 1, device="cuda")
    kbar = torch.zeros(len(block), heads, 64, dtype=dtype, device="cuda")
    kbar[..., 5], kbar[..., 40] = (block // 128)[:, None], (block % 128)[:, None]
    q = torch.zeros(length, heads, 64, dtype=dtype, device="cuda")
    q[..., 5], q[..., 40] = (128, 1) if rising else (-128, -1)
    return q, kbar


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rising", [True, False])
@pytest.mark.parametrize("length", [4_096, 131_072])
@pytest.mark.parametrize("topk", [3, 8, 40])
def test_scores_that_rise_and_fall_with_recency(dtype, rising, length, topk):
    block_size = 128 if length > 4_096 else 4
    case = self_attention(length, 2, 2, 64, block_size, topk)
    ids, scores = gate(case, *ramp(length, block_size, dtype, rising))
    own = (torch.arange(length, device="cuda") // block_size)[:, None]
    slot = torch.arange(topk - 1, device="cuda")
    wanted = ((own - topk + 1).clamp(min=0) if rising else 0) + slot
    wanted = torch.where(wanted < own, wanted, -1)[:, None].expand(-1, 2, -1)
    assert torch.equal(ids.long(), wanted)
    value = wanted.float() if rising else -wanted.float()
    assert torch.equal(scores, value.masked_fill(wanted < 0, -torch.inf))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("topk", [3, 8, 16])
def test_long_sequence(dtype, topk):
    length, block_size, heads = 131_072, 128, 2
    case = self_attention(length, heads, heads, 128, block_size, topk)
    q = torch.randn(length, heads, 128, dtype=dtype, device="cuda")
    kbar = torch.randn(length // block_size + 1, heads, 128, dtype=dtype, device="cuda")
    ids, scores = gate(case, q, kbar)
    query = torch.randint(0, length, (4096,), device="cuda")
    exact = torch.einsum("qhd,nhd->qhn", q[query].double(), kbar.double())
    past = torch.arange(len(kbar), device="cuda") < (query // block_size)[:, None, None]
    best = exact.masked_fill(~past, -torch.inf).topk(topk - 1).values.sort(-1).values
    got = exact.gather(-1, ids[query].long().clamp(min=0)).masked_fill(ids[query] < 0, -torch.inf)
    tolerance = 128 * torch.finfo(torch.float32).eps * 128
    assert (torch.nan_to_num(got.sort(-1).values - best).abs() <= tolerance).all()
    assert (torch.nan_to_num(got - scores[query]).abs() <= tolerance).all()


@pytest.mark.parametrize(
    "values",
    [[0, 5], [1, 100], [0, 120, 100], [0, -5, 100], [0, 2**31 - 1, 100], [-(2**31), 100]],
)
@pytest.mark.parametrize("topk", [4, 40])
@pytest.mark.parametrize("which", ["q", "k"])
def test_invalid_offsets_give_no_blocks(values, topk, which):
    wrong = torch.tensor(values, dtype=torch.int32)
    right = torch.tensor([0] + [100] * (len(values) - 1), dtype=torch.int32)
    case = Case([100], [100], 2, 1, 64, 2, topk)
    q = torch.randn(100, 2, 64, dtype=torch.bfloat16)
    kbar = torch.randn(50 + len(values) - 1, 1, 64, dtype=torch.bfloat16)
    ids, scores = gate(case, q, kbar, (wrong, right) if which == "q" else (right, wrong))
    assert ids.shape == (100, 2, topk - 1) and (ids == -1).all() and scores.isnan().all()


def test_too_small_max_seqlen_k_gives_no_blocks():
    case = self_attention(100, 2, 1, 64, 4, 3)
    q, kbar = (x.cuda() for x in random_inputs(case, torch.bfloat16))
    cu_seqlens = [x.cuda() for x in case.cu_seqlens()]
    ids, scores = torch.ops.moba.gate_topk(q, kbar, *cu_seqlens, 100, 99, 4, 3)
    assert (ids == -1).all() and scores.isnan().all()


def test_runs_on_the_current_stream():
    case = self_attention(4096, 2, 2, 64, 16, 5)
    q, kbar = ramp(4096, 16, torch.bfloat16, True)
    wanted, _ = gate(case, q, kbar)
    cu_seqlens = [x.cuda() for x in case.cu_seqlens()]
    late, stream = torch.zeros_like(q), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(q)
        ids, _ = torch.ops.moba.gate_topk(late, kbar, *cu_seqlens, 4096, 4096, 16, 5)
    stream.synchronize()
    assert torch.equal(ids, wanted)


@pytest.mark.parametrize("topk", [8, 40])
def test_graph_replays_with_other_values(topk):
    case = self_attention(1024, 2, 1, 64, 4, topk)
    q, kbar = (x.cuda() for x in random_inputs(case, torch.bfloat16))
    cu_seqlens = [x.cuda() for x in case.cu_seqlens()]
    sizes = 1024, 1024, 4, topk
    torch.ops.moba.gate_topk(q, kbar, *cu_seqlens, *sizes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, scores = torch.ops.moba.gate_topk(q, kbar, *cu_seqlens, *sizes)
    q.copy_(torch.randn_like(q))
    graph.replay()
    wanted = gate(case, q, kbar)
    assert torch.equal(ids, wanted[0]) and torch.equal(scores, wanted[1])


def assert_tail_equals_chunk(case: Case, q, kbar, ids, scores, queries: int) -> None:
    """The last queries alone, whose offsets are small, give the same bits."""
    got = gate(case._replace(lengths_q=[queries]), q[-queries:].clone(), kbar)
    assert torch.equal(got[0], ids[-queries:]) and torch.equal(got[1], scores[-queries:])
    assert (ids[-queries:] >= 0).all() and scores[-queries:].isfinite().all()


def test_query_offsets_past_2_31():
    tokens = 600_000
    case = self_attention(tokens, 32, 4, 128, 4096, 8)
    q = torch.randn(tokens, 32, 128, dtype=torch.bfloat16, device="cuda")
    kbar = torch.randn(tokens // 4096 + 1, 4, 128, dtype=torch.bfloat16, device="cuda")
    assert q.numel() > 2**31
    assert_tail_equals_chunk(case, q, kbar, *gate(case, q, kbar), queries=100)


def test_result_offsets_past_2_31():
    tokens = 600_000
    case = self_attention(tokens, 128, 8, 8, 4096, 31)
    q = torch.randn(tokens, 128, 8, dtype=torch.bfloat16, device="cuda")
    kbar = torch.randn(tokens // 4096 + 1, 8, 8, dtype=torch.bfloat16, device="cuda")
    ids, scores = gate(case, q, kbar)
    assert ids.numel() > 2**31
    assert_tail_equals_chunk(case, q, kbar, ids, scores, queries=100)


def test_centroid_offsets_past_2_31():
    tokens = 1_100_000
    kbar = torch.randn(tokens + 1, 16, 128, dtype=torch.bfloat16, device="cuda")
    assert kbar.numel() > 2**31
    case = Case([3], [tokens], 16, 16, 128, 1, 8)
    q = torch.randn(3, 16, 128, dtype=torch.bfloat16, device="cuda")
    ids, scores = gate(case, q, kbar)
    for head in (0, 15):
        exact = (kbar[: tokens - 1, head].float() @ q[2, head].float()).topk(7)
        assert torch.equal(ids[2, head].long(), exact.indices.sort().values)
        assert torch.allclose(scores[2, head].sort(descending=True).values, exact.values, atol=1e-3)


def test_arguments_are_checked_before_the_launch():
    case = self_attention(64, 4, 2, 64, 16, 3)
    q, kbar = (x.cuda() for x in random_inputs(case, torch.float32))
    cu = case.cu_seqlens()[0].cuda()
    good = {
        "q": q,
        "kbar": kbar,
        "cu_q": cu,
        "cu_k": cu,
        "tokens": 64,
        "longest": 64,
        "block_size": 16,
        "topk": 3,
    }
    for change, message in (
        ({"q": q[:, 0]}, "q has 2 dimensions"),
        (
            {"q": q.double(), "kbar": kbar.double()},
            "q must be float32, float16 or bfloat16 on CUDA",
        ),
        ({"kbar": kbar.half()}, "kbar has another dtype than q"),
        ({"kbar": kbar.cpu()}, "kbar is on another device than q"),
        ({"q": q[..., :60], "kbar": kbar[..., :60]}, "head_dim of q must be a multiple of 8"),
        ({"q": q[:, :3]}, "heads of q must be a multiple of heads of kbar, got 3 and 2"),
        ({"kbar": kbar[:-1]}, "kbar must be contiguous .5, heads of k, 64."),
        ({"kbar": kbar.transpose(0, 1).contiguous().transpose(0, 1)}, "kbar must be contiguous"),
        ({"tokens": 48}, "kbar must be contiguous .4, heads of k, 64."),
        ({"cu_q": cu.long()}, "cu_seqlens_q must be contiguous int32"),
        ({"cu_k": cu.cpu()}, "cu_seqlens_k must be on the CUDA device of q"),
        ({"cu_k": cu[:1]}, "cu_seqlens_k must be .* with batch >= 1, has 1 elements"),
        (
            {"cu_k": cu[[0, 1, 1]]},
            "cu_seqlens_q and cu_seqlens_k must have the same length, got 2 and 3",
        ),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"topk": 0}, "topk must be at least 1, got 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.moba.gate_topk(*(good | change).values())
