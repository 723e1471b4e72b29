"""What the kernels of the sm90 backend compute, each alone, on a Hopper GPU."""

import math

import pytest
import torch
from flash_stages import (
    CASES,
    DEVICE,
    INVALID,
    Call,
    Group,
    head_major,
    invalid_call,
    make_call,
    misaligned,
)
from numerics import Case, assert_within_budget, self_attention
from sm90_stages import SEGMENT_ROWS, Attended, Backward, stage_inputs, to_halves

from moba_ext import groups

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("flash_attention")]

DTYPES = [torch.bfloat16, torch.float16]


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


# By how much, in nats, the scores of a tile of keys are above those of the one before: four tiles,
# two, and one stay within what a maximum may be behind, 5.5 nats.
@pytest.mark.parametrize("step", [1.0, 4.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_rise_within_a_block(dtype, step, poisoned):
    scale, block_size = 0.125, 4 * groups.KEY_TILE
    call = make_call(self_attention([1100, 700], 1, 1, 128, block_size, 3))
    for group in call.groups():
        q, k, v = stage_inputs(call, dtype)
        token = torch.cat([torch.arange(n, device=DEVICE) for n in call.case.lengths_k])
        tile = token % block_size // groups.KEY_TILE
        q[..., 0], k[..., 0] = 1.0, (tile * step / scale)[:, None]
        Attended(call, group, [q, k, v], scale).check()


def backward_inputs(call: Call, dtype: torch.dtype) -> list[torch.Tensor]:
    """dout, q, k, v, lse_log2, delta: the last two as if they were of rows with more keys."""
    q, k, v = stage_inputs(call, dtype)
    lse_log2, delta = (torch.randn(q.shape[1::-1], device=DEVICE) for _ in range(2))
    return [torch.randn_like(q), q, k, v, lse_log2 + 3, delta]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", [16, 64, 100, 128, 192, 256, 300, 512])
def test_backward_block_sizes(block_size, head_dim, dtype, poisoned):
    call = make_call(self_attention([900, 0, 1, 1100], 4, 2, head_dim, block_size, 3), hot=True)
    inputs = backward_inputs(call, dtype)
    for group in call.groups():
        for rows in (1024, 64, 37):
            Backward(call, group, inputs, head_dim**-0.5, rows).check()


SMALL = [
    Case([5, 0, 200, 1, 40], [90, 7, 240, 0, 25], 8, 2, 128, 16, 6),
    Case([300, 2, 0], [700, 500, 300], 4, 2, 64, 160, 3),
    self_attention([90, 0, 31], 3, 1, 64, 1, 4),
    self_attention([300, 9], 6, 2, 128, 130, 3),
    self_attention(450, 16, 1, 64, 150, 2),
    self_attention(1300, 16, 1, 64, 600, 2),  # own rows of more than a segment
]


@pytest.mark.parametrize("case", SMALL)
def test_backward_of_groups_and_short_segments(case, poisoned):
    call = make_call(case)
    inputs = backward_inputs(call, torch.bfloat16)
    for group in call.groups():
        for rows in (7, 65):
            Backward(call, group, inputs, 0.1, rows).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", [16, 64, 100, 128, 192, 256, 300, 512])
def test_own_block_sizes(block_size, head_dim, dtype, poisoned):
    call = make_call(self_attention([900, 0, 1, 130, 1100], 6, 2, head_dim, block_size, 3))
    inputs = backward_inputs(call, dtype)
    for heads in ((0, 2), (1, 2)):
        group = Group(*heads, 0, call.tokens_q)
        Attended(call, group, inputs[1:4], head_dim**-0.5).check()
        Backward(call, group, inputs, head_dim**-0.5, 1024).check()


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (16, 1)])
@pytest.mark.parametrize("block_size", [1, 20, 128, 150])
def test_own_blocks(block_size, heads, poisoned):
    call = make_call(self_attention([70, 0, 1, 303], *heads, 64, block_size, 1))
    inputs = backward_inputs(call, torch.bfloat16)
    for group in call.groups():
        Attended(call, group, inputs[1:4], 0.1).check()
        Backward(call, group, inputs, 0.1, 64).check()


@pytest.mark.parametrize("block_size", [16, 100, 150])
def test_own_blocks_of_chunked_queries(block_size, poisoned):
    """Also more queries than keys, and none of either."""
    call = make_call(SMALL[0]._replace(block_size=block_size))
    inputs = backward_inputs(call, torch.float16)
    for group in call.groups():
        Attended(call, group, inputs[1:4], 0.1).check()
        Backward(call, group, inputs, 0.1, 200).check()


