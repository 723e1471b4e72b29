"""MoBA on one GPU against full causal attention by cuDNN, and other MoBA packages, in one process.

    python benchmarks/attention.py --name h200     measures, writes benchmarks/results/h200.json
    python benchmarks/attention.py --rows A,C --inputs hot --name h200_hot
    python benchmarks/attention.py --check         were the committed results made by these kernels?
    python benchmarks/attention.py --readme        puts the tables of all results into README.md

Every run draws fresh inputs. Times lie between CUDA events, with no wait in between, so in small
rows they include what launching costs; there the methods take turns, and are also timed with the
host ahead, as in a model whose other work fills the queue. Forward runs in grad mode, saving what
the backward needs. Memory is the peak beyond what was there before the call and the tensors it
returns (out; dq, dk, dv): what the forward saves for the backward beside out counts. Stages: one
more forward and backward under torch.profiler, whose kernels tell by their names, when all rows
have been timed: later launches of a process seem to take longer once it was profiled.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function

import common
import inputs
import moba_ext
from common import HEAD_DIM, ROWS, Row

DEVICE = "cuda"
MOBA, DENSE = "moba_ext", "dense cuDNN"
DENSE_MOST = 524_288
SHORT = 1.0  # ms of a forward: the host's part counts
NOT_ASKED = "not asked for"
STAGES = ("block_mean", "gate_topk", "route", "attend", "merge", "other")
PHASES = {"forward": STAGES, "backward": STAGES[2:]}
KERNELS = {  # of csrc/cuda, without "_kernel"; FlashAttention's are attend too
    "block_mean": ["block_mean"],
    "gate_topk": ["gate_topk"],
    "route": ["metadata", "own_blocks", "route_small", "count", "tiles", "lists", "place"]
    + ["place_sorted", "gather_rows", "gather_keys"],
    "attend": ["attend_forward_tile", "attend_forward_tiles", "attend_backward", "row_stats"],
    "merge": ["merge", "reduce_keys"],
}
STAGE_OF = {f"{kernel}_kernel": stage for stage in KERNELS for kernel in KERNELS[stage]}
GB = 1e9


# What is measured: q [T, Hq, D], k, v [T, Hk, D], cu_seqlens [2], row -> out [T, Hq, D].


def moba(backend: str) -> Callable:
    def attend(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, row: Row) -> Tensor:
        sizes = {"block_size": row.block_size, "topk": row.topk}
        lengths = (cu, cu, row.tokens, row.tokens)
        return moba_ext.moba_attention_varlen(q, k, v, *lengths, **sizes, backend=backend)

    return attend


def dense(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, row: Row) -> Tensor:
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        gqa = row.heads_q != row.heads_k
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=gqa)
    return out[0].transpose(0, 1)


def flash_moba(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, row: Row) -> Tensor:
    """https://github.com/mit-han-lab/flash-moba"""
    function = import_module("flash_moba").flash_moba_varlen_func
    return function(q, k, v, cu, cu, row.tokens, row.tokens, row.block_size, row.topk)


