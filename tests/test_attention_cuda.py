"""Which backend CUDA tensors take, and the reference where that is it."""

import warnings

import pytest
import torch
from numerics import Case, assert_within_budget, check_selection, run_masked, self_attention
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import moba_ext
from moba_ext import ops, reference, sm90

pytestmark = pytest.mark.gpu

CASES = [
    self_attention([300, 1, 64], 4, 2, 64, 32, 3),
    Case([20, 0, 90], [60, 7, 90], 2, 2, 128, 16, 4),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_is_the_best_there_is(dtype, flash_attention):
    best = "flash" if ops.backend_status()["sm90"] else "sm90"
    q, k, v = (torch.randn(1, 200, 2, 64, device="cuda", dtype=dtype) for _ in range(3))
    q.requires_grad_()
    results = []
    for backend in ("auto", best):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = moba_ext.moba_attention(q, k, v, block_size=16, topk=3, backend=backend)
        results.append((out, *torch.autograd.grad(out.sum(), q)))
    assert all(torch.equal(x, y) for x, y in zip(*results))
    plan = moba_ext.plan(200, heads_q=2, head_dim=64, block_size=16, topk=3, dtype=dtype,
                         device="cuda")  # fmt: skip
    assert plan.backend == best


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [(torch.float32, 64, "dtype torch.float32"), (torch.bfloat16, 20, "head_dim 20")],
)
@pytest.mark.parametrize("case", CASES)
def test_what_flash_attention_lacks_runs_on_the_reference(case, dtype, head_dim, reason):
    case = case._replace(head_dim=head_dim)
    inputs = [x.cuda().requires_grad_() for x in case.tensors(dtype)]
    lengths = [x.cuda() for x in case.cu_seqlens()]
    lengths += [case.max_seqlen_q, case.max_seqlen_k]
    sizes = {"block_size": case.block_size, "topk": case.topk}
    moba_ext.attention._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=f"slow reference backend: q has {reason}"):
        out, lse = moba_ext.moba_attention_varlen(*inputs, *lengths, **sizes, return_lse=True)
    assert out.is_cuda and out.dtype == dtype
    dout = torch.randn_like(out)
    got = out, lse, *torch.autograd.grad(out, inputs, dout)
    kbar = reference.block_mean(inputs[1], lengths[1], case.block_size)
    ids, _ = reference.gate_topk(inputs[0], kbar, *lengths[:2], case.max_seqlen_k, *sizes.values())
    exact, plain = [], []
    for results, precision in ((exact, torch.float64), (plain, dtype)):
        again = [x.detach().cpu().to(precision).requires_grad_() for x in inputs]
        values = run_masked(case, *again, ids.cpu())
        results += [*values, *torch.autograd.grad(values[0], again, dout.cpu().to(precision))]
    for name, x, y, z in zip(("out", "lse", "dq", "dk", "dv"), got, exact, plain):
        assert_within_budget(x.detach().cpu(), y.detach(), z.detach(), name)
    with pytest.raises(
        RuntimeError, match="on CUDA tensors the op runs 'flash' and 'sm90' only: q has"
    ):
        torch.ops.moba.attention(*inputs, *lengths, *sizes.values())


