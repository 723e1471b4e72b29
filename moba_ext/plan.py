"""``moba_ext.plan``: what a call will do and how much memory it takes, before running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import _C, flash, ops, sm90
from .attention import _check_positive

__all__ = ["Plan", "plan"]

_STAGES = ("block_mean", "gate_topk", "route", "attend", "merge")
_DENSE_STAGES = {
    "cpu": _STAGES[3:],
    **dict.fromkeys(("flash", "sm90"), (*_STAGES[:2], *_STAGES[3:])),
}


@dataclass(frozen=True)
class Plan:
    """A planned call. Bytes are beyond inputs and returned tensors.

    backend, reason: what will run and why.
    stages: in order; without gate and routing when ``topk * block_size`` covers every sequence.
    attended_pairs, dense_pairs: (query, key) pairs per query head, of this call and of full
        causal attention.
    forward_bytes, backward_bytes: workspace of cpu and sm90; for flash, and where
        ``topk * block_size`` covers every sequence on a GPU, an estimate, as part of it is
        FlashAttention's own; None for the reference backend, which leaves memory to PyTorch.
    heads_per_group, queries_per_group, groups: attend and merge run over groups of (KV heads,
        queries), one after another, so that workspace stays bounded at any length. Where the
        backward has other groups than the forward, these are the forward's.
    """

    backend: str
    reason: str
    stages: tuple[str, ...]
    attended_pairs: int
    dense_pairs: int
    forward_bytes: int | None
    backward_bytes: int | None
    heads_per_group: int | None
    queries_per_group: int | None
    groups: int | None

    @property
    def density(self) -> float:
        """Share of the pairs of full causal attention that are computed."""
        return self.attended_pairs / self.dense_pairs if self.dense_pairs else 1.0

    def __str__(self) -> str:
        lines = [
            f"backend    {self.backend}: {self.reason}",
            f"stages     {' -> '.join(self.stages)}",
            f"pairs      {self.attended_pairs:,} of {self.dense_pairs:,} per head "
            f"({self.density:.1%})",
        ]
        if self.forward_bytes is not None:
            lines += [
                f"workspace  {self.forward_bytes / 2**20:,.1f} MiB forward, "
                f"{self.backward_bytes / 2**20:,.1f} MiB backward",
                f"groups     {self.groups} of {self.heads_per_group} KV heads x "
                f"{self.queries_per_group:,} queries",
            ]
        return "\n".join(lines)


def _lengths(name: str, seqlens: int | Sequence[int]) -> list[int]:
    lengths = list(seqlens) if isinstance(seqlens, Sequence) else [seqlens]
    if not lengths:
        raise ValueError(f"{name} is empty, must name at least one sequence length")
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(
                f"{name} has {length!r} ({type(length).__name__}), must be int lengths in tokens"
            )
        if length < 0:
            raise ValueError(f"{name} has {length}, must be lengths >= 0 in tokens")
    if sum(lengths) >= 2**31:
        raise ValueError(f"{name} has {sum(lengths)} tokens, must be below 2^31: offsets are int32")
    return lengths


def plan(
    seqlens_q: int | Sequence[int],
    seqlens_k: int | Sequence[int] | None = None,
    *,
    heads_q: int,
    heads_k: int | None = None,
    head_dim: int,
    block_size: int,
    topk: int,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    backend: str = "auto",
) -> Plan:
    """Plan ``moba_attention_varlen`` for sequences of these lengths without touching any data.

    seqlens_q, seqlens_k: tokens of every sequence, an int for one; keys as many as queries if None.
    heads_k: KV heads, as many as query heads if None. Workspace depends on the number of CPU
        threads (``torch.get_num_threads()``), results never do. Errors as in
        :func:`moba_attention_varlen`.
    """
    queries = _lengths("seqlens_q", seqlens_q)
    keys = queries if seqlens_k is None else _lengths("seqlens_k", seqlens_k)
    if len(keys) != len(queries):
        raise ValueError(
            f"seqlens_k has {len(keys)} sequences, must have as many as seqlens_q, {len(queries)}"
        )
    heads_q = _check_positive("heads_q", heads_q)
    heads_k = heads_q if heads_k is None else _check_positive("heads_k", heads_k)
    if heads_q % heads_k:
        raise ValueError(f"heads_q is {heads_q}, must be a multiple of heads_k, {heads_k}")
    head_dim = _check_positive("head_dim", head_dim)
    block_size, topk = _check_positive("block_size", block_size), _check_positive("topk", topk)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {dtype!r}, must be a torch.dtype")

    kind = torch.device(device).type
    name, reason = ops.resolve_backend(backend, kind, dtype, head_dim)
    call = {
        "batch": len(queries),
        "tokens_q": sum(queries),
        "tokens_k": sum(keys),
        "max_seqlen_k": max(keys),
        "heads_q": heads_q,
        "heads_k": heads_k,
        "head_dim": head_dim,
        "block_size": block_size,
        "topk": topk,
    }
    if name in ("flash", "sm90"):
        sizes = (sm90 if name == "sm90" else flash).planned_sizes(**call)
    else:
        threads = torch.get_num_threads()
        sizes = _C.plan(**call, element_size=dtype.itemsize, threads=threads)
    compiled = name != "reference"
    dense = compiled and sizes["dense"]
    return Plan(
        backend=name,
        reason=reason,
        # flash and sm90 select blocks in any case: block_ids are an output of the op.
        stages=tuple(x for x in _STAGES if not dense or x in _DENSE_STAGES[name]),
        attended_pairs=sum(
            _C.attended_pairs(q, k, block_size, topk) for q, k in zip(queries, keys)
        ),
        dense_pairs=sum(_C.dense_pairs(q, k) for q, k in zip(queries, keys)),
        **{key: sizes[key] if compiled else None for key in sizes if key != "dense"},
    )
