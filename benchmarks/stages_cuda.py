"""The stages around FlashAttention on CUDA: ms of a whole call, and GB/s, with CUDA events.

    python benchmarks/stages_cuda.py [--hot]

Random choices of past blocks, bfloat16, head_dim 128; --hot: block 0 in every query's first slot.
route does all heads at once; of the others one KV head is timed and multiplied by their number.
Bytes are those that must be read and written once.
"""

import argparse
import statistics

import torch

import moba_ext  # noqa: F401  (loads the ops)

D, ITEM = 128, 2
ROWS = {  # tokens, query heads, KV heads, block_size, topk
    "A": (8_192, 16, 16, 128, 8),
    "B": (32_768, 16, 16, 128, 8),
    "C": (131_072, 16, 16, 128, 8),
    "F": (131_072, 16, 16, 512, 3),
    "H": (32_768, 32, 8, 128, 8),
}


def milliseconds(function) -> float:
    for _ in range(3):
        function()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
    for event in events[:-1]:
        event.record()
        function()
    events[-1].record()
    torch.cuda.synchronize()
    return statistics.median(x.elapsed_time(y) for x, y in zip(events, events[1:]))


def random_ids(tokens: int, heads: int, block_size: int, slots: int, hot: bool) -> torch.Tensor:
    past = torch.arange(tokens, device="cuda")[:, None, None] // block_size
    ids = (torch.rand(tokens, heads, slots, device="cuda") * past).int().sort(-1).values
    if hot:
        ids[..., 0] = 0
    return ids.masked_fill(past <= torch.arange(slots, device="cuda"), -1)


def measure(name: str, hot: bool) -> None:
    tokens, heads_q, heads_k, size, topk = ROWS[name]
    ops, options = torch.ops.moba, {"device": "cuda", "dtype": torch.bfloat16}
    group = heads_q // heads_k
    cu = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    ids = random_ids(tokens, heads_q, size, topk - 1, hot)
    cu_blocks, *_ = ops.flash_metadata(cu, cu, tokens, tokens, tokens, tokens, size)
    sequences, one = (cu, cu, cu_blocks), (0, 1, 0, tokens)

    def route(heads: int):
        sizes = (tokens, heads_k, size, max(1024, 4 * size), 0, heads, 0, tokens)
        return ops.flash_route(ids, cu, cu_blocks, *sizes)

    def report(what: str, function, gigabytes: float, calls: int = heads_k) -> None:
        ms = milliseconds(function) * calls
        print(f"{name} {what:15} {ms:8.3f} ms {gigabytes * calls / ms * 1e3:8.0f} GB/s", flush=True)

    report("route", lambda: route(heads_k), 4 * ids.numel() * 3 / 1e9, 1)
    entries, positions, offsets, segment_offsets, segment_lists, _, cu_keys = route(1)
    used, segments = int(offsets[-1]), int(segment_offsets[-1])
    q, dout, out = (torch.randn(tokens, heads_q, D, **options) for _ in range(3))
    k, v = (torch.randn(tokens, heads_k, D, **options) for _ in range(2))
    lse = torch.randn(heads_q, tokens, device="cuda")
    own = torch.randn(tokens, group, D, **options)
    row, key = D * ITEM / 1e9, 2 * D * ITEM / 1e9

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


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--hot", action="store_true", help="every query takes block 0")
    for name in ROWS:
        measure(name, parser.parse_args().hot)
