"""``python -m moba_ext info``: how this package was built, and what works on this machine."""

import argparse
import os
import platform
import sys
from pathlib import Path

import torch

from . import _C, ops


def info() -> str:
    """The report, one ``name value`` pair per line, one line per backend at the end."""
    build = _C.build_info()
    cuda = "not built"
    if "cuda" in build["libraries"]:
        cuda = f"for {' '.join(build['cuda_archs'])}, toolkit {build['cuda_toolkit']}"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    status = {**ops.backend_status(), "CUDA ops": ops.cuda_status()}
    lines = {
        "moba_ext": f"{build['version']} in {Path(__file__).parent}",
        "built by": f"{build['cxx_compiler']}, {build['build_type']}",
        "built for": f"torch >= {build['torch_target']}",
        "CPU library": f"{' '.join(build['cpu_isas'])}; {_C.cpu_isa()} is used here",
        "CUDA library": cuda,
        "Python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "GPUs": ", ".join(devices) or "none",
        **{name: f"unavailable: {why}" if why else "available" for name, why in status.items()},
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moba_ext", description=__doc__)
    parser.add_argument("command", choices=["info"])
    parser.parse_args()
    try:
        print(info(), flush=True)
    except BrokenPipeError:  # whoever reads, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit


if __name__ == "__main__":
    main()