def test_public_function_goes_around_the_dispatcher_where_nobody_looks(
    flash_attention, monkeypatch
):
    calls = []

    def count(module, name):
        function = getattr(module, name)  # which the dispatcher has itself
        monkeypatch.setattr(module, name, lambda *args: calls.append(name) or function(*args))

    count(ops, "_attention_cuda")
    count(ops, "_attention_backward_cuda")
    count(sm90, "forward_prepared")
    forward = "_attention_cuda" if ops.backend_status()["sm90"] else "forward_prepared"
    inputs = [x.cuda().requires_grad_() for x in CASES[0].tensors(torch.bfloat16)]
    args = *(x.cuda() for x in CASES[0].cu_seqlens()), 300, 300

    def attend():
        out = moba_ext.moba_attention_varlen(*inputs, *args, block_size=32, topk=3)
        return out, *torch.autograd.grad(out.sum(), inputs)

    def of_the_op():
        out, *_ = torch.ops.moba.attention(*inputs, *args, 32, 3)
        return out, *torch.autograd.grad(out.sum(), inputs)

    wanted = of_the_op()
    assert calls == ["_attention_backward_cuda"]
    for _ in range(2):  # checked and prepared, and known
        calls.clear()
        assert all(torch.equal(x, y) for x, y in zip(attend(), wanted))
        assert calls == [forward, "_attention_backward_cuda"]
    calls.clear()
    with FlopCounterMode(display=False):
        assert all(torch.equal(x, y) for x, y in zip(attend(), wanted))
    with torch.device("cuda"):  # a mode of functions, which a backward's thread does not have
        assert all(torch.equal(x, y) for x, y in zip(attend(), wanted))
    assert calls == ["_attention_backward_cuda"]
    calls.clear()
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        attend()
    assert {"moba::attention", "moba::attention_backward"} <= {e.name for e in prof.events()}
    assert not calls


@pytest.mark.parametrize("scale", [None, 0.3, 0.0, -0.3])
def test_a_call_like_one_before_in_other_memory(scale, flash_attention):
    """What is remembered of a call holds for tensors that are aligned in another way, too."""
    case = self_attention([300, 100], 4, 2, 64, 32, 3)
    lengths = *(x.cuda() for x in case.cu_seqlens()), 300, 300
    sizes = {"block_size": 32, "topk": 3, "softmax_scale": scale}
    inputs = [x.cuda() for x in case.tensors(torch.bfloat16)]
    wanted = moba_ext.moba_attention_varlen(*inputs, *lengths, **sizes)
    for place in range(3):
        moved = list(inputs)
        memory = torch.empty(moved[place].numel() + 1, device="cuda", dtype=torch.bfloat16)
        moved[place] = memory[1:].view(moved[place].shape).copy_(moved[place])
        assert moved[place].data_ptr() % 16 and moved[place].is_contiguous()
        assert torch.equal(moba_ext.moba_attention_varlen(*moved, *lengths, **sizes), wanted)


def test_values_of_cu_seqlens_are_read_for_debugging(monkeypatch):
    q = torch.randn(100, 2, 64, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 60, 50, 100], dtype=torch.int32, device="cuda")

    def attend():
        return moba_ext.moba_attention_varlen(
            *(q, q, q, cu_seqlens, cu_seqlens, 60, 60), block_size=16, topk=2
        )

    assert attend().isnan().all()
    monkeypatch.setattr(moba_ext.attention, "_DEBUG", True)
    with pytest.raises(ValueError, match="cu_seqlens_q decreases at index 2"):
        attend()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functorch_sees_the_op(flash_attention):
    inputs = [torch.randn(3, 1, 100, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]

    def attend(q, k, v):
        return moba_ext.moba_attention(q, k, v, block_size=16, topk=2)

    wanted = torch.stack([attend(*x) for x in zip(*inputs)])
    assert torch.equal(torch.func.vmap(attend)(*inputs), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_select_blocks(dtype):
    case = self_attention([300, 1, 64], 4, 2, 64, 16, 4)
    q, k, _ = (x.cuda() for x in case.tensors(dtype))
    cu_seqlens = [x.cuda() for x in case.cu_seqlens()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = moba_ext.select_blocks(
            *(q, k), block_size=16, topk=4, cu_seqlens_q=cu_seqlens[0], cu_seqlens_k=cu_seqlens[1]
        )
    kbar = torch.ops.moba.block_mean(k, cu_seqlens[1], 16)
    check_selection(case, q, kbar, chosen.block_ids, chosen.scores)
    assert torch.equal(chosen.counts, (chosen.block_ids >= 0).sum(-1))


def test_second_device_and_side_stream():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    q = torch.randn(100, 2, 64, device=device)
    cu_seqlens = torch.tensor([0, 100], dtype=torch.int32, device=device)
    wanted = torch.ops.moba.block_mean(q, cu_seqlens, 16)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        got = torch.ops.moba.block_mean(q, cu_seqlens, 16)
    stream.synchronize()
    assert torch.equal(got, wanted)
