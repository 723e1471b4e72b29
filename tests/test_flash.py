"""How the flash backend puts its stages together, on a CPU: tests/flash_in_pytorch.py stands in for
the CUDA stages and for FlashAttention."""

import importlib
import sys
import warnings

import flash_in_pytorch
import pytest
import torch
from numerics import (
    Case,
    assert_within_budget,
    gradients,
    recomputed_gradients,
    run_masked,
    self_attention,
)

import moba_ext
from moba_ext import flash, groups, ops, sm90, varlen

CASES = [
    self_attention(300, 4, 4, 16, 16, 4),
    self_attention([0, 1, 130, 3, 0, 64, 17, 0], 4, 2, 8, 8, 8),
    self_attention(200, 8, 1, 16, 16, 12),
    Case([5, 0, 200, 1, 40], [90, 7, 240, 0, 25], 4, 2, 16, 16, 6),
    Case([50, 9], [20, 3], 2, 1, 8, 8, 2),
    self_attention([90, 0, 31], 2, 2, 16, 16, 1),
    Case([30, 50, 1], [64, 20, 33], 4, 2, 16, 16, 4),  # topk covers every sequence
    Case([0, 0], [9, 30], 2, 1, 8, 8, 2),
    Case([9, 30], [0, 0], 2, 1, 8, 8, 2),
]
DRAWS = 3  # of the inputs: the largest error of a single one differs from processor to processor


@pytest.fixture(autouse=True)
def stages(monkeypatch):
    monkeypatch.setattr(flash, "_stages", flash_in_pytorch)
    monkeypatch.setattr(flash, "_take_turns", flash_in_pytorch.take_turns)
    monkeypatch.setattr(varlen, "forward_call", flash_in_pytorch.forward_call)
    monkeypatch.setattr(varlen, "backward_call", flash_in_pytorch.backward_call)
    for name in ("block_mean", "gate_topk"):
        stage = getattr(torch.ops.moba, name)
        monkeypatch.setattr(flash_in_pytorch, name, stage, raising=False)


def head_major(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def draw(case: Case, with_dlse: bool, layout, scale: float) -> tuple:
    """out, lse, dq, dk, dv of fresh inputs: of the backend, in float64, and of plain PyTorch."""
    inputs = [layout(x) for x in case.tensors(torch.float32)]
    sizes = (case.max_seqlen_q, case.max_seqlen_k, case.block_size, case.topk)
    cu_seqlens = case.cu_seqlens()
    out, lse, ids = flash.forward(*inputs, *cu_seqlens, *sizes, scale)
    assert out.is_contiguous() and lse.is_contiguous()
    assert torch.equal(ids, torch.ops.moba.attention(*inputs, *cu_seqlens, *sizes)[2])
    dout, dlse = torch.randn_like(out), torch.randn_like(lse) * with_dlse
    got = (
        out,
        lse,
        *flash.backward(
            *(dout, dlse if with_dlse else None, *inputs, out, lse, ids),
            *(*cu_seqlens, *sizes, scale),
        ),
    )
    plain = run_masked(case, *inputs, ids, scale)
    plain += recomputed_gradients(case, *inputs, ids, dout, dlse, scale)
    inputs = [x.double().requires_grad_() for x in inputs]
    exact = run_masked(case, *inputs, ids, scale)
    exact += gradients(*exact, inputs, dout, dlse)
    return got, [x.detach() for x in exact], plain


def check(case: Case, with_dlse: bool, layout=lambda x: x, scale: float = 0.3) -> None:
    draws = [draw(case, with_dlse, layout, scale) for _ in range(DRAWS)]
    for i, name in enumerate(("out", "lse", "dq", "dk", "dv")):
        got, exact, plain = ([x[j][i] for x in draws] for j in range(3))
        # Rounded twice in float32: a part, then their sum.
        assert_within_budget(got, exact, plain, name, least_size=1.0)


@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_one_group(case, with_dlse):
    check(case, with_dlse)


@pytest.mark.parametrize("scale", [-0.2, 0.0])
@pytest.mark.parametrize("case", CASES)
def test_scale_that_is_not_positive(case, scale):
    check(case, True, scale=scale)


@pytest.mark.parametrize(
    "layout", [head_major, lambda x: torch.cat([x, x], -1)[..., 5:][..., : x.shape[-1]]]
)
def test_layouts(layout):
    check(CASES[0], True, layout)


@pytest.mark.parametrize("workspace", [1, 200_000, 800_000, 1_500_000])
@pytest.mark.parametrize("case", CASES)
def test_groups_of_heads_and_queries(case, workspace, monkeypatch):
    monkeypatch.setattr(flash, "WORKSPACE_BYTES", workspace)
    monkeypatch.setattr(groups, "ROW_TILE", 2)  # else shorter lists would not be worth a group
    check(case, True)


@pytest.mark.parametrize("case", CASES)
def test_more_sequences_than_a_call_takes(case, monkeypatch):
    monkeypatch.setattr(varlen, "MAX_SEQUENCES", 5)
    check(case, True)


@pytest.mark.parametrize("most_heads", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.heads_q > 1 and sum(c.lengths_q) and sum(c.lengths_k)]
)
def test_accumulators_beyond_32_bit_offsets(case, most_heads, monkeypatch):
    """The own blocks' backward goes by heads, also by some of those that share a KV head."""
    split = []
    by_calls = varlen._backward_by_calls

    def count(dout, *rest):
        split.append(dout.shape[1])
        return by_calls(dout, *rest)

    monkeypatch.setattr(varlen, "_backward_by_calls", count)
    # Packed rows have one head, and are of several slots: more room than any head needs here.
    queries = sum(case.lengths_q)
    monkeypatch.setattr(varlen, "accumulator_rows", lambda rows, _: rows if rows == queries else 1)
    limit = most_heads * queries * varlen.accumulator_width(case.head_dim)
    monkeypatch.setattr(varlen, "_MAX_OFFSET", limit)
    check(case, True)
    assert max(split) <= most_heads
    monkeypatch.setattr(varlen, "_MAX_OFFSET", 1)
    with pytest.raises(RuntimeError, match="too many for the 32-bit offsets"):
        check(case, True)


