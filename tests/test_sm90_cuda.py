"""The sm90 backend on a Hopper GPU, checked as the flash backend is (test_flash_cuda.py).

Its kernels alone: test_sm90_stages_cuda.py.
"""

import functools
import re
from concurrent.futures import ThreadPoolExecutor

import flash_checks
import pytest
import torch
from flash_checks import INPUTS, Result, assert_same_bits, hot_inputs, random_inputs, upstream
from flash_stages import DEVICE, INVALID
from numerics import Case, self_attention
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import moba_ext
from moba_ext import flash, groups, sm90, varlen

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("flash_attention")]

DTYPES = [torch.bfloat16, torch.float16]
check = functools.partial(flash_checks.check, backend="sm90")
run = functools.partial(flash_checks.run, backend="sm90")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (8, 1), (16, 1)])
def test_the_op(heads, head_dim, dtype, poisoned):
    case = self_attention([700, 0, 65, 1, 430], *heads, head_dim, 64, 3)
    check(case, random_inputs(case, dtype))
    assert_same_selection(case, random_inputs(case, dtype))


def assert_same_selection(case: Case, inputs) -> None:
    douts = upstream(case, inputs[0].dtype)
    results = [flash_checks.run(case, inputs, douts, backend=b) for b in ("sm90", "flash")]
    assert torch.equal(results[0].ids, results[1].ids)


@pytest.fixture
def set_phases(monkeypatch):
    """Sets how many parts a phase has at least, of calls whose rows the kernel that attends merges;
    a call with less than a quarter of them has none."""

    def set_parts(parts: int) -> None:
        monkeypatch.setattr(sm90, "PHASE_PARTS", parts)
        flash._plan.cache_clear()

    return set_parts


@pytest.fixture(params=[1, 2**12])
def phases(request, set_phases) -> None:
    set_phases(request.param)


MERGED = [
    self_attention([700, 0, 65, 1, 430], 4, 2, 128, 64, 3),
    self_attention(5000, 4, 4, 64, 128, 8),
    self_attention(3000, 8, 1, 128, 96, 7),
    Case([5, 0, 2000, 1, 400], [90, 7, 2400, 0, 250], 6, 2, 128, 16, 5),
    Case([900, 9], [300, 700], 2, 1, 64, 32, 2),
]


