"""The flash backend on a GPU: its numbers.

Results are compared with float64 on the op's own selection, by the error budget of numerics.py, and
the selection by score. How the backend behaves under torch is in test_flash_cuda_runtime.py.
"""

import pytest
import torch
from flash_checks import (
    DEVICE,
    INPUTS,
    NAMES,
    Result,
    assert_same_bits,
    check,
    check_samples,
    exact_and_plain,
    hot_inputs,
    random_inputs,
    run,
    score_size,
    upstream,
)
from flash_stages import INVALID, head_major, misaligned
from numerics import Case, assert_within_budget, self_attention

from moba_ext import flash, varlen

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("flash_attention")]

DTYPES = [torch.bfloat16, torch.float16]
# The package as compiled for tests has head_dim 64 and 128 in bfloat16.
BOTH = pytest.mark.parametrize("flash_attention", ["aten", "package"], indirect=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 64, 100, 128, 512])
@pytest.mark.parametrize(("blocks", "more"), [(0, 1), (1, -1), (1, 0), (1, 1), (3, 7)])
def test_lengths_around_the_block_size(blocks, more, block_size, dtype, poisoned):
    case = self_attention(blocks * block_size + more, 4, 2, 64, block_size, 2)
    check(case, random_inputs(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 192, 256])
def test_head_dims(head_dim, dtype, poisoned):
    case = self_attention([700, 0, 65, 1, 130], 4, 2, head_dim, 64, 3)
    check(case, random_inputs(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 1), (8, 2), (8, 1), (16, 1), (32, 2)])
def test_query_groups(heads, dtype, poisoned):
    case = self_attention([600, 9], *heads, 64, 32, 4)
    check(case, random_inputs(case, dtype))


