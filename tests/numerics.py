"""Inputs and the error budget that all tests of numbers share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moba_ext import reference


def max_error(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact).abs().max().item() if exact.numel() else 0.0


def assert_within_budget(
    got: Tensor | list[Tensor],
    exact: Tensor | list[Tensor],
    plain: Tensor | list[Tensor],
    what: str = "output",
    least_size: float = 0.0,
) -> None:
    """err(got) <= 2 * (err(plain) + eps * max|exact|): at most twice plain PyTorch's in that dtype.

    exact: float64. plain: PyTorch's result in the dtype of ``got``. Infinities must stand in the
    same places. max|exact| counts as least_size where it is less: 1 for a logarithm, whose error is
    a relative one of what it is the logarithm of. Lists are several draws of one experiment, whose
    largest errors are compared: the largest error of one small tensor is too much a matter of luck.
    """
    if isinstance(got, Tensor):
        got, exact, plain = [got], [exact], [plain]
    error, plain_error, size = 0.0, 0.0, least_size
    for x, y, z in zip(got, exact, plain):
        assert x.shape == y.shape, f"{what}: shape {tuple(x.shape)}, expected {tuple(y.shape)}"
        infinite = y.isinf()
        assert torch.equal(x[infinite].double(), y[infinite]), f"{what}: infinities differ"
        x, y, z = (t[~infinite] for t in (x, y, z))
        assert x.isfinite().all(), f"{what}: {int((~x.isfinite()).sum())} values are not finite"
        error = max(error, max_error(x, y))
        plain_error = max(plain_error, max_error(z, y))
        size = max(size, max_error(torch.zeros_like(y), y))
    budget = 2 * (plain_error + torch.finfo(got[0].dtype).eps * size)
    assert error <= budget, f"{what}: error {error:.3e} is above the budget {budget:.3e}"


class Case(NamedTuple):
    """A packed batch: lengths of its sequences, and the sizes of the call."""

    lengths_q: list[int]
    lengths_k: list[int]
    heads_q: int
    heads_k: int
    head_dim: int
    block_size: int
    topk: int

    @property
    def max_seqlen_q(self) -> int:
        return max(self.lengths_q)

    @property
    def max_seqlen_k(self) -> int:
        return max(self.lengths_k)

    def cu_seqlens(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        return tuple(
            torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
            for lengths in (self.lengths_q, self.lengths_k)
        )

    def tensors(self, dtype: torch.dtype, requires_grad: bool = False) -> list[Tensor]:
        """Random q, k, v; fresh ones on every call."""
        shapes = (
            (sum(self.lengths_q), self.heads_q, self.head_dim),
            *[(sum(self.lengths_k), self.heads_k, self.head_dim)] * 2,
        )
        return [torch.randn(shape).to(dtype).requires_grad_(requires_grad) for shape in shapes]


def self_attention(
    length: int | list[int], heads_q: int, heads_k: int, head_dim: int, block_size: int, topk: int
) -> Case:
    lengths = length if isinstance(length, list) else [length]
    return Case(lengths, lengths, heads_q, heads_k, head_dim, block_size, topk)


def run_op(case: Case, q: Tensor, k: Tensor, v: Tensor, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, block_ids of the compiled op."""
    return torch.ops.moba.attention(
        *(
            q,
            k,
            v,
            *case.cu_seqlens(q.device),
            case.max_seqlen_q,
            case.max_seqlen_k,
            case.block_size,
            case.topk,
        ),
        **kwargs,
    )