def test_plan(monkeypatch):
    monkeypatch.setattr(ops, "_CUDA_MISSING", None)
    monkeypatch.setattr(varlen, "unavailable", lambda: None)
    monkeypatch.setattr(ops, "_why_not_hopper", lambda: None)
    sizes = {"heads_q": 32, "heads_k": 8, "head_dim": 128, "device": "cuda", "backend": "flash"}
    sparse = moba_ext.plan(131_072, block_size=128, topk=8, **sizes)
    assert sparse.backend == "flash" and "route" in sparse.stages
    assert sparse.groups * sparse.heads_per_group * sparse.queries_per_group >= 8 * 131_072
    assert sparse.forward_bytes < 1.1 * 1.5 * 2**30
    tensors = 2 * 131_072 * (32 + 8) * 128 * 2  # q, k, v, out
    assert sparse.backward_bytes < 1.1 * 3 / 8 * 2 * tensors
    own = moba_ext.plan(131_072, block_size=128, topk=8, **{**sizes, "backend": "auto"})
    assert own.backend == "sm90" and own.stages == sparse.stages
    assert own.backward_bytes < sparse.backward_bytes and own.forward_bytes < sparse.forward_bytes
    dense = moba_ext.plan(4096, block_size=512, topk=8, **sizes)
    assert dense.stages == ("block_mean", "gate_topk", "attend", "merge") and dense.groups == 1
    for backend in ("flash", "sm90"):
        nothing = moba_ext.plan(0, 4096, block_size=128, topk=8, **{**sizes, "backend": backend})
        assert nothing.groups == 0 and nothing.attended_pairs == 0


