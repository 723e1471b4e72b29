"""What FlashAttention's backward alone needs for a row: less the flash backend can't take.

    python benchmarks/flash_alone.py [--rows G,I] [--seconds 2]

Segments as the flash backend makes them, but all of one length and twice as many as there are
multiprocessors, so that nothing waits: of its deterministic mode, which the backend uses where a
block has more than 128 keys, and the other one, whose dq differs from run to run. Timed from the
start, and again after half of the seconds, when the card has met its limit of power.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from unittest import mock

import torch

import moba_ext
from common import HEAD_DIM, ROWS, Row, markdown, positive, require_gpu, row_names
from moba_ext import flash, varlen

HEADER = ["row", "deterministic", "TFLOP/s, first run", "later", "MHz, W", "the row's products, ms"]


def products(pairs: int) -> int:
    """Operations of the backward of (query, key) pairs: five products."""
    return 5 * 2 * HEAD_DIM * pairs


def pairs_of(row: Row) -> int:
    sizes = {"heads_q": row.heads_q, "block_size": row.block_size, "topk": row.topk}
    return row.heads_q * moba_ext.plan(row.tokens, head_dim=HEAD_DIM, **sizes).attended_pairs


def segments_of(row: Row) -> tuple[Callable, int]:
    """A backward over equal segments, and its pairs."""
    tokens, block = row.tokens, row.block_size
    sizes = 1, tokens, tokens, tokens, row.heads_q, row.heads_k, HEAD_DIM, block, row.topk
    rows = flash.make_plan(*sizes, backward=True).segment_rows
    count = 2 * torch.cuda.get_device_properties().multi_processor_count
    dtype = {"dtype": torch.bfloat16, "device": "cuda"}
    q, dout = (torch.randn(count * rows, 1, HEAD_DIM, **dtype) for _ in range(2))
    k, v = (torch.randn(count * block, 1, HEAD_DIM, **dtype) for _ in range(2))
    offsets = torch.arange(count + 1, dtype=torch.int32, device="cuda")
    sequences = varlen.Sequences(offsets * rows, offsets * block, rows, block)
    scale = HEAD_DIM**-0.5
    out, lse = varlen.forward(q, k, v, sequences, scale, causal=False)
    args = dout, None, q, k, v, out, lse, sequences, scale, False
    return lambda: varlen.backward(*args), count * rows * block


def timed(call: Callable, seconds: float) -> tuple[float, float, str]:
    """ms of the first run, the median of the second half, and the card's clock and power there."""
    call()
    torch.cuda.synchronize()
    time.sleep(1)  # cools down
    times, query, begin = [], None, time.perf_counter()
    while (at := time.perf_counter() - begin) < seconds or query is None:
        if query is None and at > seconds / 2:
            half = len(times)
            query = subprocess.Popen(
                ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"],
                stdout=subprocess.PIPE,
                text=True,
            )
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        call()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]))
    return times[0], statistics.median(times[half:]), query.communicate()[0].split("\n")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=row_names, default=["G", "I"], help="(G,I)")
    parser.add_argument("--seconds", type=positive, default=2, help="of every mode (2)")
    options = parser.parse_args()
    require_gpu(parser, "flash")
    if shutil.which("nvidia-smi") is None:
        parser.error("nvidia-smi is not in PATH: it comes with the driver")
    lines = []
    for name in options.rows:
        call, pairs = segments_of(ROWS[name])
        work = products(pairs_of(ROWS[name]))
        for deterministic in (True, False):
            with mock.patch.object(varlen, "needs_order", lambda *_, is_so=deterministic: is_so):
                first, later, state = timed(call, options.seconds)
            rates = [products(pairs) / ms / 1e9 for ms in (first, later)]
            alone = " to ".join(f"{work / rate / 1e9:.0f}" for rate in rates)
            mode = "yes" if deterministic else "no"
            lines.append([name, mode, *(f"{rate:.0f}" for rate in rates), state, alone])
    print(markdown(HEADER, lines))


if __name__ == "__main__":
    main()
