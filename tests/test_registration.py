"""What torch asks of an op: schema, fake tensors, autograd, compile, argument types, memory."""

import re

import pytest
import torch
from numerics import Case, run_op, self_attention
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import moba_ext
from moba_ext import ops

RAGGED = Case([10, 0, 30], [20, 7, 30], 4, 2, 16, 8, 3)
OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def op_args(case: Case, dtype=torch.float32, requires_grad=True):
    q, k, v = case.tensors(dtype, requires_grad)
    return (
        q,
        k,
        v,
        *case.cu_seqlens(),
        case.max_seqlen_q,
        case.max_seqlen_k,
        case.block_size,
        case.topk,
    )


@pytest.mark.parametrize("case", [RAGGED, RAGGED._replace(topk=1), RAGGED._replace(topk=50)])
def test_opcheck_attention(case):
    torch.library.opcheck(
        torch.ops.moba.attention, op_args(case), {"softmax_scale": 0.3}, test_utils=OPCHECKS
    )
    torch.library.opcheck(
        torch.ops.moba.attention, op_args(case, torch.bfloat16, False), test_utils=OPCHECKS
    )


def test_opcheck_backward_and_stages():
    args = op_args(RAGGED, requires_grad=False)
    q, k, v, cu_seqlens_q, cu_seqlens_k = args[:5]
    out, lse, ids = torch.ops.moba.attention(*args)
    backward = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, ids, *args[3:])
    torch.library.opcheck(torch.ops.moba.attention_backward, backward, test_utils=OPCHECKS)
    torch.library.opcheck(torch.ops.moba.block_mean, (k, cu_seqlens_k, 8), test_utils=OPCHECKS)
    kbar = torch.ops.moba.block_mean(k, cu_seqlens_k, 8)
    gate = (q, kbar, cu_seqlens_q, cu_seqlens_k, 57, 30, 8, 3)
    torch.library.opcheck(torch.ops.moba.gate_topk, gate, test_utils=OPCHECKS)
    torch.library.opcheck(
        torch.ops.moba.route, (ids, cu_seqlens_q, cu_seqlens_k, 57, 2, 8), test_utils=OPCHECKS
    )


def test_schema_is_the_documented_one():
    assert str(torch.ops.moba.attention.default._schema).startswith(
        "moba::attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
        "SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt block_size, SymInt topk, "
        "float? softmax_scale=None, str backend="
    )


def test_softmax_scale_arrives_as_given():
    """A C++ float would silently arrive as 0 through the boxed call."""
    case = self_attention(40, 1, 1, 8, 8, 2)
    q, k, v = case.tensors(torch.float32)
    small, default = run_op(case, q, k, v, softmax_scale=0.125), run_op(case, q, k, v)
    assert torch.equal(run_op(case, q, k, v, softmax_scale=8**-0.5)[0], default[0])
    assert not torch.equal(small[0], default[0])
    assert torch.equal(small[0], run_op(case, q * 0.125 * 8**0.5, k, v)[0]) or torch.allclose(
        small[0], run_op(case, q * 0.125 * 8**0.5, k, v)[0], atol=1e-6
    )


def test_meta_tensors():
    q, k = torch.empty(100, 4, 16, device="meta"), torch.empty(120, 2, 16, device="meta")
    cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta")
    out, lse, ids = torch.ops.moba.attention(q, k, k, cu_seqlens, cu_seqlens, 90, 100, 16, 4)
    assert (
        out.shape == q.shape
        and lse.shape == (4, 100)
        and ids.shape == (100, 4, 3)
        and ids.dtype == torch.int32
    )


def test_compile_fullgraph_forward_and_backward():
    def function(q, k, v):
        out, lse = moba_ext.moba_attention(q, k, v, block_size=16, topk=3, return_lse=True)
        return out.square().sum() + lse.sum()

    compiled = torch.compile(function, fullgraph=True)
    for length in (60, 100, 100):
        inputs = [torch.randn(2, length, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
        eager = torch.autograd.grad(function(*inputs), inputs)
        for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), eager):
            assert torch.allclose(a, b, atol=1e-6)


def test_compile_varlen_with_dynamic_lengths():
    def function(q, k, v, cu_seqlens, longest):
        return moba_ext.moba_attention_varlen(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, block_size=16, topk=3
        ).sin()

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for lengths in ([50, 20], [33, 90, 4], [120]):
        case = self_attention(lengths, 2, 1, 16, 16, 3)
        args = (*case.tensors(torch.float32), case.cu_seqlens()[0], case.max_seqlen_k)
        assert torch.allclose(compiled(*args), function(*args), atol=1e-6)


def test_without_gradients():
    """The same numbers where none are recorded, also compiled."""
    args = op_args(RAGGED)
    wanted = torch.ops.moba.attention(*args)
    assert wanted[0].requires_grad
    compiled = torch.compile(torch.ops.moba.attention, fullgraph=True)
    for mode in (torch.no_grad, torch.inference_mode):
        for attend in (torch.ops.moba.attention, compiled):
            with mode():
                got = attend(*args)
            assert all(torch.equal(x, y) and not x.requires_grad for x, y in zip(got, wanted))


