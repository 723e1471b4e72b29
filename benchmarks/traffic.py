"""GB that a forward and a backward move between the GPU and its memory, by hardware counters.

    python benchmarks/traffic.py [--rows C,G] [--backend sm90]      needs ncu, of the CUDA toolkit

One call each after one to warm up, under ``ncu``, which counts kernel by kernel and leaves the
caches as they are. Memsets are not counted.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from collections import Counter

import torch

from attention import Trial, moba
from common import ROWS, require_gpu, row_names

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


def call_once(name: str, phase: str, backend: str) -> None:
    """What ncu looks at: between the start and the stop of the profiler."""
    trial = Trial(moba(backend), ROWS[name], "random")
    trial.spans()
    tensors, dout = trial.draw()
    out = trial.forward(tensors) if phase == "backward" else None
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    if phase == "forward":
        trial.forward(tensors)
    else:
        torch.autograd.grad(out, tensors, dout)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def gigabytes(report: str) -> Counter:
    """By kernel, from ncu's raw page in CSV: names, a line of units, a line per launch."""
    header, units, *launches = csv.reader(x for x in report.splitlines() if x.startswith('"'))
    name, columns = header.index("Kernel Name"), [header.index(x) for x in METRICS]
    found: Counter = Counter()
    for launch in launches:
        kernel = re.search(r"\w+_kernel\b", launch[name])
        total = sum(float(launch[i].replace(",", "")) * UNITS[units[i]] for i in columns)
        found[kernel[0] if kernel else launch[name]] += total / 1e9
    return found


def measure(name: str, phase: str, backend: str) -> Counter:
    command = ["ncu", "--csv", "--page", "raw", "--cache-control", "none", "--clock-control"]
    command += ["none", "--profile-from-start", "off", "--metrics", ",".join(METRICS)]
    command += [sys.executable, __file__, "--call", f"{name},{phase}", "--backend", backend]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return gigabytes(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=row_names, default="C", help="(C)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    options = parser.parse_args()
    backend = require_gpu(parser, options.backend)
    if options.call:
        return call_once(*options.call.split(","), backend)
    if shutil.which("ncu") is None:
        parser.error("ncu is not in PATH: it comes with the CUDA toolkit")
    for name in options.rows:
        for phase in ("forward", "backward"):
            found = measure(name, phase, backend)
            parts = ", ".join(f"{kernel} {gb:.2f}" for kernel, gb in found.most_common())
            print(f"{name} {phase} {sum(found.values()):.2f} GB: {parts}", flush=True)


if __name__ == "__main__":
    main()