def check_own_heads(call: groups.Call, plan: groups.Plan, bound: float) -> None:
    """In the fewest calls that stay in the workspace and FlashAttention's offsets."""
    group, parts = call.heads_q // call.heads_k, call.tokens_k // call.block_size + 2 * call.batch

    def fits(heads: int) -> bool:
        most = varlen.most_heads(call.tokens_q, parts, call.head_dim)
        return heads * group <= most and flash._own_bytes(call, call.block_size, heads) <= bound

    assert plan.own_heads == 1 or fits(plan.own_heads)
    calls = -(-call.heads_k // plan.own_heads)
    assert calls == 1 or not fits(-(-call.heads_k // (calls - 1)))


@pytest.mark.parametrize("backend", [flash, sm90])
@pytest.mark.parametrize("workspace", [None, 2**28, 2**32])
def test_groups_stay_in_the_workspace(workspace, backend, monkeypatch):
    """At any length, but for the least that a group is; and within FlashAttention's limits."""
    hopper = backend is sm90
    least, share = (2**30, 3 / 16) if hopper else (1.5 * 2**30, 3 / 8)
    group_bytes = backend.group_bytes if hopper else flash._group_bytes
    monkeypatch.setattr(flash, "WORKSPACE_BYTES", workspace)
    for tokens in (4096, 65_536, 1 << 20):
        tensors = 2 * 128 * tokens * (32 + 8) * 2
        for block_size, topk in ((64, 16), (128, 8), (512, 3), (4096, 12)):
            call = 1, tokens, tokens, tokens, 32, 8, 128, block_size, topk
            for backward in (False, True):
                bound = workspace or max(least, share * tensors * (1 + backward))
                plan = backend.make_plan(*call, backward=backward)
                if not plan.slots:
                    continue
                assert sum(b - a for a, b in plan.query_ranges()) == tokens
                assert sum(b - a for a, b in plan.head_ranges()) == 8
                if plan.merging:
                    sizes = plan.heads_per_group, plan.queries_per_group
                    sizes = sm90.MergingSizes.of(groups.Call(*call), *sizes)
                    assert block_size <= 128 and plan.slots < 8 and hopper and not backward
                    assert max(sizes.entries, sizes.rows, sizes.segments * block_size) < 2**31
                    assert sizes.bytes(128) <= (workspace or max(least, tensors / 4))
                    continue
                entries = plan.heads_per_group * plan.queries_per_group * 4 * plan.slots
                lists = plan.heads_per_group * (tokens // block_size + 1)
                segments = lists + -(-entries // plan.segment_rows)
                assert entries < 2**31 and segments <= (2**30 if hopper else 65_535)
                held = group_bytes(entries, segments, block_size, 128, backward)
                if plan.at_once * held > bound:
                    assert plan.heads_per_group == 1 and entries < 2 * groups.ROW_TILE * lists
                if backward and not hopper:
                    check_own_heads(groups.Call(*call), plan, bound)


def test_own_blocks_go_by_some_of_the_heads(monkeypatch):
    """Where not all fit, be it into the workspace, as in test_groups_of_heads_and_queries, or into
    FlashAttention's offsets."""

    def plan(workspace, *sizes):
        monkeypatch.setattr(flash, "WORKSPACE_BYTES", workspace)
        made = flash.make_plan(*sizes, backward=True)
        check_own_heads(groups.Call(*sizes), made, workspace)
        return made

    some = plan(1_500_000, 1, 300, 300, 300, 4, 4, 16, 16, 4)
    assert some.own_heads == 2 and some.heads_per_group == 1
    long = 1, 2**19, 2**19, 2**19, 16, 16, 128, 128, 8
    assert varlen.most_heads(2**19, 2**12 + 2, 128) == 15 and plan(2**40, *long).own_heads == 8


def test_when_rows_are_merged_along(monkeypatch):
    """Where a head has enough parts, in phases of about as many, whose lists are not too short."""

    def plan(tokens, block_size=128, topk=8, heads_q=16, heads_k=16, backward=False, batch=1):
        sizes = batch, tokens, tokens, tokens, heads_q, heads_k, 128, block_size, topk
        return sm90.make_plan(*sizes, backward=backward)

    whole = plan(32_768)
    assert whole.merging and whole.queries_per_group == 32_768 and whole.heads_per_group == 16
    assert plan(32_768, heads_q=32, heads_k=8).queries_per_group == 16_384
    assert plan(131_072).queries_per_group == 65_536
    assert not plan(8192).merging
    assert not plan(32_768, block_size=256).merging and not plan(32_768, topk=9).merging
    assert not plan(32_768, backward=True).merging
    monkeypatch.setattr(flash, "WORKSPACE_BYTES", 450_000_000)
    assert plan(131_072).merging and plan(131_072).heads_per_group < 16
    monkeypatch.setattr(flash, "WORKSPACE_BYTES", 2**24)
    assert not plan(131_072).merging


def test_when_two_groups_run_at_once(monkeypatch):
    """In the backward of calls that don't fit into one group: where no head is cut for it, or where
    FlashAttention takes the keys of a block in turn."""

    def plan(workspace, block_size, topk, backward=True):
        monkeypatch.setattr(flash, "WORKSPACE_BYTES", workspace)
        sizes = 1, 32_768, 32_768, 32_768, 8, 4, 128, block_size, topk
        return flash.make_plan(*sizes, backward=backward)

    for workspace, block_size, topk in ((2**31, 128, 8), (2**30, 512, 3)):
        assert plan(2**36, block_size, topk).at_once == 1
        assert plan(workspace, block_size, topk, backward=False).at_once == 1
        two = plan(workspace, block_size, topk)
        assert two.at_once == 2 and two.heads_per_group < 4 and len(two.query_ranges()) == 1
    assert plan(2**30, 128, 8).at_once == 1
    two = plan(2**29, 512, 3)
    assert two.at_once == 2 and len(two.query_ranges()) > 1
    assert plan(2**20, 128, 8).at_once == plan(2**20, 512, 3).at_once == 1  # the least is too much


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("cuda", torch.float32, 64), TypeError, "takes bfloat16 and float16"),
        (("cuda", torch.bfloat16, 12), ValueError, "head_dim 12, and "),
        (("cpu", torch.bfloat16, 64), ValueError, "the flash backend takes CUDA tensors"),
    ],
)
def test_what_it_does_not_take(arguments, error, message, monkeypatch):
    monkeypatch.setattr(ops, "_CUDA_MISSING", None)
    monkeypatch.setattr(varlen, "unavailable", lambda: None)
    monkeypatch.setattr(ops, "_why_not_hopper", lambda: None)
    with pytest.raises(error, match=message):
        ops.resolve_backend("sm90", *arguments[:2], arguments[2])
    with pytest.raises(ValueError, match="head_dim 96, and the sm90 backend takes 64 and 128"):
        ops.resolve_backend("sm90", "cuda", torch.float16, 96)
    assert ops.resolve_backend("auto", "cuda", torch.float16, 64)[0] == "sm90"
    assert ops.resolve_backend("auto", "cuda", torch.float16, 96)[0] == "flash"
    with pytest.raises(error, match=message):
        ops.resolve_backend("flash", *arguments)
    assert ops.resolve_backend("flash", "cuda", torch.float16, 64)[0] == "flash"


def test_without_a_gpu_it_says_why():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert varlen.unavailable() == "no GPU is visible to torch"
    with pytest.raises(ValueError, match="backend is 'flash', which is not available: "):
        moba_ext.moba_attention(
            *[torch.zeros(1, 8, 1, 8)] * 3, block_size=4, topk=2, backend="flash"
        )


@pytest.mark.parametrize("results", [8, 4])
def test_both_interfaces_of_flash_attn(results, monkeypatch):
    """2.6 returns 8 values and takes window_size; 2.7 returns 4 and takes its two sides."""
    monkeypatch.undo()
    calls = []
    lse = torch.zeros(2, 5)

    def forward_2_6(*tensors, dropout_p, softmax_scale, causal, window_size=(-1, -1)):
        return tensors[0], None, None, None, None, lse, None, None

    def forward_2_7(
        *tensors, dropout_p, softmax_scale, causal, window_size_left, window_size_right
    ):
        return tensors[0], lse, None, None

    def backward_2_6(*tensors, dropout_p, softmax_scale, causal, window_size, softcap,
                     alibi_slopes, deterministic, rng_state=None):  # fmt: skip
        calls.append((len(tensors), causal, deterministic, window_size))

    def backward_2_7(*tensors, dropout_p, softmax_scale, causal, window_size_left,
                     window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
                     zero_tensors=False):  # fmt: skip
        calls.append((len(tensors), causal, deterministic, (window_size_left, window_size_right)))

    class Package:
        _flash_attn_varlen_forward = forward_2_6 if results == 8 else forward_2_7
        _flash_attn_varlen_backward = backward_2_6 if results == 8 else backward_2_7

    monkeypatch.setattr(varlen, "package", lambda: Package)
    q = torch.randn(5, 2, 8)
    cu = torch.tensor([0, 5], dtype=torch.int32)
    few, many = varlen.Sequences(cu, cu, 5, 128), varlen.Sequences(cu, cu, 5, 129)
    assert varlen.forward_call(q, q, q, few, 0.3, True) == (q, lse)
    for sequences in (few, many):
        grads = varlen.backward_call(q, q, q, q, q, lse, sequences, 0.3, True)
        assert all(x.shape == q.shape for x in grads)
    places = q, None, q.clone()
    dq, dk, dv = varlen.backward_call(q, q, q, q, q, lse, few, 0.3, True, places)
    assert dq is q and dk.shape == q.shape and dv is places[2]
    # Two tiles of keys add up to the same bits in any order, more need FlashAttention's own.
    assert calls == [(13, True, ordered, (-1, -1)) for ordered in (False, True, False)]


def installed(files: dict[str, str], folder, monkeypatch):
    """varlen.package() where these files are all that can be imported."""
    for name, text in files.items():
        file = folder / "flash_attn" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for name in [x for x in sys.modules if x.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(folder)])
    importlib.invalidate_caches()
    try:
        return varlen.package.__wrapped__()
    finally:
        for name in [x for x in sys.modules if x.split(".")[0] == "flash_attn"]:
            del sys.modules[name]


@pytest.mark.parametrize("version", ["2.6.3", "2.8.3.post1", "2.10.0"])
def test_flash_attn_is_taken_where_it_is_installed(version, tmp_path, monkeypatch):
    files = {"__init__.py": f"__version__ = '{version}'", "flash_attn_interface.py": ""}
    assert installed(files, tmp_path, monkeypatch).__name__ == "flash_attn.flash_attn_interface"


@pytest.mark.parametrize("files", [{}, {"cute/__init__.py": ""}])
def test_without_flash_attn_nothing_is_said(files, tmp_path, monkeypatch):
    """Nor with flash-attn-4 alone, which has the same name without the same functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert installed(files, tmp_path, monkeypatch) is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"__init__.py": "__version__ = '2.6.2'", "flash_attn_interface.py": ""}, "older than"),
        ({"__init__.py": "import no_such_module"}, "can't be imported"),
    ],
)
def test_flash_attn_that_is_of_no_use_is_named(files, message, tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match=f"{message}.*FlashAttention inside torch instead"):
        assert installed(files, tmp_path, monkeypatch) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(300, 3, 64), (40, 2, 256), (9, 1, 8)])
def test_dlse_becomes_a_part_of_out(shape, dtype, monkeypatch):
    """delta - dlse comes out of the sum, closer than out is rounded, and nothing is left."""
    monkeypatch.setattr(varlen, "_FOLDED", 1000)  # heads go one by one
    dout, out = (torch.randn(shape).to(dtype) for _ in range(2))
    dlse = torch.randn(shape[1::-1]) * torch.logspace(-4, 1, shape[0])
    given, rest = varlen.lse_grad(dlse, dlse.isinf(), dout, out)
    before, after = ((dout.double() * x.double()).sum(-1).T for x in (out, given))
    size = (dout.double() * out.double()).abs().sum(-1).T + dlse.abs()
    assert bool(((after - before + dlse).abs() <= torch.finfo(dtype).eps / 64 * size).all())
    assert not rest.dout.any()


def test_dlse_of_rows_that_do_not_count():
    """NaN stays in its row, a row without keys counts for nothing, and rows whose dout is too small
    for their dlse keep their out and leave dlse to a backward of its own."""
    dlse = torch.tensor([[torch.nan, 3e5, 1e-7, torch.inf, 5.0, 1e3, 0.0]])
    no_keys = torch.tensor([[False, False, False, True, False, False, False]])
    dout, out = (torch.randn(7, 1, 16).half() for _ in range(2))
    dout[[4, 6]] = 0
    dout[5] *= 1e-3
    given, rest = varlen.lse_grad(dlse, no_keys, dout, out)
    left = rest.dout.float().sum(-1)[:, 0] * rest.factor
    assert left[0].isnan() and (left[[2, 3, 6]] == 0).all()
    for row in (1, 4, 5):
        assert abs(left[row] / dlse[0, row] - 1) < 1e-2
    assert torch.equal(given[[0, 1, 4, 5, 6]], out[[0, 1, 4, 5, 6]])


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_the_deterministic_switch_is_put_back(mode):
    before = torch.get_deterministic_debug_mode()
    settings = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.set_deterministic_debug_mode(mode)
        with varlen.deterministic():
            assert torch.get_deterministic_debug_mode() == 2
            assert torch.utils.deterministic.fill_uninitialized_memory == (settings and mode > 0)
        assert torch.get_deterministic_debug_mode() == mode
        assert torch.utils.deterministic.fill_uninitialized_memory == settings
    finally:
        torch.set_deterministic_debug_mode(before)