@pytest.mark.parametrize("block_size", [64, 150])
def test_layouts_give_the_same_bits(block_size, poisoned):
    call = make_call(self_attention([310, 77], 4, 2, 64, block_size, 3))
    inputs = backward_inputs(call, torch.bfloat16)
    views = [*map(head_major, inputs[:4]), *inputs[4:]]
    results = [
        (
            *Backward(call, call.groups()[0], x, 0.1, 64).results(),
            *Attended(call, call.groups()[0], x[1:4], 0.1).own,
        )
        for x in (inputs, views)
    ]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("layout", [torch.clone, head_major])
@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1000, 4, 64), (77, 3, 128), (1, 1, 64), (0, 2, 128)])
def test_row_stats_layouts(shape, dtype, with_dlse, layout, poisoned):
    out, dout = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    lse, dlse = (5 * torch.randn(shape[1::-1], device=DEVICE) for _ in range(2))
    lse[:, ::3] = -torch.inf
    got = torch.ops.moba.sm90_row_stats(layout(out), layout(dout), lse, dlse if with_dlse else None)

    def of_rows(precision: torch.dtype):
        x, y, z, dz = (x.to(precision) for x in (lse, out, dout, dlse * with_dlse))
        return (x / math.log(2)).masked_fill(x.isinf(), torch.inf), (y * z).sum(-1).T - dz

    results = zip(("lse_log2", "delta"), got, of_rows(torch.float64), of_rows(torch.float32))
    for name, x, exact, plain in results:
        assert_within_budget(x, exact, plain, name)


