"""The flash backend on a GPU under torch: graphs, streams, waits, compile, memory, errors."""

import gc
import re

import pytest
import torch
from flash_checks import (
    DEVICE,
    Result,
    assert_same_bits,
    check_second_device,
    hot_inputs,
    random_inputs,
    run,
    two_at_once,
    upstream,
)
from flash_stages import head_major
from numerics import Case, self_attention
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import moba_ext
from moba_ext import flash

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("flash_attention")]

BOTH = pytest.mark.parametrize("flash_attention", ["aten", "package"], indirect=True)
RAGGED = self_attention([500, 0, 33, 1500, 15], 8, 2, 128, 64, 3)
LARGE_BLOCKS = self_attention(3000, 4, 4, 128, 512, 3)
CASES = [  # and whether two groups of heads run at once
    (RAGGED, False),
    (RAGGED._replace(heads_k=4), True),
    (RAGGED._replace(topk=1), False),
    (RAGGED._replace(topk=100), False),  # dense
    (LARGE_BLOCKS, False),
    (LARGE_BLOCKS, True),
]
OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def op_args(case: Case, inputs):
    sizes = case.max_seqlen_q, case.max_seqlen_k, case.block_size, case.topk
    return *inputs, *case.cu_seqlens(inputs[0].device), *sizes


@pytest.fixture
def in_turn(case, two, monkeypatch):
    if two:
        monkeypatch.setattr(flash, "WORKSPACE_BYTES", two_at_once(case))


@BOTH
@pytest.mark.parametrize(("case", "two"), CASES)
def test_graph_of_forward_and_backward(flash_attention, case, two, in_turn):
    """Captured once, replayed with other inputs and other sequences of the same total length."""
    inputs = [x.requires_grad_() for x in random_inputs(case, torch.bfloat16)]
    douts = upstream(case, torch.bfloat16)
    cu_seqlens = case.cu_seqlens(DEVICE)
    args = *inputs, *cu_seqlens, *op_args(case, inputs)[5:]

    def step() -> Result:
        out, lse, ids = torch.ops.moba.attention(*args, backend="flash")
        return Result(out, lse, ids, *torch.autograd.grad((out, lse), inputs, douts))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = step()
    others = case, case._replace(lengths_q=case.lengths_q[::-1], lengths_k=case.lengths_k[::-1])
    for other in others:
        values, new_douts = hot_inputs(other, torch.bfloat16), upstream(other, torch.bfloat16)
        with torch.no_grad():
            news = *values, *new_douts, *other.cu_seqlens(DEVICE)
            for old, new in zip((*inputs, *douts, *cu_seqlens), news):
                old.copy_(new)
        graph.replay()
        assert_same_bits(static, run(other, values, new_douts))


# What makes the host wait for the device: cudaStreamSynchronize, cudaDeviceSynchronize,
# cudaEventSynchronize, any cudaMemcpy* that is not *Async, the same of the driver (cu*), and a copy
# to the host, which is how .item() and .tolist() begin.
WAITS = re.compile(r"^cu(da)?(Stream|Device|Event|Ctx)Synchronize|^cu(da)?Memcpy(?!.*Async)|DtoH")


