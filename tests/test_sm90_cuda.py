"""The sm90 backend on a Hopper GPU: what its own kernel attends, alone and within the op.

Checked as the flash backend is (test_flash_cuda.py), whose own blocks and backward it shares.
"""

import functools

import flash_checks
import pytest
import torch
from flash_checks import INPUTS, Result, assert_same_bits, hot_inputs, random_inputs, upstream
from flash_stages import CASES, DEVICE, INVALID, Call, Group, invalid_call, make_call
from numerics import Case, assert_within_budget, self_attention
from torch.profiler import ProfilerActivity, profile

from moba_ext import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("flash_attention"),
    pytest.mark.skipif(
        ops.backend_status()["sm90"] is not None,
        reason=f"the sm90 backend is not available: {ops.backend_status()['sm90']}",
    ),
]

DTYPES = [torch.bfloat16, torch.float16]
SEGMENT_ROWS = 128
check = functools.partial(flash_checks.check, backend="sm90")
run = functools.partial(flash_checks.run, backend="sm90")


class Attended:
    """The routed rows of a group, from the kernel."""

    def __init__(self, call: Call, group: Group, inputs, scale: float, rows=SEGMENT_ROWS) -> None:
        entries, _, offsets, segment_offsets, segment_lists, cu_rows, _ = call.route(group, rows)
        self.call, self.group, self.inputs, self.scale = call, group, inputs, scale
        self.used = int(offsets[-1])
        self.entries = entries[: self.used].long()
        _, cu_seqlens_k, cu_blocks = call.sequences
        self.out, self.lse = torch.ops.moba.sm90_attend(
            *(*inputs, entries, segment_offsets, segment_lists, cu_rows, cu_seqlens_k, cu_blocks),
            *(call.case.block_size, scale, *group),
        )

    def exact(self, dtype: torch.dtype):
        """out and lse of the used rows, computed in a dtype."""
        case, group, (q, k, v) = self.call.case, self.group, self.inputs
        slots, per_head = self.call.ids.shape[-1], case.heads_q // case.heads_k
        row = torch.div(self.entries, slots, rounding_mode="floor")
        queries = group.query_end - group.query_begin
        of_query = torch.div(row, per_head, rounding_mode="floor")
        head_k = group.head_begin + torch.div(of_query, queries, rounding_mode="floor")
        query, head = group.query_begin + of_query % queries, head_k * per_head + row % per_head
        block = self.call.ids.to(DEVICE)[query, head, self.entries % slots].long()
        cu_q, cu_k = (x.long() for x in self.call.sequences[:2])
        first = cu_k[torch.searchsorted(cu_q[1:], query, right=True)] + block * case.block_size
        token = first[:, None] + torch.arange(case.block_size, device=DEVICE)
        keys, values = (x[token, head_k[:, None]].to(dtype) for x in (k, v))
        scores = torch.einsum("nd,nkd->nk", q[query, head].to(dtype), keys) * self.scale
        return torch.einsum("nk,nkd->nd", scores.softmax(-1), values), scores.logsumexp(-1)

    def check(self) -> None:
        out, lse = self.out[: self.used, 0], self.lse[: self.used]
        with flash_checks.ordinary_memory():
            (exact_out, exact_lse), (plain_out, plain_lse) = map(
                self.exact, (torch.float64, torch.float32)
            )
            size = flash_checks.score_size(*self.inputs[:2], self.scale)
            assert_within_budget(out, exact_out, plain_out.to(out.dtype), "out")
            assert_within_budget(lse, exact_lse, plain_lse, "lse", max(1.0, size))
            flash_checks.assert_tiles_within_budget(
                out[:, None], exact_out[:, None], plain_out.to(out.dtype)[:, None], "out"
            )


