"""Compiled CPU backend against full causal attention of the same tensors, in one process.

    python benchmarks/cpu.py                measures, writes benchmarks/results/cpu.json
    python benchmarks/cpu.py --name NAME    the same into benchmarks/results/NAME.json
    python benchmarks/cpu.py --readme       puts the tables of all results into README.md

Every figure is the median of alternating runs after one warm-up. Forward runs in grad mode, saving
what the backward needs. `pairs` is how many times fewer (query, key) pairs MoBA computes.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import moba_ext
from common import commit, markdown, put_into_readme, read_results, write_results
from moba_ext import _C

HEADS, HEAD_DIM = 4, 64


class Row(NamedTuple):
    length: int
    block_size: int
    topk: int
    dtype: str
    repeats: int
    dense: bool  # also time full attention


ROWS = [
    Row(16_384, 512, 3, "float32", 7, True),
    Row(16_384, 512, 3, "bfloat16", 7, True),
    Row(32_768, 512, 3, "float32", 3, True),
    Row(32_768, 512, 3, "bfloat16", 3, True),
    Row(2_048, 512, 4, "float32", 15, True),
    Row(2_048, 512, 4, "bfloat16", 15, True),
    Row(8_192, 512, 16, "float32", 5, True),
    Row(65_536, 512, 3, "float32", 3, False),
    Row(131_072, 512, 3, "float32", 3, False),
]


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def has_amx() -> bool:
    """Matrix units for bfloat16, which PyTorch's attention uses too."""
    return " amx_bf16" in Path("/proc/cpuinfo").read_text()


def timed(function):
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def run(row: Row) -> dict:
    dtype = getattr(torch, row.dtype)
    shape = (1, row.length, HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(3))
    dout = torch.randn(shape).to(dtype)
    sizes = {"block_size": row.block_size, "topk": row.topk}

    def moba():
        return moba_ext.moba_attention(q, k, v, **sizes, backend="cpu")

    def sdpa():
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    def gate():
        return moba_ext.select_blocks(q[0], k[0], **sizes)

    plan = moba_ext.plan(row.length, heads_q=HEADS, head_dim=HEAD_DIM, **sizes, dtype=dtype)
    functions = {"moba": moba, **({"sdpa": sdpa} if row.dense else {})}
    times: dict[str, list[float]] = {}
    for repeat in range(row.repeats + 1):
        measured = {}
        for name, function in functions.items():
            measured[f"{name}_forward"], out = timed(function)
            measured[f"{name}_backward"], _ = timed(lambda out=out: out.backward(dout))
            q.grad = k.grad = v.grad = None
        if "gate_topk" in plan.stages:
            measured["gate"], _ = timed(gate)
        if repeat:  # the first round warms up
            for name, seconds in measured.items():
                times.setdefault(name, []).append(seconds)
    return {
        **row._asdict(),
        "pairs": plan.dense_pairs / plan.attended_pairs,
        "workspace_bytes": max(plan.forward_bytes, plan.backward_bytes),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
    }


def measure(commit_name: str | None) -> dict:
    rows = []
    for row in ROWS:
        rows.append(run(row))
        print(f"{row.length} {row.dtype}: {rows[-1]['seconds']}", file=sys.stderr)
    return {
        "cpu": cpu_model(),
        "amx": has_amx(),
        "threads": torch.get_num_threads(),
        "isa": _C.cpu_isa(),
        "torch": torch.__version__,
        "moba_ext": moba_ext.__version__,
        "commit": commit_name or commit("csrc"),
        "command": "python benchmarks/cpu.py",
        "rows": rows,
    }


def table(results: dict) -> str:
    intro = (
        f"{results['cpu']}, {results['threads']} threads, {results['isa']} kernels, "
        f"{'with' if results['amx'] else 'no'} AMX, torch {results['torch']}, "
        f"commit {results['commit']}:"
    )
    header = ["S", "block, topk", "dtype", "fewer pairs", "gate", "forward", "backward"]
    header += ["SDPA forward", "SDPA backward", "speed-up forward", "forward + backward"]
    lines = []
    for row in results["rows"]:
        s = row["seconds"]
        dense = ["-"] * 4
        if row["dense"]:
            total = (s["sdpa_forward"] + s["sdpa_backward"]) / (
                s["moba_forward"] + s["moba_backward"]
            )
            forward = s["sdpa_forward"] / s["moba_forward"]
            dense = [f"{s['sdpa_forward']:.3f}", f"{s['sdpa_backward']:.3f}"]
            dense += [f"**{forward:.1f}x**", f"**{total:.1f}x**"]
        cells = [
            f"{row['length']:,}",
            f"{row['block_size']}, {row['topk']}",
            row["dtype"],
            f"{row['pairs']:.1f}x",
            f"{s['gate']:.3f}" if "gate" in s else "-",
            f"{s['moba_forward']:.3f}",
            f"{s['moba_backward']:.3f}",
            *dense,
        ]
        lines.append(cells)
    return f"{intro}\n\n{markdown(header, lines)}"


def tables() -> str:
    """Of all committed results, with what is common to them."""
    intro = (
        f"{HEADS} heads, head_dim {HEAD_DIM}. Seconds, from `python benchmarks/cpu.py`. The gate "
        "(block_mean and gate_topk) is part of the forward; SDPA is PyTorch's full causal "
        "attention, `scaled_dot_product_attention`."
    )
    return "\n\n".join([intro, *(table(results) for results in read_results("cpu.py").values())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", default="cpu", help="of the result file (cpu)")
    parser.add_argument("--commit", help="of the kernels, where the tree has no .git")
    parser.add_argument("--readme", action="store_true", help="write README.md's tables")
    options = parser.parse_args()
    if options.readme:
        put_into_readme("cpu.py", tables())
        return
    results = measure(options.commit)
    write_results(options.name, results)
    print(table(results))


if __name__ == "__main__":
    main()