def events_within(function) -> tuple[list[str], list[str]]:
    """Names of what the host and the device did on behalf of a call, backward thread included."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        with record_function("the call"):
            function()
        torch.cuda.synchronize()  # so that all kernels are recorded; outside the range, not counted
    events = prof.events()
    (span,) = (
        e.time_range for e in events if e.name == "the call" and e.device_type == DeviceType.CPU
    )
    host = [
        e.name
        for e in events
        if e.device_type == DeviceType.CPU and span.start <= e.time_range.start < span.end
    ]
    return host, [e.name for e in events if e.device_type == DeviceType.CUDA]


@BOTH
@pytest.mark.parametrize(("case", "two"), CASES)
def test_nothing_waits_for_the_device(flash_attention, case, two, in_turn):
    inputs, douts = random_inputs(case, torch.bfloat16), upstream(case, torch.bfloat16)
    cu_seqlens = case.cu_seqlens(DEVICE)

    def call():
        run(case, inputs, douts, cu_seqlens)

    for _ in range(2):  # memory is cached, kernels are loaded
        call()
    host, device = events_within(call)
    assert sum("LaunchKernel" in name for name in host) > 10, "the profile has no launches"
    assert any("moba::cuda" in name for name in device), "no kernel of ours"
    assert any("flash_fwd" in name for name in device), "no kernel of FlashAttention"
    assert [name for name in host + device if WAITS.search(name)] == []
    host, device = events_within(lambda: (call(), inputs[0].sum().item()))
    assert [name for name in host + device if WAITS.search(name)] != [], "a wait goes unnoticed"

    torch.cuda.set_sync_debug_mode("error")  # torch's own view of the same
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


LONG = self_attention(4096, 4, 2, 128, 64, 3)


@BOTH
@pytest.mark.parametrize(
    ("case", "two"),
    [
        (LONG._replace(topk=1), False),
        (LONG, False),
        (LONG._replace(heads_k=4), True),
        (LONG._replace(topk=99), False),
    ],
)
def test_runs_on_the_current_stream(flash_attention, case, two, in_turn):
    inputs, douts = random_inputs(case, torch.bfloat16), upstream(case, torch.bfloat16)
    cu_seqlens = case.cu_seqlens(DEVICE)
    wanted = run(case, inputs, douts, cu_seqlens)
    late, stream = [torch.zeros_like(x) for x in inputs], torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for x, y in zip(late, inputs):
            x.copy_(y)
        got = run(case, late, douts, cu_seqlens)
        copies = [x.clone() for x in got]
    stream.synchronize()
    assert_same_bits(Result(*copies), wanted)


@BOTH
def test_two_groups_at_once_share_no_memory(flash_attention, monkeypatch):
    """Bit for bit as one after the other, with the device far behind the host."""
    case = self_attention(8192, 8, 8, 128, 128, 8)
    inputs, douts = random_inputs(case, torch.bfloat16), upstream(case, torch.bfloat16)
    monkeypatch.setattr(flash, "WORKSPACE_BYTES", two_at_once(case))
    for _ in range(3):
        torch.cuda._sleep(50_000_000)
        got = run(case, inputs, douts)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flash, "_take_turns", lambda f, groups, *_: [f(*x) for x in groups])
            wanted = run(case, inputs, douts)
        assert_same_bits(got, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("topk", [1, 3, 100])
def test_second_device_while_the_first_is_current(topk):
    check_second_device(topk, "flash")


@BOTH
def test_compile_fullgraph(flash_attention):
    def function(q, k, v, cu_seqlens, longest):
        out, lse = moba_ext.moba_attention_varlen(
            *(q, k, v, cu_seqlens, cu_seqlens, longest, longest),
            **{"block_size": 64, "topk": 3, "return_lse": True, "backend": "flash"},
        )
        return 2 * out, lse  # exact in bfloat16

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    for lengths in ([500, 20], [330, 90, 4], [1200]):  # the second time with dynamic shapes
        case = self_attention(lengths, 4, 2, 128, 64, 3)
        inputs, douts = random_inputs(case, torch.bfloat16), upstream(case, torch.bfloat16)
        results = []
        for f in (compiled, function):
            leaves = [x.detach().requires_grad_() for x in inputs]
            outputs = f(*leaves, case.cu_seqlens(DEVICE)[0], case.max_seqlen_k)
            results.append((*outputs, *torch.autograd.grad(outputs, leaves, douts)))
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), *results):
            assert torch.equal(a, b), name
    direct = run(case, inputs, (2 * douts[0], douts[1]))
    assert torch.equal(results[0][0], 2 * direct.out) and torch.equal(results[0][2], direct.dq)


@BOTH
@pytest.mark.parametrize("topk", [1, 3, 50])
def test_opcheck(flash_attention, topk):
    case = Case([10, 0, 30], [20, 7, 30], 4, 2, 64, 8, topk)
    inputs = random_inputs(case, torch.bfloat16)
    kwargs = {"softmax_scale": 0.3, "backend": "flash"}
    for requires_grad in (False, True):
        args = op_args(case, [x.clone().requires_grad_(requires_grad) for x in inputs])
        torch.library.opcheck(torch.ops.moba.attention, args, kwargs, test_utils=OPCHECKS)
    args = op_args(case, [head_major(x) for x in inputs])
    torch.library.opcheck(torch.ops.moba.attention, args, kwargs, test_utils=OPCHECKS)
    args = op_args(case, inputs)
    saved = torch.ops.moba.attention(*args, **kwargs)
    for dlse in (upstream(case, torch.bfloat16)[1], None):
        backward = (torch.randn_like(inputs[0]), dlse, *inputs, *saved, *args[3:])
        torch.library.opcheck(
            torch.ops.moba.attention_backward, backward, kwargs, test_utils=OPCHECKS
        )


def test_batched_equals_packed():
    q, k, v = (
        torch.randn(3, n, h, 64, device=DEVICE).half() for n, h in ((70, 4), (90, 2), (90, 2))
    )
    out, lse = moba_ext.moba_attention(
        q, k, v, block_size=16, topk=3, return_lse=True, backend="flash"
    )
    case = Case([70] * 3, [90] * 3, 4, 2, 64, 16, 3)
    packed = run(
        case,
        [x.flatten(0, 1) for x in (q, k, v)],
        (torch.zeros(210, 4, 64).half().to(DEVICE), None),
    )
    assert torch.equal(out.flatten(0, 1), packed.out)
    assert torch.equal(lse.transpose(0, 1).flatten(1, 2), packed.lse)


def peaks(case: Case) -> tuple[int, int]:
    """Most bytes beyond inputs and returned tensors, forward and backward.

    What a second stream still uses torch counts as free, but not as unreserved.
    """
    inputs = [x.requires_grad_() for x in random_inputs(case, torch.bfloat16)]
    args = op_args(case, inputs)

    def peak(function) -> tuple[int, list]:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        results = function()
        allocated = torch.cuda.max_memory_allocated() - allocated
        reserved = torch.cuda.max_memory_reserved() - reserved
        return max(allocated, reserved) - sum(x.nbytes for x in results), results

    forward, results = peak(lambda: torch.ops.moba.attention(*args, backend="flash"))
    dout = torch.randn_like(results[0])
    backward, _ = peak(lambda: torch.autograd.grad(results[0], inputs, dout))
    return forward, backward


ROW_C = self_attention(131_072, 16, 16, 128, 128, 8)
SLACK = 32 * 2**20  # of estimates: what a small call holds, centroids and scores of the gate


@BOTH
@pytest.mark.parametrize(
    "case",
    [
        ROW_C,
        self_attention(32_768, 32, 8, 128, 128, 8),
        self_attention(32_768, 16, 16, 128, 512, 3),
        self_attention([20_000, 5_000, 300, 40_000], 16, 2, 128, 1024, 4),
        self_attention(65_536, 16, 1, 128, 128, 1),
        self_attention(16_384, 16, 4, 128, 2048, 8),  # dense
    ],
)
def test_memory_is_bounded_and_as_planned(flash_attention, case):
    measured = peaks(case)
    if case == ROW_C:
        assert max(measured) <= 3e9, f"{measured[0]:,} bytes forward, {measured[1]:,} backward"
    plan = moba_ext.plan(
        case.lengths_q,
        **{"heads_q": case.heads_q, "heads_k": case.heads_k, "head_dim": case.head_dim},
        **{"block_size": case.block_size, "topk": case.topk, "dtype": torch.bfloat16},
        **{"device": DEVICE, "backend": "flash"},
    )
    for name, got, planned in zip(
        ("forward", "backward"), measured, (plan.forward_bytes, plan.backward_bytes)
    ):
        low, high = sorted((got, planned))
        assert high <= 1.5 * low + SLACK, f"{name}: {got:,} bytes, planned {planned:,}"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"dtype": torch.float32},
            TypeError,
            "backend is 'flash', but q has dtype torch.float32, and FlashAttention takes bfloat16 "
            "and float16",
        ),
        (
            {"device": "cpu"},
            ValueError,
            "backend is 'flash', but q has device cpu, and the flash backend takes CUDA tensors",
        ),
        (
            {"head_dim": 12},
            ValueError,
            "backend is 'flash', but q has head_dim 12, and FlashAttention takes multiples of 8 "
            "from 8 to 256",
        ),
        (
            {"head_dim": 264},
            ValueError,
            "backend is 'flash', but q has head_dim 264, and FlashAttention takes multiples of 8 "
            "from 8 to 256",
        ),
    ],
)
def test_what_flash_attention_lacks_is_an_error(change, error, message):
    of = {"dtype": torch.bfloat16, "device": DEVICE, "head_dim": 64} | change
    x = torch.randn(1, 100, 2, of["head_dim"], device=of["device"]).to(of["dtype"])
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        moba_ext.moba_attention(x, x, x, block_size=16, topk=3, backend="flash")
    plan = {"heads_q": 2, "head_dim": of["head_dim"], "block_size": 16, "topk": 3}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        moba_ext.plan(100, **plan, dtype=of["dtype"], device=of["device"], backend="flash")