@pytest.mark.parametrize("layout", [torch.clone, head_major])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_merge_layouts(head_dim, dtype, layout):
    """Own parts by row, as sm90's kernels leave them, give the bits of those by token; dq in halves
    is summed in float32, in the order of the slots, the own part last."""
    call = make_call(self_attention([300, 60], 6, 2, head_dim, 16, 6))
    group = Group(0, 2, 50, 333)
    positions = call.route(group, 64)[1]
    used = int(positions.max()) + 1
    parts, own = (torch.randn(n, head_dim, device=DEVICE) for n in (positions.numel(), 360 * 6))
    part_lse, own_lse = (3 * torch.randn(n, device=DEVICE) for n in (positions.numel(), 360 * 6))
    parts[used:], part_lse[used:] = torch.nan, torch.nan
    rest = *call.sequences, 2, *group
    zeros = torch.zeros(360, 6, head_dim, dtype=dtype, device=DEVICE)

    def by_token(rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(0, (2, 360, 3)).transpose(0, 1).flatten(1, 2)

    def merge(own_out, own_lse) -> list[torch.Tensor]:
        out, dq = layout(zeros), layout(zeros)
        lse, rounded = torch.zeros(6, 360, device=DEVICE), parts[:, None].to(dtype)
        torch.ops.moba.flash_merge(positions, rounded, part_lse, own_out, own_lse, *rest, out, lse)
        torch.ops.moba.flash_merge_backward(positions, rounded, own_out, *rest, dq)
        return [out, lse, dq]

    by_row = merge(own[:, None].to(dtype), own_lse)
    wanted = merge(by_token(own).to(dtype), by_token(own_lse).T.contiguous())
    assert all(map(torch.equal, by_row, wanted))

    dq = layout(zeros)
    torch.ops.moba.flash_merge_backward(positions, to_halves(parts), to_halves(own), *rest, dq)
    at = positions.view(2, 283, 3, -1).long()
    picked = parts[at.clamp(min=0)].masked_fill(at[..., None] < 0, 0)
    total = sum(picked.unbind(3)).transpose(0, 1).flatten(1, 2) + by_token(own)[50:333]
    assert torch.equal(dq[50:333], total.to(dtype))
    assert not dq[:50].any() and not dq[333:].any(), "wrote outside of the group"


@pytest.mark.parametrize("block_size", [128, 512])
def test_repeated_runs_are_bit_equal(block_size, poisoned):
    """Also with fewer rows around each: a row's bits depend on itself and its block."""
    call = make_call(self_attention(20_000, 8, 2, 128, block_size, 8), hot=True)
    inputs, group = stage_inputs(call, torch.bfloat16), Group(0, 2, 0, 20_000)
    first = Attended(call, group, inputs, 0.1)
    for rows in [SEGMENT_ROWS] * 100 + [100, 31]:
        again = Attended(call, group, inputs, 0.1, rows)
        assert torch.equal(first.out[: first.used], again.out[: first.used])
        assert torch.equal(first.lse[: first.used], again.lse[: first.used])
        assert all(map(torch.equal, first.own, again.own))


@pytest.mark.parametrize("block_size", [128, 512])
def test_repeated_backwards_are_bit_equal(block_size, poisoned):
    """dq also with fewer rows around each."""
    call = make_call(self_attention(20_000, 8, 2, 128, block_size, 8), hot=True)
    inputs, group = backward_inputs(call, torch.bfloat16), Group(0, 2, 0, 20_000)
    first = Backward(call, group, inputs, 0.1, 1024).results()
    for _ in range(100):
        assert all(map(torch.equal, first, Backward(call, group, inputs, 0.1, 1024).results()))
    for rows in (100, 31):
        assert torch.equal(first[0], Backward(call, group, inputs, 0.1, rows).results()[0])


@pytest.mark.parametrize("block_size", [16, 150])
@pytest.mark.parametrize("values", INVALID)
def test_invalid_offsets_leave_results_alone(values, block_size, poisoned):
    call = invalid_call(values)
    call = call._replace(case=call.case._replace(block_size=block_size))
    inputs = backward_inputs(call, torch.bfloat16)
    backward = Backward(call, Group(0, 1, 0, 100), inputs, 0.1, 64)
    attended = Attended(call, Group(0, 1, 0, 100), inputs[1:4], 0.1)
    torch.cuda.synchronize()
    assert backward.used == attended.used == 0
    for x in (backward.dq, backward.own_dq, *backward.packs, *backward.grads, *attended.own):
        assert bool(x.isnan().all())


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
    arguments = Attended(call, group, [q, k, v], 0.1).arguments
    for cu_seqlens_q in wrong_offsets(call):
        with pytest.raises(RuntimeError, match="cu_seqlens_q must be a contiguous"):
            torch.ops.moba.sm90_attend(q, k, v, cu_seqlens_q, *arguments, 0.1, *group)


def wrong_offsets(call: Call) -> list[torch.Tensor]:
    right = call.sequences[0]
    return [right[:-1], right.long()]


def test_arguments_of_the_backward_are_checked_before_the_launch():
    call = make_call(self_attention(64, 2, 1, 64, 16, 3))
    dout, q, k, v, lse_log2, delta = right = backward_inputs(call, torch.bfloat16)
    narrow, in_float = (
        [f(x) for x in right[:4]] for f in (lambda x: x[..., :32], torch.Tensor.float)
    )
    stats = lse_log2, delta
    for inputs, scale, message in (
        ([*narrow, *stats], 0.1, "head_dim must be 64 or 128, got 32"),
        (right, -0.1, "softmax_scale must not be negative"),
        ([*in_float, *stats], 0.1, "q must be float16 or bfloat16"),
        ([dout.half(), q, k, v, *stats], 0.1, "dout has another dtype than q"),
        ([dout[:10], q, k, v, *stats], 0.1, "dout must be"),
        ([misaligned(dout), q, k, v, *stats], 0.1, "dout must have rows that are aligned"),
        ([dout, q, misaligned(k), v, *stats], 0.1, "k must have rows that are aligned"),
        ([dout, q, k, v, lse_log2.double(), delta], 0.1, "lse_log2 has the wrong dtype"),
        ([dout, q, k, v, lse_log2, delta[:1]], 0.1, "delta must be contiguous with"),
    ):
        with pytest.raises(RuntimeError, match=message):
            Backward(call, Group(0, 1, 0, 64), inputs, scale, 64)
    arguments = Backward(call, Group(0, 1, 0, 64), right, 0.1, 64).arguments
    for cu_seqlens_q in wrong_offsets(call):
        with pytest.raises(RuntimeError, match="cu_seqlens_q must be a contiguous"):
            torch.ops.moba.sm90_attend_backward(*right, cu_seqlens_q, *arguments, 0.1, 0, 1, 0, 64)
    for out, dlse, message in (
        (narrow[1], None, "head_dim must be 64 or 128, got 32"),
        (in_float[1], None, "out must be float16 or bfloat16"),
        (misaligned(q), None, "out must have rows that are aligned"),
        (q, delta.T.contiguous().T, "dlse must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.moba.sm90_row_stats(out, out, lse_log2, dlse)
