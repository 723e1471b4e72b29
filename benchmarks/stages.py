"""The CUDA stages one by one: ms of a whole call and how near the hardware's limits they come.

    python benchmarks/stages.py [--hot] [--rows A,C]

bfloat16, head_dim 128, random q and kbar, random choices of past blocks; --hot: block 0 in every
query's first slot. "gate_topk rising": scores rise with recency. The gate and route do all heads at
once; of the others one KV head is timed and multiplied by their number. TFLOP count past blocks
only, sm90's also own ones, bytes are those that must be read and written once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from common import HEAD_DIM, ROWS, Row, medians, require_gpu, row_names, span
from moba_ext import sm90

ITEM = 2


def milliseconds(function: Callable) -> float:
    return medians(lambda: {"": span(function)[0]}, 20)[0][""]


def cu_seqlens(row: Row) -> Tensor:
    return torch.tensor([0, row.tokens], dtype=torch.int32, device="cuda")


def gate_inputs(row: Row, rising: bool) -> tuple[Tensor, Tensor]:
    """q ``[T, Hq, D]``, kbar ``[NB, Hk, D]``."""
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    q = torch.randn(row.tokens, row.heads_q, HEAD_DIM, **options)
    kbar = torch.randn(row.tokens // row.block_size + 1, row.heads_k, HEAD_DIM, **options)
    if rising:
        # Steps of 0.25 that bfloat16 holds, far above the noise of the other elements.
        block = torch.arange(len(kbar), device="cuda")
        q[..., 2:], q[..., 0], q[..., 1] = q[..., 2:] * 0.01, 32, 0.25
        kbar[..., 0], kbar[..., 1] = (block // 128)[:, None], (block % 128)[:, None]
    return q, kbar


def gate(name: str) -> None:
    row, cu = ROWS[name], cu_seqlens(ROWS[name])
    blocks = row.tokens // row.block_size
    flop = 2 * HEAD_DIM * row.heads_q * row.block_size * blocks * (blocks - 1) // 2
    sizes = (row.tokens, row.tokens, row.block_size, row.topk)
    for rising in (False, True):
        q, kbar = gate_inputs(row, rising)
        ms = milliseconds(partial(torch.ops.moba.gate_topk, q, kbar, cu, cu, *sizes))
        what = "gate_topk rising" if rising else "gate_topk"
        print(f"{name} {what:16} {ms:8.3f} ms {flop / ms / 1e9:8.1f} TFLOP/s", flush=True)


def random_ids(row: Row, hot: bool) -> Tensor:
    """int32 ``[T, Hq, topk - 1]``."""
    slots = row.topk - 1
    past = torch.arange(row.tokens, device="cuda")[:, None, None] // row.block_size
    ids = (torch.rand(row.tokens, row.heads_q, slots, device="cuda") * past).int().sort(-1).values
    if hot:
        ids[..., 0] = 0
    return ids.masked_fill(past <= torch.arange(slots, device="cuda"), -1)


def around_attend(name: str, hot: bool) -> None:
    """route, and what packs and merges rows and keys."""
    tokens, heads_q, heads_k, size, _ = ROWS[name]
    ops, options = torch.ops.moba, {"device": "cuda", "dtype": torch.bfloat16}
    group, cu, ids = heads_q // heads_k, cu_seqlens(ROWS[name]), random_ids(ROWS[name], hot)
    cu_blocks, *_ = ops.flash_metadata(cu, cu, tokens, tokens, tokens, tokens, size)
    sequences, one = (cu, cu, cu_blocks), (0, 1, 0, tokens)

    def route(heads: int):
        sizes = (tokens, heads_k, size, max(1024, 4 * size), 0, heads, 0, tokens)
        return ops.flash_route(ids, cu, cu_blocks, *sizes)

    def report(what: str, function: Callable, gigabytes: float, calls: int = heads_k) -> None:
        ms = milliseconds(function) * calls
        print(f"{name} {what:16} {ms:8.3f} ms {gigabytes * calls / ms * 1e3:8.0f} GB/s", flush=True)

    report("route", lambda: route(heads_k), 4 * ids.numel() * 3 / 1e9, 1)
    entries, positions, offsets, segment_offsets, segment_lists, _, cu_keys = route(1)
    used, segments = int(offsets[-1]), int(segment_offsets[-1])
    q, dout, out = (torch.randn(tokens, heads_q, HEAD_DIM, **options) for _ in range(3))
    k, v = (torch.randn(tokens, heads_k, HEAD_DIM, **options) for _ in range(2))
    lse = torch.randn(heads_q, tokens, device="cuda")
    own = torch.randn(tokens, group, HEAD_DIM, **options)
    row, key = HEAD_DIM * ITEM / 1e9, 2 * HEAD_DIM * ITEM / 1e9

    args = (entries, offsets, heads_k, *one)
    report("gather", lambda: ops.flash_gather([q], None, *args), 2 * used * row)
    report("gather backward", lambda: ops.flash_gather([q, dout, out], lse, *args), 6 * used * row)
    keys = (k, v, cu, cu_blocks, segment_lists, cu_keys, size, 0, 1)
    report("gather keys", lambda: ops.flash_gather_keys(*keys), 2 * segments * size * key)
    part, part_lse = ops.flash_gather([q], lse, *args)
    parts, outputs = (positions, part), (*sequences, heads_k, *one, out)
    lses = (part_lse, own, lse[:group].clone())
    total = (used + 2 * tokens * group) * row
    report("merge", lambda: ops.flash_merge(*parts, *lses, *outputs, lse), total)
    report("merge backward", lambda: ops.flash_merge_backward(*parts, own, *outputs), total)
    packs, own, dk, dv = ops.flash_gather_keys(*keys), k[:, :1], k[:, 1:2], v[:, 1:2]
    reduce = (segment_offsets, *packs, own, own, *sequences, size, True, True, None, None, dk, dv)
    total = (segments * size + 2 * tokens) * key
    report("reduce keys", lambda: ops.flash_reduce_keys(*reduce), total)


def attend(name: str, hot: bool) -> None:
    """sm90's kernels, as many KV heads at once as in a call."""
    row = ROWS[name]
    tokens, heads_q, heads_k, size, topk = row
    ops, options = torch.ops.moba, {"device": "cuda", "dtype": torch.bfloat16}
    cu, ids, scale = cu_seqlens(row), random_ids(row, hot), HEAD_DIM**-0.5
    cu_blocks, *_ = ops.flash_metadata(cu, cu, tokens, tokens, tokens, tokens, size)
    q, dout = (torch.randn(tokens, heads_q, HEAD_DIM, **options) for _ in range(2))
    k, v = (torch.randn(tokens, heads_k, HEAD_DIM, **options) for _ in range(2))
    stats = [torch.randn(heads_q, tokens, device="cuda") + shift for shift in (8, 0)]

    def report(what: str, heads: int, function: Callable, pairs: int, products: int) -> None:
        ms = milliseconds(function) / heads * heads_k
        tflops = 2 * products * pairs * HEAD_DIM / heads * heads_k / ms / 1e9
        print(f"{name} {what:16} {ms:8.3f} ms {tflops:8.1f} TFLOP/s", flush=True)

    own_pairs = tokens * (size + 1) // 2 * (heads_q // heads_k)
    for backward in (False, True):
        sizes = (1, tokens, tokens, tokens, heads_q, heads_k, HEAD_DIM, size, topk)
        plan = sm90.make_plan(*sizes, backward=backward)
        heads = plan.heads_per_group
        entries, _, offsets, segment_offsets, segment_lists, cu_rows, _ = ops.flash_route(
            *(ids, cu, cu_blocks, tokens, heads_k, size, plan.segment_rows, 0, heads, 0, tokens),
            *(backward, not backward, cu),
        )
        routed = (entries, segment_offsets, segment_lists, cu_rows, cu, cu_blocks, size, scale)
        routed += (0, heads, 0, tokens)
        pairs = int(offsets[-1]) * size + own_pairs * heads
        if backward:
            call = partial(ops.sm90_attend_backward, dout, q, k, v, *stats, cu, *routed)
        else:
            call = partial(ops.sm90_attend, q, k, v, cu, *routed)
        report(
            "attend backward" if backward else "attend", heads, call, pairs, 5 if backward else 2
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=row_names, default="A,B,C,F,H", help="(A,B,C,F,H)")
    parser.add_argument("--hot", action="store_true", help="every query takes block 0")
    options = parser.parse_args()
    sm90 = require_gpu(parser, "auto") == "sm90"
    torch.manual_seed(0)
    print(torch.cuda.get_device_name())
    for name in options.rows:
        gate(name)
        around_attend(name, options.hot)
        if sm90:
            attend(name, options.hot)


if __name__ == "__main__":
    main()