def stage_inputs(call: Call, dtype: torch.dtype) -> list[torch.Tensor]:
    case = call.case
    heads = case.heads_q, case.heads_k, case.heads_k
    tokens = call.tokens_q, call.tokens_k, call.tokens_k
    shapes = [(t, h, case.head_dim) for t, h in zip(tokens, heads)]
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", [1, 16, 64, 100, 128, 192, 300, 512])
def test_block_sizes(block_size, head_dim, dtype, poisoned):
    call = make_call(self_attention([900, 0, 1100], 4, 2, head_dim, block_size, 3), hot=True)
    for group in call.groups():
        Attended(call, group, stage_inputs(call, dtype), head_dim**-0.5).check()


@pytest.mark.parametrize("case", [c for c in CASES if c.head_dim in (64, 128) and c.topk > 1])
def test_groups_and_short_segments(case, poisoned):
    call = make_call(case)
    for group in call.groups():
        for rows in (1, 7, 64, 65, 128):
            inputs = stage_inputs(call, torch.bfloat16)
            Attended(call, group, inputs, 0.2, rows).check()


def test_repeated_runs_are_bit_equal(poisoned):
    """Also with fewer rows around each: a row's bits depend on itself and its block."""
    call = make_call(self_attention(20_000, 8, 2, 128, 128, 8), hot=True)
    inputs, group = stage_inputs(call, torch.bfloat16), Group(0, 2, 0, 20_000)
    first = Attended(call, group, inputs, 0.1)
    for rows in [SEGMENT_ROWS] * 50 + [100, 31]:
        again = Attended(call, group, inputs, 0.1, rows)
        assert torch.equal(first.out[: first.used], again.out[: first.used])
        assert torch.equal(first.lse[: first.used], again.lse[: first.used])


@pytest.mark.parametrize("values", INVALID)
def test_invalid_offsets_attend_nothing(values):
    call = invalid_call(values)
    attended = Attended(call, Group(0, 1, 0, 100), stage_inputs(call, torch.bfloat16), 0.1)
    torch.cuda.synchronize()
    assert attended.used == 0


def test_arguments_are_checked_before_the_launch():
    call = make_call(self_attention(64, 2, 1, 64, 16, 3))
    q, k, v = stage_inputs(call, torch.bfloat16)
    group = Group(0, 1, 0, 64)
    for inputs, scale, message in (
        ([x[..., :32] for x in (q, k, v)], 0.1, "head_dim must be 64 or 128, got 32"),
        ([q, k, v], -0.1, "softmax_scale must not be negative"),
        ([q.float(), k.float(), v.float()], 0.1, "q must be float16 or bfloat16"),
        ([q, k, v[:10]], 0.1, "v must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            Attended(call, group, inputs, scale)


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


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(
    ("block_size", "topk"), [(128, 8), (512, 3), (16, 12), (128, 1), (128, 99)]
)
def test_kinds_of_inputs(kind, block_size, topk):
    case = self_attention(4097, 4, 2, 128, block_size, topk)
    check(case, INPUTS[kind](case, torch.bfloat16))


@pytest.mark.parametrize("scale", [-0.07, 0.0, 1.5])
@pytest.mark.parametrize("backend", ["flash", "sm90"])
def test_scales(backend, scale):
    case = self_attention(1000, 4, 2, 64, 64, 4)
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


def test_graph_and_its_kernels():
    """A CUDA graph holds it; the profile shows our kernel, and FlashAttention's forward once."""
    case = self_attention([1500, 600], 8, 2, 128, 64, 3)
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
    kernels = [e.name for e in prof.events()]
    assert sum("attend_forward_kernel" in name for name in kernels) == 1
    assert sum("flash_fwd_kernel" in name for name in kernels) == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = step()
    values, new_douts = hot_inputs(case, torch.bfloat16), upstream(case, torch.bfloat16)
    with torch.no_grad():
        for old, new in zip((*inputs, *douts), (*values, *new_douts)):
            old.copy_(new)
    graph.replay()
    assert_same_bits(static, run(case, values, new_douts))
