"""From which length on MoBA is faster than full causal attention by cuDNN, by topk, on one GPU.

    python benchmarks/crossover.py --name h200_crossover    writes its file in benchmarks/results
    python benchmarks/crossover.py --readme    puts the tables of all results into README.md

Timed as benchmarks/attention.py times its rows.
"""

from __future__ import annotations

import argparse

import torch

import common
from attention import PHASES, SHORT, Trial, dense, moba
from common import Row

HEADS, BLOCK_SIZE = 16, 128
LENGTHS = (2_048, 4_096, 8_192, 16_384, 32_768, 65_536, 131_072)
TOPKS = (4, 8, 16, 32, 64)


def run(options: argparse.Namespace) -> dict:
    """Measures; the lengths so far are always on disk."""
    torch.manual_seed(0)
    results = {
        **common.facts("python benchmarks/crossover.py", options.backend, options.commit),
        **{"heads": HEADS, "block_size": BLOCK_SIZE, "lengths": []},
    }

    for length in LENGTHS:
        topks = [topk for topk in TOPKS if topk * BLOCK_SIZE < length]
        ways = {"dense": (dense, 1)} | {topk: (moba(options.backend), topk) for topk in topks}
        onces = {
            name: Trial(attend, Row(length, HEADS, HEADS, BLOCK_SIZE, topk), "random").spans
            for name, (attend, topk) in ways.items()
        }
        ms = {name: common.medians(once, options.repeats)[0] for name, once in onces.items()}
        if ms["dense"]["forward"] < SHORT:
            ms = {name: found for name, (found, _) in common.in_turns(onces).items()}
        results["lengths"].append({"tokens": length, "dense": ms.pop("dense"), "moba": ms})
        common.write_results(options.name, results)
    return results


def table(results: dict) -> str:
    """Forward and backward of full attention in ms, and how many times faster MoBA is."""
    header = ["S", "dense ms", *(f"topk {topk}" for topk in TOPKS)]
    lines = []
    for found in results["lengths"]:
        full = [found["dense"][phase] for phase in PHASES]
        cells = [f"{found['tokens']:,}", " / ".join(f"{x:.2f}" for x in full)]
        for topk in TOPKS:
            # JSON has made strings of the numbers.
            ms = found["moba"].get(topk) or found["moba"].get(str(topk))
            if ms is None:
                cells.append("-")
                continue
            kept = topk * results["block_size"] / found["tokens"]
            ratios = (f"{x / ms[phase]:.2f}x" for x, phase in zip(full, PHASES))
            cells.append(f"{' / '.join(ratios)} ({kept:.1%})")
        lines.append(cells)
    return common.markdown(header, lines)


def tables() -> str:
    """Of all committed results, with what is common to them; nothing without results."""
    committed = common.read_results("crossover.py")
    if not committed:
        return ""
    parts = [
        "How many times faster than full causal attention by cuDNN, forward / backward, by length "
        "and topk, and in brackets which part of the keys the last query sees at most: "
        f"{HEADS} heads, head_dim {common.HEAD_DIM}, block {BLOCK_SIZE}, bfloat16, one sequence; "
        "`python benchmarks/crossover.py`. Below 1x full attention is faster; a dash: topk covers "
        "the sequence, and `moba_attention` is full attention. Short rows are bound by what "
        "launching costs on the host."
    ]
    for results in committed.values():
        what = f"{results['gpu']}, backend {results['backend']}, commit {results['commit']}:"
        parts += [what, table(results)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    common.command_line("crossover", __doc__, run, table, tables)
