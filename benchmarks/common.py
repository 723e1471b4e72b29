"""What the benchmarks share: the rows, timing with CUDA events, facts of a run, result files."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch

import moba_ext
from moba_ext import ops, varlen

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HEAD_DIM = 128
REPEATS_HELP = "runs; at least 3 if over 3 s, more if under 0.2 s (10)"


class Row(NamedTuple):
    """One causal sequence, bfloat16, head_dim 128."""

    tokens: int
    heads_q: int
    heads_k: int
    block_size: int
    topk: int


ROWS = {
    "S2K": Row(2_048, 16, 16, 128, 8),
    "S4K": Row(4_096, 16, 16, 128, 8),
    "A": Row(8_192, 16, 16, 128, 8),
    "B": Row(32_768, 16, 16, 128, 8),
    "C": Row(131_072, 16, 16, 128, 8),
    "D": Row(524_288, 16, 16, 128, 8),
    "E": Row(32_768, 16, 16, 512, 3),
    "F": Row(131_072, 16, 16, 512, 3),
    "G": Row(131_072, 16, 16, 2_048, 3),
    "H": Row(32_768, 32, 8, 128, 8),
    "I": Row(131_072, 32, 8, 4_096, 12),
    "1M": Row(1_048_576, 32, 8, 128, 8),
}


def row_names(text: str) -> list[str]:
    """Parses A,C."""
    names = text.split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        known = ", ".join(ROWS)
        raise argparse.ArgumentTypeError(f"has {', '.join(unknown)}, must be of {known}")
    return names


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text}")
    return int(text)


def require_gpu(parser: argparse.ArgumentParser, backend: str) -> str:
    """What the backend resolves to, an error of the command line unless it can run here."""
    if not torch.cuda.is_available():
        parser.error("measuring needs a GPU that torch can see")
    try:
        return ops.resolve_backend(backend, "cuda", torch.bfloat16, HEAD_DIM)[0]
    except ValueError as error:
        parser.error(f"--{error}")


def command_line(name: str, doc: str, run: Callable, table: Callable, tables: Callable) -> None:
    """What benchmarks/<name>.py does when called: measure and print a table, or write README's."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    add = parser.add_argument
    add("--backend", default="auto", help="of moba_ext (auto)")
    add("--repeats", type=positive, default=10, help=REPEATS_HELP)
    add("--name", default=name, help=f"of the result file ({name})")
    add("--commit", help="of the kernels, where the tree has no .git")
    add("--readme", action="store_true", help="write README.md's tables")
    options = parser.parse_args()
    if options.readme:
        put_into_readme(f"{name}.py", tables())
        return
    options.backend = require_gpu(parser, options.backend)
    print(table(run(options)))