def plan_of(case: Case) -> groups.Plan:
    tokens_q, tokens_k = sum(case.lengths_q), sum(case.lengths_k)
    sizes = len(case.lengths_k), tokens_q, tokens_k, case.max_seqlen_k
    heads = case.heads_q, case.heads_k, case.head_dim
    return sm90.make_plan(*sizes, *heads, case.block_size, case.topk, backward=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", MERGED)
def test_merging_equals_merge(case, dtype, set_phases, poisoned):
    """The same bits as of two kernels, a hundred times, with one phase and with many."""
    inputs, sizes = random_inputs(case, dtype), (case.max_seqlen_q, case.max_seqlen_k)
    sizes = *case.cu_seqlens(DEVICE), *sizes, case.block_size, case.topk, None, "sm90"
    set_phases(2**40)
    assert not plan_of(case).merging
    wanted = torch.ops.moba.attention(*inputs, *sizes)
    for parts in (1, 2**8, 2**9, 2**11):
        set_phases(parts)
        assert plan_of(case).merging
        for _ in range(25):
            got = torch.ops.moba.attention(*inputs, *sizes)
            assert all(torch.equal(x, y) for x, y in zip(got, wanted))


@pytest.mark.parametrize("case", MERGED)
@pytest.mark.parametrize("kind", ["random", "hot"])
def test_merged_rows(case, kind, phases, poisoned):
    assert plan_of(case).merging
    check(case, INPUTS[kind](case, torch.bfloat16))


# Blocks of more keys than a tile, with 0 to 15 parts for a row.
LARGE = [
    self_attention([2000, 0, 65, 1, 830], 4, 2, 128, 192, 3),
    self_attention(5000, 4, 4, 64, 256, 8),
    self_attention(3000, 16, 1, 128, 512, 2),
    self_attention(4000, 2, 2, 128, 1000, 1),
    Case([5, 0, 2000, 1, 400], [900, 7, 2400, 0, 250], 6, 2, 128, 144, 16),
    Case([900, 9], [700, 300], 2, 1, 64, 136, 4),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("kind", ["random", "hot"])
def test_large_blocks(kind, case, dtype, poisoned):
    """Against the reference, and the same bits a hundred times; own rows begin with their parts."""
    inputs = INPUTS[kind](case, dtype)
    first = check(case, inputs)
    sizes = case.max_seqlen_q, case.max_seqlen_k, case.block_size, case.topk, None, "sm90"
    for _ in range(100):
        again = torch.ops.moba.attention(*inputs, *case.cu_seqlens(DEVICE), *sizes)
        assert all(torch.equal(x, y) for x, y in zip(again, (first.out, first.lse, first.ids)))


@pytest.mark.parametrize("values", [[0, 900], [1, 2000], [0, 2100, 2000], [0, -5, 2000]])
def test_invalid_offsets_give_nan_with_large_blocks(values, poisoned):
    case = self_attention([2000] + [0] * (len(values) - 2), 4, 2, 64, 192, 3)
    cu_seqlens = (torch.tensor(values, dtype=torch.int32, device=DEVICE),) * 2
    dtype = torch.bfloat16
    wrong = run(case, random_inputs(case, dtype), upstream(case, dtype), cu_seqlens)
    assert all(bool(x.isnan().all()) for x in wrong.numbers())


@pytest.mark.parametrize("case", [MERGED[3], LARGE[4]])
def test_whole_calls_give_the_same_bits(case, set_phases):
    """Forward and backward, twice; what sanitize.sh takes of this file, as the others' references
    would take minutes under its slower tools."""
    set_phases(1)
    inputs, douts = random_inputs(case, torch.bfloat16), upstream(case, torch.bfloat16)
    assert_same_bits(*(run(case, inputs, douts) for _ in range(2)))


def test_merging_on_several_streams(phases):
    check_several_streams(self_attention(6000, 8, 4, 128, 128, 8))


def test_large_blocks_on_several_streams():
    check_several_streams(self_attention(6000, 8, 4, 128, 256, 4))


@pytest.mark.parametrize(("tokens", "held"), [(8192, 8), (32_768, 8), (32_768, 120)])
def test_beside_a_kernel_that_holds_multiprocessors(tokens, held):
    """As NCCL's do. Thread blocks that wait for each other don't wait for its end."""
    case = self_attention(tokens, 16, 16, 128, 128, 8)
    assert plan_of(case).merging == (tokens > 8192)
    inputs = random_inputs(case, torch.bfloat16)
    cu_seqlens, sizes = case.cu_seqlens(DEVICE), (tokens, tokens, 128, 8)

    def attend() -> tuple[torch.Tensor, ...]:
        return torch.ops.moba.attention(*inputs, *cu_seqlens, *sizes, backend="sm90")

    # A thread block for every head, with all of its keys.
    keys = 2**20
    q, k = (torch.randn(*size, 128, device=DEVICE).half() for size in ((64, held), (keys, 1)))
    offsets = [torch.tensor([0, n], dtype=torch.int32, device=DEVICE) for n in (64, keys)]
    sequences = varlen.Sequences(*offsets, 64, keys)

    def hold() -> None:
        varlen.forward_call(q, k, k, sequences, 0.1, causal=False)

    wanted = attend()
    hold()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        hold()
        held_until = torch.cuda.Event()
        held_until.record()
    got = attend()
    torch.cuda.current_stream().synchronize()
    assert not held_until.query()
    for x, y in zip(got, wanted):
        assert torch.equal(x, y)


def check_several_streams(case: Case) -> None:
    """Kernels whose thread blocks wait for each other don't wait for another call's."""
    assert plan_of(case).merging == (case.block_size <= groups.KEY_TILE)
    inputs, sizes = random_inputs(case, torch.bfloat16), (case.max_seqlen_q, case.max_seqlen_k)
    sizes = *case.cu_seqlens(DEVICE), *sizes, case.block_size, case.topk, None, "sm90"
    wanted = torch.ops.moba.attention(*inputs, *sizes)
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(3)], []
    for _ in range(30):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(torch.ops.moba.attention(*inputs, *sizes))
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(x, y) for x, y in zip(result, wanted))