def original_moba(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, row: Row) -> Tensor:
    """https://github.com/MoonshotAI/MoBA, which wants as many heads of k as of q."""
    if row == ROWS["I"]:  # would end this process with it
        raise RuntimeError("ends in an illegal memory access")
    function = import_module("moba.moba_efficient").moba_attn_varlen
    k, v = (x.repeat_interleave(row.heads_q // row.heads_k, 1) for x in (k, v))
    return function(q, k, v, cu, row.tokens, row.block_size, row.topk)


PEERS = {"flash_moba": ("FlashMoBA", flash_moba), "moba": ("original MoBA", original_moba)}


def peers() -> dict[str, Callable]:
    """Those that are installed; says why the others aren't measured."""
    found = {}
    for module, (name, attend) in PEERS.items():
        try:
            import_module(module)
            found[name] = attend
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return found


# How.


class Trial:
    """One way to attend, on the inputs of one row."""

    def __init__(self, attend: Callable, row: Row, kind: str) -> None:
        self.attend, self.row, self.kind = attend, row, kind
        self.cu_seqlens = torch.tensor([0, row.tokens], dtype=torch.int32, device=DEVICE)

    def draw(self) -> tuple[list[Tensor], Tensor]:
        """Fresh q, k, v and dout."""
        sizes = (*self.row[:3], HEAD_DIM, self.row.block_size, self.row.topk)
        tensors = [x.requires_grad_() for x in inputs.draw(self.kind, *sizes, device=DEVICE)]
        return tensors, torch.randn_like(tensors[0])

    def forward(self, tensors: list[Tensor]) -> Tensor:
        return self.attend(*tensors, self.cu_seqlens, self.row)

    def spans(self) -> dict[str, tuple]:
        tensors, dout = self.draw()
        forward, out = common.span(lambda: self.forward(tensors))
        backward, _ = common.span(lambda: torch.autograd.grad(out, tensors, dout))
        return {"forward": forward, "backward": backward}

    def queued(self) -> dict[str, float]:
        """ms of a forward and of a backward with the host ahead, on the same inputs."""
        tensors, dout = self.draw()
        out = self.forward(tensors)
        return {
            "forward": common.queued(lambda: self.forward(tensors)),
            "backward": common.queued(
                lambda: torch.autograd.grad(out, tensors, dout, retain_graph=True)
            ),
        }

    def extra_bytes(self) -> dict[str, int]:
        tensors, dout = self.draw()
        forward, out = _extra_bytes(lambda: self.forward(tensors))
        backward, _ = _extra_bytes(lambda: torch.autograd.grad(out, tensors, dout))
        return {"forward": forward, "backward": backward}

    def trace(self) -> list[dict]:
        """Events of a profiled forward and backward."""
        tensors, dout = self.draw()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            with record_function("benchmark::forward"):
                out = self.forward(tensors)
                torch.cuda.synchronize()
            with record_function("benchmark::backward"):
                torch.autograd.grad(out, tensors, dout)
                torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            return json.loads(path.read_text())["traceEvents"]


def _extra_bytes(function: Callable) -> tuple[int, object]:
    """Peak memory of a call beyond what was there and what it returns; and that.

    What a second stream still uses torch counts as free, but not as unreserved.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    result = function()
    returned = sum(x.nbytes for x in ([result] if isinstance(result, Tensor) else result))
    allocated = torch.cuda.max_memory_allocated() - allocated
    reserved = torch.cuda.max_memory_reserved() - reserved
    return max(allocated, reserved) - returned, result


def stage_ms(events: list[dict]) -> dict[str, dict[str, float]] | None:
    """ms of the kernels of every stage, forward and backward; None if the trace has no kernel.

    A kernel carries the number of the call that launched it and that of the operator around it:
    either may lie in the range of the phase; the backward launches from a thread of its own.
    """

    def numbered(key: str, *kinds: str) -> dict[int, dict]:
        chosen = (x for x in events if x.get("cat") in kinds and key in x.get("args", {}))
        return {x["args"][key]: x for x in chosen}

    ranges = [x for x in events if x.get("cat") == "user_annotation"]
    launches = numbered("correlation", "cuda_runtime", "cuda_driver")
    operators = numbered("External id", "cpu_op")
    kernels = [x for x in events if x.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    result = {phase: dict.fromkeys(STAGES, 0.0) for phase in PHASES}
    for kernel in kernels:
        args = kernel.get("args", {})
        calls = launches.get(args.get("correlation")), operators.get(args.get("External id"))
        phase = _phase([call for call in calls if call] or [kernel], ranges)
        if phase:  # the profiler itself may launch something before or after
            result[phase][_stage(kernel["name"])] += kernel["dur"] / 1e3
    return result if kernels else None


def _phase(calls: list[dict], ranges: list[dict]) -> str | None:
    """That in whose range one of the calls lies."""
    for x in ranges:
        if any(x["ts"] <= call["ts"] < x["ts"] + x["dur"] for call in calls):
            return x["name"].removeprefix("benchmark::")
    return None


def _stage(kernel: str) -> str:
    name = re.search(r"\w+_kernel\b", kernel)
    if name is None:
        return "other"
    return "attend" if name[0].startswith("flash_") else STAGE_OF.get(name[0], "other")


def measure(attend: Callable, row: Row, options: argparse.Namespace) -> dict:
    trial = Trial(attend, row, options.inputs)
    torch.cuda.empty_cache()
    ms, runs = common.medians(trial.spans, options.repeats)
    found = {"ms": ms, "runs": runs, "extra_bytes": trial.extra_bytes()}
    if ms["forward"] < SHORT:
        found["queued_ms"] = trial.queued()
    return found


def attempt(attend: Callable, row: Row, options: argparse.Namespace) -> dict:
    """The measurement, or why there is none: one failure must not cost the other rows."""
    try:
        return measure(attend, row, options)
    except Exception as error:
        message, *_ = str(error).split("\n")
        return {"skipped": f"{type(error).__name__}: {message[:200]}"}


def run_row(name: str, others: dict[str, Callable], options: argparse.Namespace) -> dict:
    row = ROWS[name]
    methods = {MOBA: attempt(moba(options.backend), row, options)}
    if options.no_dense or row.tokens > DENSE_MOST:
        why = NOT_ASKED if options.no_dense else f"above {DENSE_MOST:,} tokens, takes minutes"
        methods[DENSE] = {"skipped": why}
    else:
        methods[DENSE] = attempt(dense, row, options)
    for other, attend in others.items():
        methods[other] = attempt(attend, row, options)
    short = [method for method, found in methods.items() if "queued_ms" in found]
    if len(short) > 1:
        ways = {MOBA: moba(options.backend), DENSE: dense, **others}
        onces = {method: Trial(ways[method], row, options.inputs).spans for method in short}
        for method, (ms, runs) in common.in_turns(onces).items():
            methods[method].update(ms=ms, runs=runs)
    return {"row": name, **row._asdict(), "methods": methods}


def run(options: argparse.Namespace) -> dict:
    """Measures; the results of the rows so far are always on disk."""
    torch.manual_seed(0)
    results = {
        **common.facts("python benchmarks/attention.py", options.backend, options.commit),
        **{"inputs": options.inputs, "rows": []},
    }
    others = peers()
    for name in options.rows:
        results["rows"].append(run_row(name, others, options))
        common.write_results(options.name, results)
        for method, found in results["rows"][-1]["methods"].items():
            print(f"{name} {method}: {found.get('ms') or found['skipped']}", file=sys.stderr)
    for name, found in zip(options.rows, results["rows"]):
        if "ms" in found["methods"][MOBA]:
            trial = Trial(moba(options.backend), ROWS[name], options.inputs)
            torch.cuda.empty_cache()
            trial.spans()  # as warm as when they were timed
            found["methods"][MOBA]["stages_ms"] = stage_ms(trial.trace())
            common.write_results(options.name, results)
    return results


# Tables.


def times_table(rows: list[dict]) -> str:
    """A line per row and MoBA package, beside the dense yardstick of the row."""
    header = ["row", "S", "heads q/k", "block, topk", "", "forward ms", "backward ms"]
    header += ["dense forward", "dense backward", "speed-up forward", "speed-up backward"]
    header += ["extra GB forward", "backward"]
    lines = []
    for row in rows:
        yardstick = row["methods"][DENSE].get("ms")
        sizes = [row["row"], f"{row['tokens']:,}", f"{row['heads_q']}/{row['heads_k']}"]
        sizes.append(f"{row['block_size']:,}, {row['topk']}")
        for method, found in row["methods"].items():
            if method == DENSE or "ms" not in found:
                continue
            ms = [found["ms"][phase] for phase in PHASES]
            against = ["-"] * 4
            if yardstick:
                full = [yardstick[phase] for phase in PHASES]
                against = [f"{x:.2f}" for x in full]
                against += [f"**{x / y:.1f}x**" for x, y in zip(full, ms)]
            extra = [f"{found['extra_bytes'][phase] / GB:.2f}" for phase in PHASES]
            lines.append([*sizes, method, *(f"{x:.2f}" for x in ms), *against, *extra])
    return common.markdown(header, lines)


def queued_table(rows: list[dict]) -> str:
    """A line per short row and method."""
    lines = [
        [row["row"], method, *(f"{found['queued_ms'][phase]:.3f}" for phase in PHASES)]
        for row in rows
        for method, found in row["methods"].items()
        if "queued_ms" in found
    ]
    return common.markdown(["row", "", "forward ms", "backward ms"], lines)


def stages_table(rows: list[dict]) -> str:
    header = ["row", *(f"{phase} {stage}" for phase in PHASES for stage in PHASES[phase])]
    lines = []
    for row in rows:
        stages = row["methods"][MOBA].get("stages_ms")
        if stages:
            values = [stages[phase][stage] for phase in PHASES for stage in PHASES[phase]]
            lines.append([row["row"], *(f"{x:.2f}" for x in values)])
    return common.markdown(header, lines)


def table(results: dict) -> str:
    """Of one results file."""
    r, rows = results, results["rows"]
    measured = [x for row in rows for x in row["methods"].values() if "ms" in x]
    runs = sorted({x["runs"] for x in measured}) or [0]
    skipped = [
        f"{row['row']} {method}: {found['skipped']}."
        for row in rows
        for method, found in row["methods"].items()
        if "skipped" in found and found["skipped"] != NOT_ASKED
    ]
    stages = [f"{MOBA}, ms of the kernels of each stage in one call:", stages_table(rows)]
    if not any(row["methods"][MOBA].get("stages_ms") for row in rows):
        stages = ["No stages: torch.profiler saw no kernels."]
    queued = ["The same of short rows where the host is ahead:", queued_table(rows)]
    if not any("queued_ms" in found for found in measured):
        queued = []
    parts = [
        f"{r['gpu']}, driver {r['driver']}, CUDA {r['cuda']}, torch {r['torch']}, cuDNN "
        f"{r['cudnn']}, backend {r['backend']} on {r['flash_attention']}, {r['inputs']} inputs, "
        f"commit {r['commit']}; medians of {runs[0]} to {runs[-1]} runs:",
        times_table(rows),
        *(["Not measured: " + " ".join(skipped)] if skipped else []),
        *queued,
        *stages,
    ]
    return "\n\n".join(parts)


def tables() -> str:
    """Of all committed results, with what is common to them; nothing without results."""
    committed = common.read_results("attention.py")
    if not committed:
        return ""
    intro = (
        f"bfloat16, head_dim {HEAD_DIM}, one causal sequence; `python benchmarks/attention.py`. "
        "Forward includes the gate and saves what the backward needs; dense is PyTorch's full "
        "causal attention by cuDNN; extra GB is the peak of memory beyond inputs and results. "
        "Stages of groups that run at once overlap and add up to more than the time; attend of "
        "sm90's forward includes the merge, but for few rows in blocks of at most 128."
    )
    return "\n\n".join([intro, *(table(results) for results in committed.values())])


def check() -> int:
    """Says of every committed CUDA result whether these kernels made it; 1 if one is stale."""
    stale = 0
    made = {name: x for name, x in common.read_results("").items() if "kernels_sha256" in x}
    for name, results in made.items():
        same = results["kernels_sha256"] == common.kernels_sha256(results["backend"])
        stale += not same
        which = "these kernels" if same else "OTHER kernels: measure again"
        print(f"benchmarks/results/{name}, commit {results['commit']}: made by {which}")
    if not made:
        print("benchmarks/results has no results of CUDA kernels: nothing to check")
    return int(stale > 0)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--rows", type=common.row_names, default=[*ROWS], help=f"of {','.join(ROWS)} (all)")
    add("--backend", default="auto", help="of moba_attention_varlen (auto)")
    add("--inputs", choices=inputs.KINDS, default="random", help="benchmarks/inputs.py (random)")
    add("--repeats", type=common.positive, default=10, help=common.REPEATS_HELP)
    add("--name", default="attention", help="of the result file (attention)")
    add("--commit", help="of the kernels, where the tree has no .git")
    add("--no-dense", action="store_true", help="leave full attention out")
    add("--check", action="store_true", help="exit 1 if committed results are of other kernels")
    add("--readme", action="store_true", help="write README.md's tables")
    options = parser.parse_args(arguments)
    if not (options.check or options.readme):
        options.backend = common.require_gpu(parser, options.backend)
    return options


def main() -> None:
    options = parse()
    if options.check:
        sys.exit(check())
    if options.readme:
        common.put_into_readme("attention.py", tables())
        return
    results = run(options)
    print(table(results))
    if any("skipped" in row["methods"][MOBA] for row in results["rows"]):
        sys.exit("moba_ext itself failed in a row")


if __name__ == "__main__":
    main()