def span(function: Callable) -> tuple[tuple, object]:
    """The CUDA events before and after a call, and what it returned."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result = function()
    end.record()
    return (begin, end), result


def medians(
    once: Callable, runs: int = 10, seconds: float = 3.0, least: float = 0.2
) -> tuple[dict, int]:
    """Medians, in ms, of the spans that ``once()`` returns by name; and the number of runs.

    Up to three runs warm up, as long as they began within a second. Then come ``runs`` runs, fewer
    (but three) when they take more than ``seconds``, and more when they take less than ``least``,
    as the host's part varies from run to run. Nothing waits for the device inside a run.
    """
    begin = time.perf_counter()
    for _ in range(3):
        once()
        torch.cuda.synchronize()
        if time.perf_counter() - begin > 1:
            break
    times: list[dict] = []
    begin, took = time.perf_counter(), 0.0
    while took < least or (len(times) < runs and (len(times) < 3 or took < seconds)):
        times.append(_milliseconds(once))
        took = time.perf_counter() - begin
    return _median_of_each(times), len(times)


def in_turns(onces: dict[str, Callable], least: float = 0.3) -> dict[str, tuple[dict, int]]:
    """The same by name, of what is warm: five runs each and one before them that does not count, in
    an order that is drawn anew every time, for ``least`` seconds each.

    Short runs can only be compared in turns: the host's part differs by half from second to second.
    Several runs make a turn, as code that the other one has driven out of the processor's caches
    comes back with the first; dense attention has less of it to lose.
    """
    order, draw = list(onces), random.Random(0)
    times: dict[str, list[dict]] = {name: [] for name in onces}
    begin = time.perf_counter()
    while time.perf_counter() - begin < least * len(onces):
        draw.shuffle(order)
        for name in order:
            _, *turn = (_milliseconds(onces[name]) for _ in range(6))
            times[name] += turn
    return {name: (_median_of_each(runs), len(runs)) for name, runs in times.items()}


def _milliseconds(once: Callable) -> dict[str, float]:
    spans = once()
    torch.cuda.synchronize()
    return {name: first.elapsed_time(last) for name, (first, last) in spans.items()}


def _median_of_each(times: list[dict]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in times) for name in times[0]}


def queued(call: Callable, runs: int = 20) -> float:
    """Median ms of calls that wait in the device's queue, where no call waits for the host."""
    call()
    for doubled in range(8):
        begin, *events = (torch.cuda.Event(enable_timing=True) for _ in range(runs + 2))
        torch.cuda.synchronize()
        began = time.perf_counter()
        begin.record()
        torch.cuda._sleep(10**7 << doubled)
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        host = 1e3 * (time.perf_counter() - began)
        torch.cuda.synchronize()
        if host < begin.elapsed_time(events[0]):
            return statistics.median(x.elapsed_time(y) for x, y in zip(events, events[1:]))
    raise RuntimeError(f"the host took {host:.0f} ms to launch {runs} calls, longer than the wait")


def commit(*paths: str) -> str:
    """HEAD, "unknown" outside of a checkout; a plus sign if paths have changed since."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", *paths], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if changed else "")


def kernels_sha256(backend: str) -> str:
    """Of the names and contents of what decides the speed of a backend on CUDA."""
    kinds = (".cu", ".cuh", ".cpp", ".h")
    files = [file for file in (ROOT / "csrc/cuda").rglob("*") if file.suffix in kinds]
    if backend == "flash":  # its gate on a Hopper includes two files of sm90
        gate = [ROOT / "csrc/cuda/sm90" / name for name in ("gate_scores.cuh", "ptx.cuh")]
        files = [file for file in files if "sm90" not in file.relative_to(ROOT).parts] + gate
    else:
        files.append(ROOT / "moba_ext/sm90.py")
    files.append(ROOT / "csrc/params.h")
    files += [ROOT / "moba_ext" / name for name in ("flash.py", "groups.py", "varlen.py")]
    total = hashlib.sha256()
    for file in sorted(files):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        total.update(f"{content} {file.relative_to(ROOT).as_posix()}\n".encode())
    return total.hexdigest()


def facts(command: str, backend: str, commit_name: str | None) -> dict:
    """Where, by what and of what CUDA results are; commit_name where the tree has no .git."""
    flash_attention = "the FlashAttention 2 inside torch"
    if varlen.package() is not None:
        flash_attention = f"flash-attn {import_module('flash_attn').__version__}"
    return {
        "command": command,
        "commit": commit_name or commit("csrc", "moba_ext"),
        "kernels_sha256": kernels_sha256(backend),
        "backend": backend,
        "gpu": torch.cuda.get_device_name(),
        "driver": driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "moba_ext": moba_ext.__version__,
        "flash_attention": flash_attention,
    }


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(query, text=True).split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def write_results(name: str, results: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


def read_results(script: str) -> dict[str, dict]:
    """Committed results of ``benchmarks/<script>``, or of all for "", by file name."""
    found = {file.name: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))}
    command = f"python benchmarks/{script}"
    return {name: results for name, results in found.items() if command in results["command"]}


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table."""
    first, *others = ("| " + " | ".join(row) + " |" for row in (header, *lines))
    return "\n".join([first, "|" + "---|" * len(header), *others])


def put_into_readme(script: str, text: str) -> None:
    """Replace what stands between the marks of ``benchmarks/<script>``."""
    readme = ROOT / "README.md"
    begin, end = (f"<!-- benchmarks/{script} {mark} -->" for mark in ("begin", "end"))
    before, rest = readme.read_text().split(begin)
    readme.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")
