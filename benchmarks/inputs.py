"""The kinds of inputs of every benchmark, so that figures compare.

random      q, k, v ~ N(0, 1).
correlated  keys of a block share one of 64 topics, queries keep one for 256 tokens on average; with
            topic vectors u of unit length per KV head, x = 0.5 * N(0, 1) + 4 * u[topic]. Queries
            find their topic's blocks, and neighbours choose alike.
hot         random, with 8 * w added to every query and to the keys of the first block, w a unit
            vector per KV head: nearly every query chooses it, as with an attention sink.
hottest     the same of the first topk - 1 blocks.

v is N(0, 1) in all. A query head has the topics and the w of its KV head. Nothing waits for the
device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("random", "correlated", "hot", "hottest")
TOPICS, TOPIC_TOKENS = 64, 256


def draw(
    kind: str,
    tokens: int,
    heads_q: int,
    heads_k: int,
    head_dim: int,
    block_size: int,
    topk: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cuda",
) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence: q ``[tokens, heads_q, head_dim]``, k and v ``[tokens, heads_k, head_dim]``."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, must be one of {', '.join(KINDS)}")
    options = {"dtype": dtype, "device": device}
    q = torch.randn(tokens, heads_q, head_dim, **options)
    k, v = (torch.randn(tokens, heads_k, head_dim, **options) for _ in range(2))
    of_group = q.view(tokens, heads_k, -1, head_dim)  # [tokens, heads_k, group, head_dim]
    if kind == "correlated":
        topics = _unit(TOPICS, heads_k, head_dim, device=device)
        of_group.mul_(0.5).add_(4 * topics[query_topics(tokens, device)][:, :, None])
        k.mul_(0.5).add_(4 * topics[_key_topics(tokens, block_size, device)])
    elif kind != "random":
        hot_blocks = 1 if kind == "hot" else topk - 1
        w = _unit(heads_k, head_dim, device=device)
        of_group.add_(8 * w[:, None])
        k[: hot_blocks * block_size].add_(8 * w)
    return q, k, v


def _unit(*shape: int, device: str | torch.device) -> Tensor:
    """Random directions, float32."""
    return F.normalize(torch.randn(*shape, device=device), dim=-1)


def query_topics(tokens: int, device: str | torch.device) -> Tensor:
    """int64 ``[tokens]``: runs of geometric length, TOPIC_TOKENS on average."""
    changes = torch.rand(tokens, device=device) < 1 / TOPIC_TOKENS
    return torch.randint(TOPICS, (tokens + 1,), device=device)[changes.cumsum(0)]


def _key_topics(tokens: int, block_size: int, device: str | torch.device) -> Tensor:
    """int64 ``[tokens]``: one topic per block."""
    blocks = torch.arange(tokens, device=device) // block_size
    return torch.randint(TOPICS, (tokens // block_size + 1,), device=device)[blocks]