def test_what_cannot_be_merged_along_is_refused():
    case = self_attention(2000, 2, 1, 64, 64, 10)
    q, k, v = random_inputs(case, torch.bfloat16)
    for block_size, topk, message in (
        (64, 10, "less than 8 slots, got 64 and 9"),
        (192, 3, "at most 128 keys and less than 8 slots, got 192 and 2"),
    ):
        sizes = *case.cu_seqlens(DEVICE), 2000, 2000, block_size, topk, 0.1, 128, 1, 2000, True
        with pytest.raises(RuntimeError, match=message):
            torch.ops.moba.sm90_forward(q, q, k, v, *sizes)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("topk", [1, 3, 100])
def test_second_device_while_the_first_is_current(topk):
    flash_checks.check_second_device(topk, "sm90")


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(
    ("block_size", "topk"), [(128, 8), (512, 3), (16, 12), (128, 1), (128, 99)]
)
def test_kinds_of_inputs(kind, block_size, topk):
    case = self_attention(4097, 4, 2, 128, block_size, topk)
    check(case, INPUTS[kind](case, torch.bfloat16))


@pytest.mark.parametrize("scale", [-0.07, 0.0, 1.5])
@pytest.mark.parametrize("block_size", [64, 192])
@pytest.mark.parametrize("backend", ["flash", "sm90"])
def test_scales(backend, block_size, scale):
    case = self_attention(1000, 4, 2, 64, block_size, 4)
    inputs = random_inputs(case, torch.bfloat16)
    flash_checks.check(case, inputs, softmax_scale=scale, backend=backend)