def run_masked(
    case: Case, q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """out and lse of dense attention under the mask of a selection, in plain PyTorch."""
    cu_seqlens = case.cu_seqlens(q.device)
    mask = reference.block_mask(block_ids, *cu_seqlens, case.block_size)
    scale = case.head_dim**-0.5 if scale is None else scale
    out, lse = reference.masked_attention(q, k, v, mask, *cu_seqlens, case.block_size, scale)
    return out.to(q.dtype), lse


def gradients(
    out: Tensor, lse: Tensor, inputs: list[Tensor], dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of <out, dout> + <lse, dlse>; rows with lse -inf take no part in the second."""
    loss = (out * dout.to(out.dtype)).sum()
    if dlse is not None:
        finite = ~lse.isinf()
        loss = loss + (lse[finite] * dlse[finite].to(lse.dtype)).sum()
    return torch.autograd.grad(loss, inputs)


def recomputed_gradients(
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor,
    dout: Tensor,
    dlse: Tensor,
    scale: float,
    round_weights: bool = False,
    saved_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv as every flash-style backward computes them, in plain PyTorch with fp32
    accumulation. round_weights: P and dS go into the products in the dtype of q, as on tensor
    cores; in float16 small ones are subnormal.

    P is recomputed from the lse and delta = sum(dout * out) - dlse replaces the softmax's own sum,
    so rounding of the saved out enters the gradients. saved_out: the one of the kernel to be
    checked, whose own check is another; else PyTorch's. Two outs that are equally good differ in
    their roundings, and where dP - delta cancels, the gradient of a key with a single query is
    little else.
    """
    cu_seqlens_q, cu_seqlens_k = case.cu_seqlens(q.device)
    mask = reference.block_mask(block_ids, cu_seqlens_q, cu_seqlens_k, case.block_size)
    out, lse = reference.masked_attention(
        q, k, v, mask, cu_seqlens_q, cu_seqlens_k, case.block_size, scale
    )
    _, position = reference.query_positions(cu_seqlens_q, cu_seqlens_k)
    group = case.heads_q // case.heads_k
    grads = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
    out = out.to(q.dtype) if saved_out is None else saved_out
    delta = (dout.float() * out.float()).sum(-1) - dlse.masked_fill(lse.isinf(), 0).T
    bounds = zip(*(zip(cu.tolist(), cu.tolist()[1:]) for cu in (cu_seqlens_q, cu_seqlens_k)))
    for (begin_q, end_q), (begin_k, end_k) in bounds:
        rows, keys = slice(begin_q, end_q), slice(begin_k, end_k)
        index = torch.arange(end_k - begin_k, device=q.device)
        seen = mask[rows][:, :, index // case.block_size] & (index <= position[rows, None, None])
        qs, dos = q[rows].float(), dout[rows].float()
        ks, vs = (x[keys].float().repeat_interleave(group, 1) for x in (k, v))
        p = (torch.einsum("qhd,khd->qhk", qs, ks) * scale - lse.T[rows, :, None]).exp()
        p = p.masked_fill(~seen, 0.0)
        ds = p * (torch.einsum("qhd,khd->qhk", dos, vs) - delta[rows, :, None])
        if round_weights:
            p, ds = (x.to(q.dtype).float() for x in (p, ds))
        grads[0][rows] = torch.einsum("qhk,khd->qhd", ds, ks) * scale
        grads[1][keys] = (
            (torch.einsum("qhk,qhd->khd", ds, qs) * scale).unflatten(1, (-1, group)).sum(2)
        )
        grads[2][keys] = torch.einsum("qhk,qhd->khd", p, dos).unflatten(1, (-1, group)).sum(2)
    return tuple(x.to(q.dtype) for x in grads)


def check_against_reference(
    case: Case, dtype: torch.dtype, softmax_scale: float | None = None
) -> None:
    """out, lse and all gradients of the op against float64, on the op's own selection."""
    scale = case.head_dim**-0.5 if softmax_scale is None else softmax_scale
    draws = []
    for _ in range(3 if dtype == torch.float32 else 1):
        inputs = case.tensors(dtype, requires_grad=True)
        out, lse, ids = run_op(case, *inputs, softmax_scale=softmax_scale)
        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        got = (out, lse, *gradients(out, lse, inputs, dout, dlse))
        inputs = [x.detach() for x in inputs]
        plain = run_masked(case, *inputs, ids, scale)
        plain += recomputed_gradients(case, *inputs, ids, dout, dlse, scale)
        inputs = [x.double().requires_grad_() for x in inputs]
        exact = run_masked(case, *inputs, ids, scale)
        exact += gradients(*exact, inputs, dout, dlse)
        draws.append([[x.detach() for x in results] for results in (got, exact, plain)])
    for i, name in enumerate(("out", "lse", "dq", "dk", "dv")):
        results = ([draw[j][i] for draw in draws] for j in range(3))
        assert_within_budget(*results, name, least_size=float(name == "lse"))


def check_selection(
    case: Case, q: Tensor, kbar: Tensor, block_ids: Tensor, scores: Tensor | None = None
) -> None:
    """Every chosen block's float64 score is within rounding of the best that could have been
    chosen.

    Also: ids ascend, are past blocks, are padded with -1, and are as many as there are.
    """
    cu_seqlens_q, cu_seqlens_k = case.cu_seqlens(q.device)
    best_ids, best = reference.gate_topk(
        q.double(),
        kbar.double(),
        cu_seqlens_q,
        cu_seqlens_k,
        case.max_seqlen_k,
        case.block_size,
        case.topk,
    )
    assert block_ids.shape == best_ids.shape and block_ids.dtype == torch.int32
    if not block_ids.numel():
        return
    assert torch.equal((block_ids >= 0).sum(-1), (best_ids >= 0).sum(-1)), "wrong number of blocks"
    pairs = block_ids[..., :-1], block_ids[..., 1:]
    assert bool(((pairs[0] < pairs[1]) | (pairs[1] == -1)).all()), "ids don't ascend"
    sequence, position = reference.query_positions(cu_seqlens_q, cu_seqlens_k)
    assert bool((block_ids < (position // case.block_size).clamp(min=0)[:, None, None]).all()), (
        "not a past block"
    )
    group = case.heads_q // case.heads_k
    rows = reference.block_offsets(cu_seqlens_k, case.block_size)[sequence][
        :, None, None
    ] + block_ids.clamp(min=0)
    heads = torch.arange(case.heads_q, device=q.device)[None, :, None] // group
    exact = torch.einsum("thd,thsd->ths", q.double(), kbar.double()[rows, heads])
    exact = exact.masked_fill(block_ids < 0, -torch.inf)
    # fp32 accumulation of D products: the error is bounded by D * eps * sum |q * kbar|.
    size = torch.einsum("thd,thsd->ths", q.double().abs(), kbar.double().abs()[rows, heads])
    tolerance = case.head_dim * torch.finfo(torch.float32).eps * size.amax(-1, keepdim=True)
    chosen, wanted = exact.sort(-1).values, best.sort(-1).values
    close = (chosen >= wanted - 2 * tolerance) | wanted.isneginf()
    assert bool(close.all()), "a better block was left out"
    if scores is not None:
        real = block_ids >= 0
        error = (scores.double() - exact)[real].abs()
        assert bool((error <= tolerance.expand_as(exact)[real]).all()), "scores are wrong"
        assert bool(scores[~real].isneginf().all())