@pytest.mark.parametrize(
    "look",
    [
        lambda: FlopCounterMode(display=False),
        lambda: torch.device("cpu"),  # a mode that functions are called in
        lambda: profile(activities=[ProfilerActivity.CPU]),
    ],
)
def test_who_looks_at_ops_is_known(look):
    assert not ops._is_seen()
    with look():
        assert ops._is_seen()
    assert not ops._is_seen()


def test_tensors_of_other_types_go_by_way_of_the_dispatcher(monkeypatch):
    """In the backward too, where dout is a plain tensor."""
    calls, sizes = [], (30, 30, 8, 3)
    plain = RAGGED.tensors(torch.float32, True)
    for name in ("_attention_cuda", "_attention_backward_cuda"):
        op = getattr(torch.ops.moba, name.removeprefix("_").removesuffix("_cuda"))

        def around(*args, name=name, op=op):
            calls.append(name)
            return op(*args)

        monkeypatch.setattr(ops, name, around)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
    for tensors, wanted in (
        (plain, ["_attention_cuda", "_attention_backward_cuda"]),
        ((torch.nn.Parameter(plain[0].detach()), *plain[1:]), []),
    ):
        out, *_ = ops.attention((*tensors, *RAGGED.cu_seqlens()), (*sizes, None, "cpu"), None)
        out.backward(torch.ones_like(out))
        assert calls == wanted
        calls.clear()


def test_transforms_and_compilers_look_at_ops():
    seen = []
    torch.func.vmap(lambda x: seen.append(ops._is_seen()) or x)(torch.zeros(2))
    assert seen == [True]
    compiled = torch.compile(lambda x: x + int(ops._is_seen()), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == 1


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_forward_derivative_says_no(mode):
    q, *args = op_args(RAGGED, requires_grad=False)
    with mode(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.ops.moba.attention(dual, *args)


def test_gradient_of_lse_alone_and_of_nothing():
    q, k, v = RAGGED.tensors(torch.float32, requires_grad=True)
    out, lse, ids = run_op(RAGGED, q, k, v)
    assert not ids.requires_grad
    dq, dk, dv = torch.autograd.grad(lse[lse.isfinite()].sum(), (q, k, v))
    assert bool((dv == 0).all()) and dq.norm() > 0 and dk.norm() > 0
    frozen = run_op(RAGGED, q.detach(), k.detach(), v)
    (dv,) = torch.autograd.grad(frozen[0].sum(), (v,))
    assert dv.norm() > 0


def test_second_derivative_says_no():
    q, k, v = RAGGED.tensors(torch.float32, requires_grad=True)
    (dq,) = torch.autograd.grad(run_op(RAGGED, q, k, v)[0].square().sum(), (q,), create_graph=True)
    with pytest.raises(RuntimeError, match="attention_backward has no derivative"):
        dq.sum().backward()


def test_gradient_through_the_gate_says_no():
    k = torch.randn(16, 1, 8, requires_grad=True)
    kbar = torch.ops.moba.block_mean(k, torch.tensor([0, 16], dtype=torch.int32), 4)
    with pytest.raises(RuntimeError, match="the gate|gate takes no gradient"):
        kbar.sum().backward()


def allocated(function) -> int:
    """Bytes that torch's CPU allocator handed out during the call, freed or not."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = function()
    total = sum(e.self_cpu_memory_usage for e in prof.events() if e.name == "aten::empty")
    assert result is not None
    return total


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (self_attention(3000, 4, 2, 64, 128, 3), torch.float32),
        (self_attention([700, 0, 50], 4, 1, 72, 32, 4), torch.bfloat16),
        (self_attention(1000, 2, 2, 64, 512, 2), torch.float32),  # dense
        (Case([100], [4000], 8, 2, 128, 64, 12), torch.float16),
        (self_attention(9000, 4, 4, 64, 32, 20), torch.float32),  # several groups
    ],
)
def test_planned_bytes_are_what_a_call_allocates(case, dtype):
    plan = moba_ext.plan(
        case.lengths_q,
        case.lengths_k,
        heads_q=case.heads_q,
        heads_k=case.heads_k,
        head_dim=case.head_dim,
        block_size=case.block_size,
        topk=case.topk,
        dtype=dtype,
    )
    args = op_args(case, dtype, requires_grad=False)
    results = []
    forward = allocated(lambda: results.append(torch.ops.moba.attention(*args)) or results)
    out, lse, ids = results[0]
    assert forward == plan.forward_bytes + sum(x.nbytes for x in (out, lse, ids))
    backward_args = (torch.randn_like(out), None, *args[:3], out, lse, ids, *args[3:])
    backward = allocated(lambda: torch.ops.moba.attention_backward(*backward_args))
    assert backward == plan.backward_bytes + sum(x.nbytes for x in args[:3])


def test_cuda_tensors_without_the_cuda_library_get_the_remedy(monkeypatch):
    monkeypatch.setattr(ops, "_CUDA_MISSING", ops._BUILD_CUDA)
    with pytest.raises(ValueError, match=re.escape("MOBA_CUDA=1")):
        ops.resolve_backend("auto", "cuda", torch.bfloat16, 128)
    assert ops.resolve_backend("reference", "cuda", torch.bfloat16, 128)[0] == "reference"