@pytest.mark.parametrize(("kind", "block_size", "topk"), [("random", 128, 8), ("hot", 512, 3)])
def test_long_sequence(kind, block_size, topk, length=131_072):
    case = self_attention(length, 4, 2, 128, block_size, topk)
    last = length // block_size - 1
    blocks = [(0, 0), (0, 1), (0, last // 2), (0, last)]
    inputs = INPUTS[kind](case, torch.bfloat16)
    flash_checks.check_samples(case, inputs, blocks, backend="sm90")


@pytest.mark.parametrize(("begin", "end"), [(999, 1000), (100, 613)])
def test_chunked_prefill_equals_one_shot(begin, end):
    case = self_attention(1000, 8, 2, 128, 64, 4)
    q, k, v = random_inputs(case, torch.bfloat16)
    whole = run(case, [q, k, v], upstream(case, torch.bfloat16))
    chunk = case._replace(lengths_q=[end - begin], lengths_k=[end])
    got = check(chunk, [q[begin:end], k[:end], v[:end]])
    assert torch.equal(whole.ids[begin:end, :, : got.ids.shape[-1]], got.ids)


@pytest.mark.parametrize("block_size", [64, 512])
def test_small_workspace(block_size, monkeypatch):
    """Heads apart, in several ranges of queries."""
    monkeypatch.setattr(flash, "WORKSPACE_BYTES", 2**22)
    sizes = 1, 8192, 8192, 8192, 4, 2, 128, block_size, 4
    plan = sm90.make_plan(*sizes, backward=True)
    assert len(plan.head_ranges()) == 2 and len(plan.query_ranges()) > 1
    case = self_attention(8192, 4, 2, 128, block_size, 4)
    check(case, hot_inputs(case, torch.bfloat16))


def requested_bytes(function) -> tuple[int, tuple]:
    """The most that a call asks torch for at once, beyond what it returns; and that."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    results = function()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    return peak - sum(x.nbytes for x in results), results


@pytest.mark.parametrize("workspace", [None, 2**24])
@pytest.mark.parametrize(
    "case",
    [
        self_attention(16_384, 16, 16, 128, 128, 8),
        self_attention(20_000, 8, 2, 64, 512, 3),
        self_attention([5000, 300, 0, 9000], 8, 1, 128, 96, 40),
        self_attention(3000, 4, 4, 128, 200, 1),
        Case([70, 500], [3000, 9000], 16, 4, 128, 2048, 2),
    ],
)
def test_memory_is_as_planned(case, workspace, monkeypatch):
    """To the byte, also in several groups."""
    monkeypatch.setattr(flash, "WORKSPACE_BYTES", workspace)
    inputs = random_inputs(case, torch.bfloat16)
    sizes = case.max_seqlen_q, case.max_seqlen_k, case.block_size, case.topk
    sizes = *case.cu_seqlens(DEVICE), *sizes, None, "sm90"
    dout = upstream(case, torch.bfloat16)[0]
    forward, (out, lse, ids) = requested_bytes(lambda: torch.ops.moba.attention(*inputs, *sizes))
    saved = dout, None, *inputs, out, lse, ids, *sizes
    backward, _ = requested_bytes(lambda: torch.ops.moba.attention_backward(*saved))
    heads = {"heads_q": case.heads_q, "heads_k": case.heads_k, "head_dim": case.head_dim}
    plan = moba_ext.plan(
        *(case.lengths_q, case.lengths_k),
        **{**heads, "block_size": case.block_size, "topk": case.topk, "device": DEVICE},
        backend="sm90",
    )
    assert (forward, backward) == (plan.forward_bytes, plan.backward_bytes)


def test_a_million_tokens():
    case = self_attention(1 << 20, 32, 8, 128, 128, 8)
    blocks = [(0, 0), (0, 1), (0, 4000), (0, 8191)]
    check_samples = functools.partial(flash_checks.check_samples, backend="sm90")
    check_samples(case, random_inputs(case, torch.bfloat16), blocks)


@pytest.mark.parametrize("values", INVALID)
def test_invalid_offsets_give_nan_where_rows_are_merged_along(values, set_phases, poisoned):
    set_phases(1)  # with 600 parts, more would leave them to merge
    test_invalid_offsets_give_nan(values, 3, None)


@pytest.mark.parametrize("topk", [1, 3, 100])
@pytest.mark.parametrize("values", INVALID)
def test_invalid_offsets_give_nan(values, topk, poisoned):
    case = self_attention([100] + [0] * (len(values) - 2), 4, 2, 64, 16, topk)
    cu_seqlens = (torch.tensor(values, dtype=torch.int32, device=DEVICE),) * 2
    dtype = torch.bfloat16
    wrong = run(case, random_inputs(case, dtype), upstream(case, dtype), cu_seqlens)
    torch.cuda.synchronize()
    assert all(bool(x.isnan().all()) for x in wrong.numbers())


def test_nan_in_a_neighbouring_sequence_stays_there():
    case = self_attention([300, 450, 300], 4, 2, 64, 100, 3)
    inputs, douts = random_inputs(case, torch.bfloat16), upstream(case, torch.bfloat16)
    clean = run(case, inputs, douts)
    for x in inputs:
        x[300:750] = torch.nan
    got = run(case, inputs, douts)
    for part in (slice(0, 300), slice(750, None)):
        for name in ("out", "dq", "dk", "dv"):
            assert torch.equal(getattr(got, name)[part], getattr(clean, name)[part]), name
        assert torch.equal(got.lse[:, part], clean.lse[:, part])


@pytest.mark.parametrize("block_size", [64, 192])
def test_chosen_short_block_is_read_to_its_end(block_size):
    """The gate never picks a sequence's short last block, but the backward takes any block_ids."""
    case = self_attention([block_size + 30, 100], 4, 2, 64, block_size, 2)
    inputs = random_inputs(case, torch.bfloat16)
    for x in inputs:
        x[case.lengths_k[0] :] = torch.nan
    sizes = *case.cu_seqlens(DEVICE), case.max_seqlen_q, case.max_seqlen_k, block_size, case.topk
    out, lse, ids = torch.ops.moba.attention(*inputs, *sizes, backend="sm90")
    dout = upstream(case, torch.bfloat16)[0]
    grads = torch.ops.moba.attention_backward(
        dout, None, *inputs, out, lse, torch.ones_like(ids), *sizes, backend="sm90"
    )
    assert all(bool(x[: case.lengths_k[0]].isfinite().all()) for x in grads)


@pytest.mark.parametrize("block_size", [64, 96, 192])
def test_heads_that_are_one_in_memory(block_size):
    """Strides of zero, as expand() makes them, equal copies bit for bit."""
    case = self_attention([700, 300], 4, 2, 128, block_size, 3)
    q, *kv = random_inputs(case, torch.bfloat16)
    expanded = [x[:, :1].expand(-1, 2, -1) for x in kv]
    sizes = *case.cu_seqlens(DEVICE), case.max_seqlen_q, case.max_seqlen_k, block_size, case.topk
    dout = upstream(case, torch.bfloat16)[0]
    results = []
    for k, v in (expanded, [x.contiguous() for x in expanded]):
        out, lse, ids = torch.ops.moba.attention(q, k, v, *sizes, backend="sm90")
        results.append(
            torch.ops.moba.attention_backward(
                dout, None, q, k, v, out, lse, ids, *sizes, backend="sm90"
            )
            + (out, lse)
        )
    assert all(torch.equal(x, y) for x, y in zip(*results))


def test_graph_where_rows_are_merged_along(phases):
    test_graph_and_its_kernels(64)


@pytest.mark.parametrize("block_size", [64, 192])
def test_graph_and_its_kernels(block_size):
    """A CUDA graph holds it; the profile shows our kernels for the one group of heads, and none of
    FlashAttention."""
    case = self_attention([1500, 600], 8, 2, 128, block_size, 3)
    inputs = [x.requires_grad_() for x in random_inputs(case, torch.bfloat16)]
    douts, cu_seqlens = upstream(case, torch.bfloat16), case.cu_seqlens(DEVICE)

    def step() -> Result:
        return run(case, inputs, douts, cu_seqlens)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(), step()
    torch.cuda.current_stream().wait_stream(stream)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        step()
        torch.cuda.synchronize()
    names = [e.name for e in prof.events()]
    found = [re.search(r"moba::.*?(\w+)_kernel\b", name) for name in names]
    kernels = [match[1] for match in found if match]
    one_tile = block_size <= groups.KEY_TILE
    forward = ["block_mean", "gate_topk", "route_small"]
    forward += ["attend_forward_tile", "merge"] if one_tile else ["attend_forward_tiles"]
    backward = ["row_stats", "route_small", "attend_backward", "merge", "reduce_keys"]
    if plan_of(case).merging:
        assert kernels.count(forward[3]) == kernels.count(backward[2]) == 1
        assert kernels.count("merge") == 1
    else:
        assert kernels == forward + backward
    others = re.compile("Memset|flash_fwd|flash_bwd")
    assert not any(others.search(name) for name in names)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = step()
    values, new_douts = hot_inputs(case, torch.bfloat16), upstream(case, torch.bfloat16)
    with torch.no_grad():
        for old, new in zip((*inputs, *douts), (*values, *new_douts)):
            old.copy_(new)
    graph.replay()
    assert_same_bits(static, run(case, values, new_douts))


@pytest.mark.parametrize("backend", ["flash", "sm90"])
def test_threads_with_calls_of_different_sizes(backend):
    """What one launch asks of the device does not spoil another thread's: few slots and many, few
    blocks and many."""
    cases = [
        self_attention(3000, 4, 2, 128, block_size, topk)
        for block_size, topk in ((512, 3), (16, 100), (16, 40), (128, 8), (4, 5))
    ]
    cases.append(self_attention(9000, 4, 2, 128, 128, 8))
    assert plan_of(cases[-1]).merging
    calls = [(case, random_inputs(case, torch.bfloat16)) for case in cases]
    calls = [(*call, upstream(call[0], torch.bfloat16)) for call in calls]
    wanted = [flash_checks.run(*call, backend=backend) for call in calls]
    torch.cuda.synchronize()

    def repeat(index: int) -> list[Result]:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [flash_checks.run(*calls[index], backend=backend) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        return results

    with ThreadPoolExecutor(len(calls)) as pool:
        for index, results in enumerate(pool.map(repeat, range(len(calls)))):
            for result in results:
                assert_same_bits(result, wanted[index])


@pytest.mark.parametrize("grad", [True, False])
def test_a_dispatch_mode_sees_the_op(grad):
    """As selective checkpointing and counters of operations want it."""
    case = self_attention(600, 4, 2, 64, 64, 3)
    inputs = [x.requires_grad_(grad) for x in random_inputs(case, torch.bfloat16)]
    sizes = *case.cu_seqlens(DEVICE), case.max_seqlen_q, case.max_seqlen_k, 64, 3
    seen = []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    wanted = torch.ops.moba.attention(*inputs, *sizes, backend="sm90")
    with Listener():
        got = torch.ops.moba.attention(*inputs, *sizes, backend="sm90")
        assert torch.ops.moba.attention.default in seen
        if grad:
            torch.autograd.grad(got[0].sum(), inputs)
            assert torch.ops.moba.attention_backward.default in seen
    assert all(torch.equal(x, y) for x, y in zip(wanted, got))
