"""What the tests of the flash backend on a GPU share: inputs, calls, checks against float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from numerics import (
    Case,
    assert_within_budget,
    check_selection,
    gradients,
    recomputed_gradients,
    run_masked,
    self_attention,
)
from torch import Tensor

from moba_ext import flash, reference

DEVICE = "cuda"
NAMES = ("out", "lse", "dq", "dk", "dv")


class Result(NamedTuple):
    out: Tensor
    lse: Tensor
    ids: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor

    def numbers(self) -> tuple[Tensor, ...]:
        return self.out, self.lse, self.dq, self.dk, self.dv


def random_inputs(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v ~ N(0, 1)."""
    shapes = (
        (sum(case.lengths_q), case.heads_q, case.head_dim),
        *[(sum(case.lengths_k), case.heads_k, case.head_dim)] * 2,
    )
    return [torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes]


def hot_inputs(case: Case, dtype: torch.dtype, blocks: tuple[int, ...] = (0,)) -> list[Tensor]:
    """Random, with 8 * w added to every query and to every key of some blocks of every sequence, w
    a unit vector per KV head: nearly every query picks these blocks."""
    q, k, v = random_inputs(case, torch.float32)
    w = torch.nn.functional.normalize(torch.randn(case.heads_k, case.head_dim), dim=-1).to(DEVICE)
    q += 8 * w.repeat_interleave(case.heads_q // case.heads_k, 0)
    begin = 0
    for length in case.lengths_k:
        for block in blocks:
            first, last = (min(x * case.block_size, length) for x in (block, block + 1))
            k[begin + first : begin + last] += 8 * w
        begin += length
    return [x.to(dtype) for x in (q, k, v)]


def correlated_inputs(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Keys of a block share one of 64 topics, queries hold a topic for 256 tokens on average."""
    topics = torch.nn.functional.normalize(torch.randn(64, case.heads_k, case.head_dim), dim=-1).to(
        DEVICE
    )
    q, k, v = random_inputs(case, torch.float32)
    of_keys = torch.cat(
        [
            torch.randint(64, (length // case.block_size + 1,)).repeat_interleave(case.block_size)[
                :length
            ]
            for length in case.lengths_k
        ]
    )
    changes = torch.rand(q.shape[0]) < 1 / 256
    of_queries = torch.randint(64, (q.shape[0] + 1,))[changes.cumsum(0)]
    k = 0.5 * k + 4 * topics[of_keys.to(DEVICE)]
    group = case.heads_q // case.heads_k
    q = 0.5 * q + 4 * topics[of_queries.to(DEVICE)].repeat_interleave(group, 1)
    return [x.to(dtype) for x in (q, k, v)]


INPUTS = {"random": random_inputs, "correlated": correlated_inputs, "hot": hot_inputs}


def upstream(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random dout and dlse."""
    tokens = sum(case.lengths_q)
    return (
        torch.randn(tokens, case.heads_q, case.head_dim, dtype=dtype, device=DEVICE),
        torch.randn(case.heads_q, tokens, device=DEVICE),
    )


def run(
    case: Case,
    inputs: list[Tensor],
    douts: tuple[Tensor, Tensor | None],
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
    softmax_scale: float | None = None,
    backend: str = "flash",
) -> Result:
    """The op forward and backward; a dlse of None leaves the lse without a gradient."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, lse, ids = torch.ops.moba.attention(
        *(*inputs, *(cu_seqlens or case.cu_seqlens(inputs[0].device))),
        *(case.max_seqlen_q, case.max_seqlen_k, case.block_size, case.topk),
        softmax_scale=softmax_scale,
        backend=backend,
    )
    outputs, douts = zip(*((x, dx) for x, dx in zip((out, lse), douts) if dx is not None))
    grads = torch.autograd.grad(outputs, inputs, douts)
    return Result(out.detach(), lse.detach(), ids, *grads)


def assert_same_bits(a: Result, b: Result, names: tuple[str, ...] = Result._fields) -> None:
    for name in names:
        x, y = getattr(a, name), getattr(b, name)
        assert torch.equal(x, y), f"{name}: {int((x != y).sum())} of {x.numel()} values differ"


def two_at_once(case: Case) -> int:
    """A workspace of which the backward gives halves to two groups of heads, on two streams."""
    sizes = len(case.lengths_q), sum(case.lengths_q), sum(case.lengths_k), case.max_seqlen_k
    sizes += case.heads_q, case.heads_k, case.head_dim, case.block_size, case.topk
    with pytest.MonkeyPatch.context() as patch:
        for workspace in (int(2**34 * 0.9**i) for i in range(150)):
            patch.setattr(flash, "WORKSPACE_BYTES", workspace)
            if flash.make_plan(*sizes, backward=True).at_once == 2:
                return workspace
    raise AssertionError(f"{case} never runs two groups at once")


@contextlib.contextmanager
def ordinary_memory() -> Iterator[None]:
    """Suspends the fixture ``poisoned``, whose switch also forbids cuBLAS to the yardsticks."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def score_size(q: Tensor, k: Tensor, scale: float) -> float:
    """No smaller than the sum of |products| of any score, by Cauchy and Schwarz.

    The rounding of a score, and so of an lse, is relative to it: a lone key's lse may be near 0.
    """
    if not q.numel() or not k.numel():
        return 1.0
    return scale * float(q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max())


_TILE = 16


def _tile_norms(x: Tensor) -> Tensor:
    """Root of the sum of squares of 16 rows at a time, of every head apart."""
    squares = x.double().square().sum(-1).view(x.shape[0], -1)
    padded = torch.nn.functional.pad(squares, (0, 0, 0, -x.shape[0] % _TILE))
    return padded.unflatten(0, (-1, _TILE)).sum(1).sqrt()


def assert_tiles_within_budget(got: Tensor, exact: Tensor, plain: Tensor, what: str) -> None:
    """The error budget of numerics.py in the L2 norm of every 16 rows of a head.

    The largest element alone says little about most of them: out is largest in the first rows,
    which see few keys, and dk and dv in the keys of a hot block.
    """
    if not exact.numel():
        return
    error, plain_error = (_tile_norms(x.double() - exact) for x in (got, plain))
    budget = 2 * (plain_error + torch.finfo(got.dtype).eps * _tile_norms(exact))
    worst = (error - budget).argmax()
    error, budget = float(error.flatten()[worst]), float(budget.flatten()[worst])
    assert error <= budget, f"{what}: error of a tile {error:.3e} is above the budget {budget:.3e}"


def _assert_numbers(got, exact, plain, q: Tensor, k: Tensor, scale: float) -> None:
    """Each is out, lse, dq, dk, dv, all of them tensors or lists of tensors."""
    for name, *results in zip(NAMES, got, exact, plain):
        results = [x if isinstance(x, list) else [x] for x in results]
        size = max(1.0, score_size(q, k, scale)) if name == "lse" else 0.0
        assert_within_budget(*results, name, size)
        for parts in zip(*results) if name != "lse" else ():
            assert_tiles_within_budget(*parts, name)


def exact_and_plain(
    case: Case,
    inputs: list[Tensor],
    ids: Tensor,
    douts: tuple[Tensor, Tensor | None],
    scale: float,
    saved_out: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """out, lse, dq, dk, dv in float64, and as plain PyTorch in the dtype has them, the gradients
    by way of saved_out (recomputed_gradients). Materialises every score."""
    dout, dlse = douts
    if dlse is None:
        dlse = torch.zeros(case.heads_q, dout.shape[0], device=dout.device)
    plain = run_masked(case, *inputs, ids, scale)
    plain += recomputed_gradients(
        case, *inputs, ids, dout, dlse, scale, round_weights=True, saved_out=saved_out
    )
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = run_masked(case, *inputs, ids, scale)
    exact += gradients(*exact, inputs, dout, dlse)
    return tuple(x.detach() for x in exact), plain


def check(
    case: Case,
    inputs: list[Tensor],
    douts: tuple[Tensor, Tensor | None] | None = None,
    softmax_scale: float | None = None,
    backend: str = "flash",
) -> Result:
    """out, lse and gradients against float64 on the op's own selection, and that by score."""
    q, k, _ = inputs
    douts = upstream(case, q.dtype) if douts is None else douts
    got = run(case, inputs, douts, softmax_scale=softmax_scale, backend=backend)
    assert got.out.dtype == q.dtype and got.lse.dtype == torch.float32
    kbar = torch.ops.moba.block_mean(k, case.cu_seqlens(q.device)[1], case.block_size)
    scale = case.head_dim**-0.5 if softmax_scale is None else softmax_scale
    with ordinary_memory():
        check_selection(case, q, kbar, got.ids)
        exact, plain = exact_and_plain(case, inputs, got.ids, douts, scale, got.out)
        _assert_numbers(got.numbers(), exact, plain, q, k, scale)
    return got


def check_second_device(topk: int, backend: str) -> None:
    """Tensors of one device while another is current."""
    case = self_attention([700, 33], 4, 2, 128, 64, topk)
    inputs, douts = random_inputs(case, torch.bfloat16), upstream(case, torch.bfloat16)
    here = run(case, inputs, douts, backend=backend)
    moved = ([x.to("cuda:1") for x in xs] for xs in (inputs, douts))
    there = run(case, *moved, backend=backend)
    assert all(x.device == torch.device("cuda:1") for x in there)
    assert torch.cuda.current_device() == 0
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert_same_bits(Result(*(x.to("cuda:0") for x in there)), here)
    else:
        with torch.cuda.device(1):
            check(
                case,
                [x.to("cuda:1") for x in inputs],
                tuple(x.to("cuda:1") for x in douts),
                backend=backend,
            )


class _Problem(NamedTuple):
    """A call and its selection, for exact values of some rows only."""

    case: Case
    inputs: list[Tensor]
    ids: Tensor
    saved_out: Tensor
    douts: tuple[Tensor, Tensor]
    scale: float
    starts_k: Tensor  # [batch + 1]
    sequence: Tensor  # [Tq]
    position: Tensor  # [Tq]


def rows_of(problem: _Problem, queries: Tensor, heads: Tensor, dtype: torch.dtype):
    """out, lse, dq of rows ``(queries[i], heads[i])``, computed in float64 or float32.

    In float32 as recomputed_gradients: delta is taken from the saved out, and P and dS are rounded
    to the dtype of q; the results are not.
    """
    case, (q, k, v), (dout, dlse) = problem.case, problem.inputs, problem.douts
    group, size = case.heads_q // case.heads_k, case.block_size
    attended = min((case.topk) * size, case.max_seqlen_k)
    chunks = []
    for at in torch.arange(len(queries), device=q.device).split(
        max(2**27 // (attended * case.head_dim), 1)
    ):
        query, head = queries[at], heads[at]
        position = problem.position[query]
        own = torch.div(position, size, rounding_mode="floor")
        blocks = torch.cat([problem.ids[query, head].long(), own[:, None]], 1)
        token = blocks[..., None] * size + torch.arange(size, device=q.device)
        seen = ((blocks >= 0)[..., None] & (token <= position[:, None, None])).flatten(1)
        token = problem.starts_k[problem.sequence[query], None] + token.flatten(1)
        token = token.masked_fill(~seen, 0)
        keys, values = (x[token, head[:, None] // group].to(dtype) for x in (k, v))
        query_row, dout_row = (x[query, head].to(dtype) for x in (q, dout))
        scores = torch.einsum("nd,nkd->nk", query_row, keys) * problem.scale
        lse = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
        blind = lse.isneginf()
        p = (scores - lse.masked_fill(blind, 0)[:, None]).exp().masked_fill(~seen, 0)
        out = torch.einsum("nk,nkd->nd", p, values)
        saved = out if dtype == torch.float64 else problem.saved_out[query, head].to(dtype)
        delta = (dout_row * saved).sum(-1) - dlse[head, query].to(dtype).masked_fill(blind, 0)
        ds = p * (torch.einsum("nd,nkd->nk", dout_row, values) - delta[:, None])
        if dtype == torch.float32:
            ds = ds.to(q.dtype).float()
        chunks.append((out, lse, delta, torch.einsum("nk,nkd->nd", ds, keys) * problem.scale))
    out, lse, delta, dq = (torch.cat(x) for x in zip(*chunks))
    return out, lse, delta, dq


def keys_of(problem: _Problem, sequence: int, block: int, head: int, dtype: torch.dtype):
    """dk, dv ``[keys of the block, D]`` of one KV head; as :func:`rows_of`."""
    case, (q, k, v), (dout, _) = problem.case, problem.inputs, problem.douts
    group, size = case.heads_q // case.heads_k, case.block_size
    mine = problem.sequence == sequence
    own = mine & (torch.div(problem.position, size, rounding_mode="floor") == block)
    heads = torch.arange(head * group, (head + 1) * group, device=q.device)
    chosen = (problem.ids[:, heads] == block).any(-1) & mine[:, None]
    query, member = (chosen | own[:, None]).nonzero().unbind(1)
    rows = query, heads[member]
    _, lse, delta, _ = rows_of(problem, *rows, dtype)
    first = block * size
    last = min(first + size, case.lengths_k[sequence])
    begin = int(problem.starts_k[sequence])
    keys, values = (x[begin + first : begin + last, head].to(dtype) for x in (k, v))
    results = []
    for at in torch.arange(len(query), device=q.device).split(2**15):
        query_rows, dout_rows = (x[rows[0][at], rows[1][at]].to(dtype) for x in (q, dout))
        index = torch.arange(first, last, device=q.device)
        seen = index <= problem.position[rows[0][at], None]
        p = (query_rows @ keys.T * problem.scale - lse[at, None]).exp().masked_fill(~seen, 0)
        ds = p * (dout_rows @ values.T - delta[at, None])
        if dtype == torch.float32:
            p, ds = (x.to(q.dtype).float() for x in (p, ds))
        results.append((ds.T @ query_rows * problem.scale, p.T @ dout_rows))
    none = keys.new_zeros(keys.shape)
    return tuple(sum(x, none) for x in zip(*results)) if results else (none, none)


def check_samples(
    case: Case,
    inputs: list[Tensor],
    blocks: list[tuple[int, int]],
    douts: tuple[Tensor, Tensor] | None = None,
    samples: int = 256,
    backend: str = "flash",
) -> Result:
    """Like :func:`check` where the scores are too many: some rows of every query head, and the keys
    of some blocks, given as (sequence, block), of the first and the last KV head.

    And of all keys the sum of dv, which is that of all dout, as the weights of a query add up to 1.
    """
    q, k, v = inputs
    douts = upstream(case, q.dtype) if douts is None else douts
    got = run(case, inputs, douts, backend=backend)
    cu_q, cu_k = case.cu_seqlens(q.device)
    sequence, position = reference.query_positions(cu_q, cu_k)
    scale = case.head_dim**-0.5
    problem = _Problem(
        case, inputs, got.ids, got.out, douts, scale, cu_k.long(), sequence, position
    )
    with ordinary_memory():
        queries = torch.randint(q.shape[0], (samples,), device=q.device)
        queries[:2] = torch.tensor([0, q.shape[0] - 1])
        heads = torch.arange(case.heads_q, device=q.device).repeat(samples)
        queries = queries.repeat_interleave(case.heads_q)
        kbar = torch.ops.moba.block_mean(k, cu_k, case.block_size)
        _check_sampled_selection(problem, kbar, queries, heads)
        places = [(b, j, h) for b, j in blocks for h in sorted({0, case.heads_k - 1})]
        exact, plain = (
            _sampled(problem, queries, heads, places, dtype)
            for dtype in (torch.float64, torch.float32)
        )
        mine = [got.out[queries, heads], got.lse[heads, queries], got.dq[queries, heads]]
        for x in (got.dk, got.dv):
            parts = []
            for b, j, h in places:
                begin = int(cu_k[b]) + j * case.block_size
                parts.append(x[begin : min(begin + case.block_size, int(cu_k[b + 1])), h])
            mine.append(parts)
        _assert_numbers(mine, exact, plain, q, k, scale)
        _check_sum_of_dv(problem, got)
    return got


def _sampled(problem: _Problem, queries, heads, places, dtype) -> tuple:
    """out, lse, dq of the rows, and lists of dk and dv by place; of float32 as the op rounds it."""
    to = torch.float64 if dtype == torch.float64 else problem.inputs[0].dtype
    out, lse, _, dq = rows_of(problem, queries, heads, dtype)
    keys = [[x.to(to) for x in keys_of(problem, *place, dtype)] for place in places]
    return out.to(to), lse, dq.to(to), *(list(x) for x in zip(*keys))


def _check_sampled_selection(problem: _Problem, kbar: Tensor, queries, heads) -> None:
    """As check_selection: chosen blocks score within rounding of the best."""
    case, q = problem.case, problem.inputs[0]
    slots = problem.ids.shape[-1]
    if slots == 0:
        return
    table = reference.block_offsets(
        torch.tensor([0, *case.lengths_k]).cumsum(0), case.block_size
    ).to(q.device)
    most = int(table.diff().max())
    sequence, position = problem.sequence[queries], problem.position[queries]
    past = torch.div(position, case.block_size, rounding_mode="floor").clamp(min=0)
    ids = problem.ids[queries, heads].long()
    assert torch.equal((ids >= 0).sum(-1), past.clamp(max=slots)), "wrong number of blocks"
    pairs = ids[:, :-1], ids[:, 1:]
    assert bool(((pairs[0] < pairs[1]) | (pairs[1] == -1)).all()), "ids don't ascend"
    assert bool((ids < past[:, None]).all()), "not a past block"
    group, block = case.heads_q // case.heads_k, torch.arange(most, device=q.device)
    tolerance = 2 * case.head_dim * torch.finfo(torch.float32).eps
    for at in torch.arange(len(queries), device=q.device).split(
        max(2**26 // (most * case.head_dim), 1)
    ):
        row = (table[sequence[at], None] + block).clamp(max=len(kbar) - 1)
        means = kbar[row, heads[at, None] // group].double()
        mine = q[queries[at], heads[at]].double()
        scores = torch.einsum("nd,nbd->nb", mine, means)
        size = torch.einsum("nd,nbd->nb", mine.abs(), means.abs())
        allowed = block < past[at, None]
        best = scores.masked_fill(~allowed, -torch.inf).topk(min(slots, most)).values
        chosen = scores.gather(1, ids[at].clamp(min=0)).masked_fill(ids[at] < 0, -torch.inf)
        chosen = chosen.sort(-1, descending=True).values[:, : best.shape[1]]
        size = size.masked_fill(~allowed, 0).amax(-1, keepdim=True)
        assert bool(((chosen >= best - tolerance * size) | best.isneginf()).all()), (
            "a better block was left out"
        )


def _check_sum_of_dv(problem: _Problem, got: Result) -> None:
    """Roundings are independent, so their sum is like the root of the sum of their squares. A
    handful of rows that went to the wrong sequence, or nowhere, is above it."""
    case, (dout, _) = problem.case, problem.douts
    group = case.heads_q // case.heads_k
    sees = problem.position >= 0
    for head in range(case.heads_k):
        dv = got.dv[:, head].double()
        error = dv.sum(0)
        for h in range(head * group, (head + 1) * group):
            error -= (dout[:, h].double() * sees[:, None]).sum(0)
        bound = 8 * torch.finfo(dout.dtype).eps * dv.norm(dim=0).max()
        assert float(error.abs().max()) <= float(bound), (
            f"dv of KV head {head} adds up to {float(error.abs().max()):.3g} more or less than "
            f"dout, above {float(bound):.3g}"
        )
