"""End to end on the compiled CPU backend: ragged batches, layouts, groups of work, determinism."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    Case,
    assert_within_budget,
    check_against_reference,
    gradients,
    run_masked,
    run_op,
    self_attention,
)

import moba_ext
from moba_ext import _C

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 3 * 32 + 7])
def test_lengths_around_the_block_size(dtype, length, poisoned):
    check_against_reference(self_attention(length, 4, 2, 64, 32, 2), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 2), (8, 1), (16, 1)])
def test_query_groups(dtype, heads, poisoned):
    check_against_reference(self_attention([200, 9], *heads, 32, 24, 4), dtype)


@pytest.mark.parametrize("topk", [1, 2, 3, 9, 12, 13, 1000])
def test_topk_from_own_block_to_all(topk, poisoned):
    check_against_reference(self_attention(200, 2, 1, 16, 16, topk), torch.float32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 80)), min_size=1, max_size=4),
    st.integers(1, 40),
    st.integers(1, 8),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.sampled_from([8, 24, 64]),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.integers(0, 2**31),
)
def test_ragged_batches(lengths, block_size, topk, heads, head_dim, dtype, seed):
    torch.manual_seed(seed)
    lengths_q, lengths_k = map(list, zip(*lengths))
    check_against_reference(Case(lengths_q, lengths_k, *heads, head_dim, block_size, topk), dtype)


def packed_rows(case, out, lse, ids, sequence):
    begin = sum(case.lengths_q[:sequence])
    rows = slice(begin, begin + case.lengths_q[sequence])
    return out[rows], lse[:, rows], ids[rows]


def test_packed_equals_each_sequence_alone():
    case = self_attention([70, 0, 133, 1, 64], 4, 2, 32, 16, 3)
    q, k, v = case.tensors(torch.float32)
    packed = run_op(case, q, k, v)
    begin = 0
    for i, length in enumerate(case.lengths_q):
        alone = self_attention(length, 4, 2, 32, 16, 3)
        if length:
            result = run_op(alone, *(x[begin : begin + length] for x in (q, k, v)))
            out, lse, ids = packed_rows(case, *packed, i)
            slots = result[2].shape[-1]
            assert torch.equal(ids[..., :slots], result[2]) and bool((ids[..., slots:] == -1).all())
            if slots == 2:  # else topk covers the lone sequence, which then is summed as one block
                assert torch.equal(out, result[0]) and torch.equal(lse, result[1])
            else:
                assert torch.allclose(out, result[0], atol=1e-6)
        begin += length


@pytest.mark.parametrize("chunk", [1, 7, 16, 50])
def test_chunked_prefill_equals_one_shot(chunk):
    case = self_attention(200, 4, 2, 32, 16, 3)
    q, k, v = case.tensors(torch.float32)
    out, lse, ids = run_op(case, q, k, v)
    for end in range(chunk, 201, chunk):
        part = case._replace(lengths_q=[chunk], lengths_k=[end])
        out_part, lse_part, ids_part = run_op(part, q[end - chunk : end], k[:end], v[:end])
        slots = ids_part.shape[-1]
        rows = slice(end - chunk, end)
        assert torch.equal(ids[rows][..., :slots], ids_part) and bool(
            (ids[rows][..., slots:] == -1).all()
        )
        if slots == 2 and end > 48:
            assert torch.equal(out[rows], out_part) and torch.equal(lse[:, rows], lse_part)
        else:
            assert torch.allclose(out[rows], out_part, atol=1e-6)


def test_nan_in_a_neighbouring_sequence_stays_there():
    case = self_attention([50, 45, 30], 2, 1, 16, 16, 2)
    tensors = case.tensors(torch.float32)
    clean = run_op(case, *tensors)
    for x in tensors:
        x[50:95] = torch.nan
    inputs = [x.requires_grad_() for x in tensors]
    out, lse, _ = run_op(case, *inputs)
    rest = torch.cat([torch.arange(50), torch.arange(95, 125)])
    assert torch.equal(out[rest], clean[0][rest]) and torch.equal(lse[:, rest], clean[1][:, rest])
    assert out[50:95].isnan().all()
    for grad in torch.autograd.grad(out[rest].sum(), inputs):
        assert grad[rest].isfinite().all()


def test_strided_inputs_give_the_same_bits_without_copies():
    case = self_attention([90, 60], 4, 4, 32, 16, 3)
    fused = torch.randn(150, 3, 4, 40)
    q, k, v = fused[..., :32].unbind(1)
    assert not q.is_contiguous()
    from_views, from_copies = (
        run_op(case, q, k, v),
        run_op(case, *(x.contiguous() for x in (q, k, v))),
    )
    assert all(torch.equal(a, b) for a, b in zip(from_views, from_copies))
    heads_first = torch.randn(1, 4, 150, 32).transpose(
        1, 2
    )  # [B, S, H, D] as Transformers passes it
    out = moba_ext.moba_attention(heads_first, heads_first, heads_first, block_size=16, topk=3)
    copied = heads_first.contiguous()
    assert torch.equal(out, moba_ext.moba_attention(copied, copied, copied, block_size=16, topk=3))


def test_batched_equals_packed():
    q, k, v = torch.randn(3, 70, 4, 16), torch.randn(3, 90, 2, 16), torch.randn(3, 90, 2, 16)
    out, lse = moba_ext.moba_attention(q, k, v, block_size=16, topk=3, return_lse=True)
    assert out.shape == (3, 70, 4, 16) and lse.shape == (3, 4, 70)
    for b in range(3):
        case = Case([70], [90], 4, 2, 16, 16, 3)
        alone = run_op(case, q[b], k[b], v[b])
        assert torch.equal(out[b], alone[0]) and torch.equal(lse[b], alone[1])


def call_with_gradients(case, dtype, seed=0):
    torch.manual_seed(seed)
    inputs = case.tensors(dtype, requires_grad=True)
    out, lse, ids = run_op(case, *inputs)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    return (out, lse, ids, *gradients(out, lse, inputs, dout, dlse))


def hot_block(case, dtype, seed=0):
    """Every query chooses block 0, which is then read in several segments of rows."""
    torch.manual_seed(seed)
    q, k, v = case.tensors(dtype)
    direction = torch.nn.functional.normalize(torch.randn(case.head_dim), dim=0).to(dtype)
    q, k[: case.block_size] = q + 8 * direction, k[: case.block_size] + 8 * direction
    return [x.detach().requires_grad_() for x in (q, k, v)]


def test_results_do_not_depend_on_threads_or_run(poisoned):
    case = self_attention([2600, 300], 2, 1, 16, 32, 3)
    before = torch.get_num_threads()
    inputs = hot_block(case, torch.float32)
    runs = []
    try:
        for threads in (1, 2, 2, 3, 5):
            torch.set_num_threads(threads)
            out, lse, ids = run_op(case, *inputs)
            torch.manual_seed(1)
            grads = gradients(out, lse, inputs, torch.randn_like(out), torch.randn_like(lse))
            runs.append((out, lse, ids, *grads))
    finally:
        torch.set_num_threads(before)
    assert bool((runs[0][2][32:2600, :, 0] == 0).float().mean() > 0.9), "block 0 should be hot"
    for run in runs[1:]:
        for a, b in zip(runs[0], run):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_groups_of_work(dtype, poisoned):
    """Partials above the workspace bound: several sets of heads, then several query ranges."""
    case = self_attention(3000, 2, 2, 256, 8, 25)
    plan = moba_ext.plan(3000, heads_q=2, head_dim=256, block_size=8, topk=25, dtype=dtype)
    assert plan.groups > 2 and plan.queries_per_group < 3000 and plan.heads_per_group == 1
    inputs = case.tensors(dtype, requires_grad=True)
    out, lse, ids = run_op(case, *inputs)
    dout = torch.randn_like(out)
    got = (out, lse, *torch.autograd.grad(out, inputs, dout))
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = run_masked(case, *exact_inputs, ids)
    exact += torch.autograd.grad(exact[0], exact_inputs, dout.double())
    # Twice the rounding of the output dtype, plus fp32 accumulation over the rows of a hot block.
    eps = torch.finfo(dtype).eps
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, exact):
        error = (a.double() - b).norm() / b.norm()
        assert error < 2 * eps + 2e-6, f"{name}: relative error {error:.2e}"


def test_offsets_past_int32():
    """Keys whose last rows lie beyond 2^31 elements: a view with a huge stride, little memory."""
    tokens, stride = 300, 2**31 // 299 + 8
    storage = torch.empty(tokens * stride, dtype=torch.float16)  # 4 GiB of untouched pages
    k = storage.as_strided((tokens, 1, 16), (stride, 16, 1))
    values = torch.randn(tokens, 1, 16).half()
    k.copy_(values)
    case = self_attention(tokens, 1, 1, 16, 32, 3)
    q, _, v = case.tensors(torch.float16)
    far, near = run_op(case, q, k, v), run_op(case, q, values, v)
    assert all(torch.equal(a, b) for a, b in zip(far, near))


def test_reference_backend_and_auto_agree():
    q, k, v = torch.randn(1, 300, 2, 32), torch.randn(1, 300, 1, 32), torch.randn(1, 300, 1, 32)
    compiled = moba_ext.moba_attention(q, k, v, block_size=32, topk=3, backend="cpu")
    assert torch.equal(compiled, moba_ext.moba_attention(q, k, v, block_size=32, topk=3))
    exact = moba_ext.moba_attention(
        *(x.double() for x in (q, k, v)), block_size=32, topk=3, backend="reference"
    )
    plain = moba_ext.moba_attention(q, k, v, block_size=32, topk=3, backend="reference")
    assert_within_budget(compiled, exact, plain)


_LEVELS = _C.build_info()["cpu_isas"]  # narrow to wide


@pytest.mark.parametrize("isa", _LEVELS[: _LEVELS.index(_C.cpu_isa())])
def test_narrower_instruction_set_levels(isa):
    """The same kernels compiled for older processors, in a process of their own."""
    here = Path(__file__).parent
    files = [
        "test_block_mean.py",
        "test_route.py",
        "test_merge.py",
        "test_attend.py::test_head_dims",
    ]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            *(str(here / f) for f in files),
        ],
        env={**os.environ, "MOBA_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]


def test_unknown_instruction_set_level_is_an_error():
    code = (
        "import torch, moba_ext; x = torch.randn(1, 8, 1, 8); "
        "moba_ext.moba_attention(x, x, x, block_size=4, topk=1)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MOBA_CPU_ISA": "mmx"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and "MOBA_CPU_ISA is mmx, allowed:" in result.stderr


@pytest.mark.parametrize(
    ("bound", "block_size", "topk"), [(2**40, 8, 3), (2**62, 2**62, 1), (2**31, 2**63 - 1, 9)]
)
def test_a_bound_far_above_the_longest_sequence_costs_nothing(bound, block_size, topk):
    case = self_attention([60, 4], 2, 1, 16, 8, 3)
    inputs = case.tensors(torch.float32, requires_grad=True)
    results = []
    for longest in (bound, 60):
        out, lse, _ = torch.ops.moba.attention(
            *(*inputs, *case.cu_seqlens(), 60, longest, block_size, topk)
        )
        results.append((out, lse, *torch.autograd.grad(out.sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_infinite_keys_and_scores():
    """A row whose scores are all -inf has seen nothing: output 0, lse -inf, no gradient."""
    q, k, v = (
        torch.ones(1, 20, 1, 8),
        torch.full((1, 20, 1, 8), -torch.inf),
        torch.ones(1, 20, 1, 8),
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = moba_ext.moba_attention(*inputs, block_size=8, topk=2, return_lse=True)
    assert bool((out == 0).all()) and bool(lse.isneginf().all())
    _, dk, dv = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert bool((dk == 0).all()) and bool((dv == 0).all())