@pytest.mark.parametrize("block_size", [16, 64, 100, 128, 512])
@pytest.mark.parametrize("topk", [1, 2, 8, 12, 1000])
def test_topk_from_own_block_to_all(topk, block_size, poisoned):
    case = self_attention(4097, 2, 1, 128, block_size, topk)
    check(case, random_inputs(case, DTYPES[topk % 2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", INPUTS)
def test_kinds_of_inputs(kind, dtype):
    case = self_attention(4097, 4, 2, 128, 128, 8)
    check(case, INPUTS[kind](case, dtype), softmax_scale=0.05 if kind == "random" else None)


@pytest.mark.parametrize("blocks", [(0,), (0, 5, 9)])
@pytest.mark.parametrize(("heads", "block_size"), [((16, 2), 16), ((8, 1), 128), ((4, 4), 64)])
def test_hot_blocks_of_many_segments(blocks, heads, block_size, poisoned):
    case = self_attention(4097, *heads, 64, block_size, 4)
    got = check(case, hot_inputs(case, torch.bfloat16, blocks))
    late = got.ids[12 * block_size :]
    for block in blocks:
        share = float((late == block).any(-1).float().mean())
        assert share > 0.99, f"block {block} is chosen by {share:.0%} of the queries"
    rows = (4097 - 12 * block_size) * heads[0] // heads[1]
    assert rows > 2 * max(1024, 4 * block_size), "a hot block should have several segments"


LONG = [  # kind, dtype, query heads, KV heads, block_size, topk
    ("random", torch.bfloat16, 4, 2, 128, 8),
    ("correlated", torch.float16, 4, 2, 128, 8),
    ("hot", torch.bfloat16, 4, 2, 128, 8),
    ("hot", torch.bfloat16, 2, 2, 512, 3),
    ("random", torch.float16, 16, 1, 64, 12),
]


@pytest.mark.parametrize(("kind", "dtype", "heads_q", "heads_k", "block_size", "topk"), LONG)
def test_long_sequence(kind, dtype, heads_q, heads_k, block_size, topk, length=131_072):
    case = self_attention(length, heads_q, heads_k, 128, block_size, topk)
    last = length // block_size - 1
    blocks = [(0, 0), (0, 1), (0, last // 2), (0, last)]
    got = check_samples(case, INPUTS[kind](case, dtype), blocks)
    if kind == "hot":
        late = got.ids[length // 2 :]
        assert float((late == 0).any(-1).float().mean()) > 0.99, "block 0 should be hot"


def test_packed_equals_each_sequence_alone():
    case = self_attention([1700, 0, 64, 333, 1, 65, 900], 4, 2, 64, 64, 3)
    q, k, v = random_inputs(case, torch.bfloat16)
    dout, dlse = upstream(case, torch.bfloat16)
    packed = check(case, [q, k, v], (dout, dlse))
    begin = 0
    for length in case.lengths_q:
        rows = slice(begin, begin + length)
        begin += length
        if length == 0:
            continue
        alone = check(
            self_attention(length, 4, 2, 64, 64, 3),
            [x[rows] for x in (q, k, v)],
            (dout[rows], dlse[:, rows]),
        )
        slots = alone.ids.shape[-1]
        assert torch.equal(packed.ids[rows, :, :slots], alone.ids)
        assert bool((packed.ids[rows, :, slots:] == -1).all())
        if length > 3 * 64:  # else topk covers it, and alone it is one call without routing
            mine = Result(
                packed.out[rows], packed.lse[:, rows], alone.ids, *(x[rows] for x in packed[3:])
            )
            assert_same_bits(mine, alone)


@pytest.mark.parametrize(("begin", "end"), [(999, 1000), (0, 100), (100, 613), (613, 1000)])
def test_chunked_prefill_equals_one_shot(begin, end):
    case = self_attention(1000, 8, 2, 128, 64, 4)
    q, k, v = random_inputs(case, torch.bfloat16)
    douts = upstream(case, torch.bfloat16)
    whole = run(case, [q, k, v], douts)
    chunk = case._replace(lengths_q=[end - begin], lengths_k=[end])
    got = check(chunk, [q[begin:end], k[:end], v[:end]])
    slots = got.ids.shape[-1]
    assert torch.equal(whole.ids[begin:end, :, :slots], got.ids)
    assert bool((whole.ids[begin:end, :, slots:] == -1).all())
    exact, plain = exact_and_plain(case, [q, k, v], whole.ids, douts, 128**-0.5)
    rows, size = slice(begin, end), score_size(q, k, 128**-0.5)
    assert_within_budget(got.out, exact[0][rows], plain[0][rows], "out")
    assert_within_budget(got.lse, exact[1][:, rows], plain[1][:, rows], "lse", size)


@pytest.mark.parametrize("topk", [1, 3, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_numbers_of_queries_than_keys(topk, dtype, poisoned):
    """More queries than keys (the first ones see nothing), fewer, and none of either."""
    lengths_q, lengths_k = [50, 0, 300, 1, 40, 9], [20, 700, 90, 500, 0, 240]
    case = Case(lengths_q, lengths_k, 8, 2, 64, 16, topk)
    got = check(case, random_inputs(case, dtype))
    blind = torch.cat([torch.arange(m) < m - n for m, n in zip(lengths_q, lengths_k)]).to(DEVICE)
    assert int(blind.sum()) == 30 + 210 + 40
    assert bool((got.out[blind] == 0).all()) and bool(got.lse[:, blind].isneginf().all())
    assert bool((got.dq[blind] == 0).all()) and bool((got.dk[20:720] == 0).all())


@pytest.mark.parametrize("lengths", [([0, 0], [30, 9]), ([30, 9], [0, 0]), ([0], [0])])
def test_no_queries_or_no_keys(lengths, poisoned):
    case = Case(*lengths, 4, 2, 64, 8, 3)
    got = run(case, random_inputs(case, torch.bfloat16), upstream(case, torch.bfloat16))
    assert bool(got.lse.isneginf().all())
    for name, x in zip(NAMES, got.numbers()):
        assert name == "lse" or bool((x == 0).all())


@pytest.mark.parametrize("topk", [1, 3, 100])
def test_gradient_of_out_alone_and_of_lse_alone(topk, poisoned):
    case = self_attention([500, 33], 4, 2, 64, 32, topk)
    inputs = random_inputs(case, torch.bfloat16)
    dout, dlse = upstream(case, torch.bfloat16)
    check(case, inputs, (dout, None))
    got = run(case, inputs, (None, dlse))
    assert bool((got.dv == 0).all())
    exact, plain = exact_and_plain(case, inputs, got.ids, (torch.zeros_like(dout), dlse), 64**-0.5)
    for i, name in ((2, "dq"), (3, "dk")):
        assert_within_budget(getattr(got, name), exact[i], plain[i], name)


LAYOUTS = {
    "heads apart in memory": head_major,
    "misaligned": misaligned,
    "16 bytes into a wider row": lambda x: torch.nn.functional.pad(x, (8, 16))[..., 8:-16],
    "every second token": lambda x: x.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("topk", [1, 3, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_bits(layout, topk):
    case = self_attention([500, 77], 4, 2, 64, 32, topk)
    inputs = random_inputs(case, torch.bfloat16)
    dout, dlse = upstream(case, torch.bfloat16)
    views = [LAYOUTS[layout](x) for x in (*inputs, dout)]
    assert not any(x.is_contiguous() for x in views)
    got = run(case, views[:3], (views[3], dlse))
    assert_same_bits(got, run(case, inputs, (dout, dlse)))
    assert all(x.is_contiguous() for x in got), "fake tensors, and torch.compile, say contiguous"
    # As .sum() passes it on: one element, and one row, for all.
    for small in (dout[:1, :1, :1], dout[:1]):
        wide = small.expand_as(dout)
        assert_same_bits(
            run(case, inputs, (wide, None)), run(case, inputs, (wide.contiguous(), None))
        )


def test_offsets_past_2_31():
    """q, k, v side by side in one buffer; the last rows of each, of out and of dq are beyond."""
    tokens = 518 * 1024 + 100
    case = self_attention(tokens, 32, 1, 128, 1024, 2)
    fused = torch.randn(tokens, 34, 128, dtype=torch.bfloat16, device=DEVICE)
    assert (tokens - 1) * 32 * 128 > 2**31 and (tokens - 1) * 34 * 128 > 2**31
    inputs = list(fused.split([32, 1, 1], dim=1))
    douts = upstream(case, torch.bfloat16)
    check_samples(case, inputs, [(0, 518), (0, 517), (0, 300)], douts, samples=8)


def test_more_sequences_than_a_call_takes():
    """FlashAttention has the sequences of a call in a grid dimension that ends at 65,535."""
    lengths = torch.randint(0, 21, (70_000,)).tolist()
    case = self_attention(lengths, 2, 1, 64, 8, 2)
    late = [b for b in (3, 30_000, 65_534, 65_535, 65_536, 69_999) if lengths[b]]
    blocks = [(b, j) for b in late for j in range(-(-lengths[b] // 8))]
    check_samples(case, random_inputs(case, torch.bfloat16), blocks)


def test_more_blocks_than_a_call_takes():
    """Own blocks and segments of the one sequence are more than 65,535."""
    case = self_attention(8 * 66_000 + 5, 1, 1, 64, 8, 3)
    blocks = [(0, j) for j in (0, 1, 32_767, 65_533, 65_534, 65_535, 65_536, 66_000)]
    check_samples(case, random_inputs(case, torch.bfloat16), blocks)


@pytest.mark.parametrize("topk", [1, 3, 100])
@pytest.mark.parametrize("head_dim", [64, 192])
def test_nan_in_a_neighbouring_sequence_stays_there(head_dim, topk, poisoned):
    case = self_attention([500, 333, 410], 4, 2, head_dim, 32, topk)
    inputs = random_inputs(case, torch.bfloat16)
    douts = upstream(case, torch.bfloat16)
    clean = run(case, inputs, douts)
    mine = torch.cat([torch.arange(500), torch.arange(833, 1243)]).to(DEVICE)
    for x in (*inputs, *douts):
        x.narrow(0 if x.dim() == 3 else 1, 500, 333).fill_(torch.nan)
    got = run(case, inputs, douts)
    for name in Result._fields:
        x, y = getattr(got, name), getattr(clean, name)
        dim = 1 if name == "lse" else 0
        assert torch.equal(x.index_select(dim, mine), y.index_select(dim, mine)), name
        assert name == "ids" or bool(x.narrow(dim, 500, 333).isnan().all()), name


@pytest.mark.parametrize("topk", [1, 3, 100])
@pytest.mark.parametrize("which", ["q", "k", "both"])
@pytest.mark.parametrize("values", INVALID)
def test_invalid_offsets_give_nan(values, which, topk, poisoned):
    case = self_attention([100] + [0] * (len(values) - 2), 4, 2, 64, 16, topk)
    inputs, douts = random_inputs(case, torch.bfloat16), upstream(case, torch.bfloat16)
    right = run(case, inputs, douts)
    cu_seqlens = list(case.cu_seqlens(DEVICE))
    for i in {"q": [0], "k": [1], "both": [0, 1]}[which]:
        cu_seqlens[i] = torch.tensor(values, dtype=torch.int32, device=DEVICE)
    wrong = run(case, inputs, douts, tuple(cu_seqlens))
    for name, x in zip(NAMES, wrong.numbers()):
        assert bool(x.isnan().all()), name
    assert bool((wrong.ids == -1).all())
    torch.cuda.synchronize()  # an access out of bounds would show here at the latest
    assert_same_bits(run(case, inputs, douts), right)


@pytest.mark.parametrize("topk", [1, 3, 100])
@pytest.mark.parametrize("bound", [{"lengths_q": [99]}, {"lengths_k": [99]}])
def test_too_small_max_seqlen_gives_nan(bound, topk):
    case = self_attention(100, 4, 2, 64, 16, topk)
    inputs, douts = random_inputs(case, torch.bfloat16), upstream(case, torch.bfloat16)
    wrong = run(case._replace(**bound), inputs, douts, case.cu_seqlens(DEVICE))
    assert all(bool(x.isnan().all()) for x in wrong.numbers())


def test_max_seqlen_may_be_a_bound_far_above():
    case = self_attention([300, 44], 4, 2, 64, 16, 3)
    inputs, douts = random_inputs(case, torch.bfloat16), upstream(case, torch.bfloat16)
    right = run(case, inputs, douts)
    far = case._replace(lengths_q=[2**40], lengths_k=[2**40])
    assert_same_bits(run(far, inputs, douts, case.cu_seqlens(DEVICE)), right)


# B = 512 and the dense call have several key tiles, whose dq FlashAttention adds up with atomics
# unless told otherwise; a hot block has several segments.
REPEATED = [
    ("random", 8192, 4, 4, 128, 8),
    ("random", 8192, 2, 2, 512, 3),
    ("hot", 8192, 4, 1, 512, 3),
    ("hot", 8192, 8, 2, 64, 4),
    ("random", 3000, 2, 1, 512, 8),  # dense
    ("random", 5000, 2, 1, 1024, 1),
]


@BOTH
@pytest.mark.parametrize(("kind", "length", "heads_q", "heads_k", "block_size", "topk"), REPEATED)
def test_two_runs_are_bit_equal(flash_attention, kind, length, heads_q, heads_k, block_size, topk):
    case = self_attention(length, heads_q, heads_k, 128, block_size, topk)
    inputs, douts = INPUTS[kind](case, torch.bfloat16), upstream(case, torch.bfloat16)
    first = run(case, inputs, douts)
    for _ in range(3):
        assert_same_bits(run(case, inputs, douts), first)


@pytest.mark.parametrize(("kind", "block_size"), [("random", 128), ("hot", 64), ("hot", 512)])
def test_results_do_not_depend_on_the_workspace(kind, block_size, monkeypatch):
    """Forward bit for bit: a row's arithmetic in FlashAttention does not depend on the rows around
    it, and merge takes the parts of a row in the order of its slots. Backward within the budget:
    dk and dv are sums over the rows of a segment, and other ranges of queries cut other segments.
    """
    case = self_attention(8192, 4, 2, 128, block_size, 4)
    inputs, douts = INPUTS[kind](case, torch.bfloat16), upstream(case, torch.bfloat16)
    results, groups = [], []
    for size in (2**34, 2**26, 2**22):
        monkeypatch.setattr(flash, "WORKSPACE_BYTES", size)
        sizes = (1, 8192, 8192, 8192, 4, 2, 128, block_size, 4)
        plan = flash.make_plan(*sizes, backward=True)
        groups.append((len(plan.head_ranges()), len(plan.query_ranges())))
        results.append(check(case, inputs, douts))
    assert groups[0] == (1, 1) and groups[1][0] == 2 and groups[2][1] > 1
    for result in results[1:]:
        assert_same_bits(result, results[0], ("out", "lse", "ids"))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("topk", [1, 4, 100])
@pytest.mark.parametrize("flash_attention", ["package"], indirect=True)
def test_both_flash_attentions_agree(flash_attention, head_dim, topk, monkeypatch):
    """Each is within the budget of float64, on one selection."""
    case = Case([700, 0, 65, 1, 40], [700, 30, 65, 1, 300], 8, 2, head_dim, 64, topk)
    inputs, douts = random_inputs(case, torch.bfloat16), upstream(case, torch.bfloat16)
    of_package = check(case, inputs, douts)
    assert varlen.package() is not None
    monkeypatch.setattr(varlen, "package", lambda: None)
    of_torch = check(case, inputs, douts)
    assert torch.equal(of_package.ids, of_torch.ids)


def relative_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", INPUTS)
def test_as_exact_as_dense_flash_attention(kind, dtype):
    """Relative L2 error at most 1.5 times that of FlashAttention 2 on the same inputs, causal and
    dense, each against its own float64."""
    case = self_attention(4096, 4, 4, 128, 128, 8)
    inputs, (dout, _) = INPUTS[kind](case, dtype), upstream(case, dtype)
    sparse = run(case, inputs, (dout, None))
    cu_seqlens = case.cu_seqlens(DEVICE)
    varlen = (*cu_seqlens, 4096, 4096, 0.0, True)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(*inputs, *varlen, False)
    unused = torch.zeros(2, dtype=torch.uint64, device=DEVICE)
    dense = torch.ops.aten._flash_attention_backward(
        dout, *inputs, out, lse, *varlen, unused, unused
    )
    errors = []
    one_block = case._replace(block_size=4096, topk=1)
    for of, ids, got in (
        (case, sparse.ids, (sparse.out, sparse.dq, sparse.dk, sparse.dv)),
        (one_block, sparse.ids[..., :0], (out, *dense)),
    ):
        exact, _ = exact_and_plain(of, inputs, ids, (dout, None), 128**-0.5)
        errors.append([relative_error(x, y) for x, y in zip(got, (exact[0], *exact[2:]))])
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), *errors):
        assert ours <= 1.5 * theirs, f"{name}: {ours:.2e}, dense FlashAttention {theirs:.2e}"
