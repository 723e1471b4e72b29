"""The build: what it says of itself, what the libraries need, one clear sentence per obstacle."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
import setuptools
import torch

from moba_ext import _C, ops

ROOT = Path(__file__).parents[1]
LIBRARIES = Path(ops.__file__).parent / "lib"
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"


def script(path: Path, text: str) -> Path:
    """An executable shell script that stands in for a tool."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def run(*command: object, **environment: str | None) -> subprocess.CompletedProcess:
    """Runs from the source tree; an environment variable set to None is removed."""
    env = {**os.environ, **environment}
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={name: value for name, value in env.items() if value is not None},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


# What was built


def test_build_info():
    info = _C.build_info()
    assert info["version"] == importlib.metadata.version("moba_ext")
    assert re.fullmatch(r"(GNU|Clang|AppleClang) \d+(\.\d+)+", info["cxx_compiler"])
    assert info["build_type"] == "Release"
    assert info["torch_target"] == "2.10"
    assert info["cpu_isas"][0] == "generic"
    assert _C.cpu_isa() in info["cpu_isas"]
    assert {f"libmoba_{name}.so" for name in info["libraries"]} == {
        path.name for path in LIBRARIES.iterdir()
    }
    has_cuda = "cuda" in info["libraries"]
    assert has_cuda == (info["cuda_toolkit"] is not None) == bool(info["cuda_archs"])


def test_info_command(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "moba_ext", "info"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in result.stdout.splitlines())
    assert lines["moba_ext"].startswith(_C.build_info()["version"])
    assert lines["torch"].startswith(torch.__version__)
    assert lines["CPU library"].endswith(f"; {_C.cpu_isa()} is used here")
    for name, reason in ops.backend_status().items():
        assert lines[name] == (f"unavailable: {reason}" if reason else "available")


def test_info_into_a_closed_pipe():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "moba_ext", "info"]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert result.returncode == 0 and result.stderr == ""


@pytest.mark.parametrize("library", [f"libmoba_{name}.so" for name in _C.build_info()["libraries"]])
def test_libraries_need_only_the_stable_abi(library):
    needed = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--demangle", LIBRARIES / library],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "aoti_torch_" in needed
    assert not re.findall(r".*\b(?:at|c10|torch)::.*", needed)


# The backend hook: torch is asked for only where there is none


@pytest.fixture
def bare_venv(tmp_path) -> Path:
    """A virtual environment with setuptools and nothing else."""
    venv.create(tmp_path / "venv", with_pip=False)
    packages = tmp_path / "venv" / "lib" / PYTHON / "site-packages"
    for name in ("setuptools", "_distutils_hack"):
        (packages / name).symlink_to(Path(setuptools.__file__).parents[1] / name)
    return tmp_path / "venv"


def put_torch(environment: Path, version: str) -> Path:
    folder = environment / "lib" / PYTHON / "site-packages" / "torch"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('the build must not import torch')\n")
    (folder / "version.py").write_text(f"from typing import Optional\n__version__ = '{version}'\n")
    return folder


def find_torch(environment: Path, **variables: str | None) -> subprocess.CompletedProcess:
    code = "from moba_build import *; from moba_build import _torch_requirement as r; print(r())"
    variables = {"VIRTUAL_ENV": None, "CONDA_PREFIX": None, **variables}
    variables["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT / "build_backend"), variables.get("PYTHONPATH")])
    )
    return run(environment / "bin" / "python", "-c", code, **variables)


def test_torch_is_required_where_there_is_none(bare_venv):
    assert find_torch(bare_venv).stdout.strip() == "['torch>=2.10']"


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.16.0.dev20260101+cu130", "3.0.1"])
def test_torch_of_the_environment_is_used(bare_venv, version):
    put_torch(bare_venv, version)
    assert find_torch(bare_venv).stdout.strip() == "[]"


def test_torch_is_found_under_build_isolation(bare_venv, tmp_path):
    """As pip does it: the environment's own packages are taken off sys.path."""
    packages = bare_venv / "lib" / PYTHON / "site-packages"
    put_torch(bare_venv, "2.13.0")
    isolated = tmp_path / "isolated"
    isolated.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        (packages / name).rename(isolated / name)
    (isolated / "sitecustomize.py").write_text(f"import sys\nsys.path.remove({str(packages)!r})\n")
    assert find_torch(bare_venv, PYTHONPATH=str(isolated)).stdout.strip() == "[]"


def test_torch_is_found_in_the_active_environment(bare_venv, tmp_path):
    """As `python -m build` does it: the build has a virtual environment of its own."""
    put_torch(tmp_path / "active", "2.13.0")
    assert find_torch(bare_venv, VIRTUAL_ENV=str(tmp_path / "active")).stdout.strip() == "[]"


def test_torch_too_old(bare_venv):
    folder = put_torch(bare_venv, "2.9.1+cu128")
    result = find_torch(bare_venv)
    assert result.returncode == 1
    assert result.stdout == (
        f"moba_ext needs torch >= 2.10, but {folder.parent} has torch 2.9.1+cu128: "
        'run `pip install -U "torch>=2.10"` first.\n'
    )


# Tools that setup.py needs


def build_ext(environment: Path, path: str) -> str:
    """Last line of what a build says with nothing but ``path`` to find tools on."""
    variables = {"PATH": path, "VIRTUAL_ENV": None, "CONDA_PREFIX": None}
    result = run(environment / "bin" / "python", "setup.py", "-q", "build_ext", **variables)
    assert result.returncode == 1
    assert "Traceback" not in result.stdout
    return result.stdout.splitlines()[-1]


def test_torch_missing_without_isolation(bare_venv):
    assert build_ext(bare_venv, "/nonexistent") == (
        "moba_ext needs torch to build, and this environment has none: "
        'run `pip install "torch>=2.10"`, or leave out --no-build-isolation.'
    )


def test_cmake_missing(bare_venv):
    put_torch(bare_venv, "2.13.0")
    assert build_ext(bare_venv, "/nonexistent") == (
        "moba_ext needs cmake >= 3.24 to build, and none was found: "
        'run `pip install -U "cmake>=3.24"`.'
    )


def test_cmake_too_old(bare_venv, tmp_path):
    put_torch(bare_venv, "2.13.0")
    cmake = script(tmp_path / "tools" / "cmake", "echo 'cmake version 3.18.4'")
    assert build_ext(bare_venv, str(cmake.parent)) == (
        f"moba_ext needs cmake >= 3.24 to build, and {cmake} is 3.18.4: "
        'run `pip install -U "cmake>=3.24"`.'
    )


def test_ninja_missing(bare_venv, tmp_path):
    put_torch(bare_venv, "2.13.0")
    cmake = script(tmp_path / "tools" / "cmake", "echo 'cmake version 3.31.0'")
    assert build_ext(bare_venv, str(cmake.parent)) == (
        "moba_ext needs ninja >= 1.10 to build, and none was found: "
        'run `pip install -U "ninja>=1.10"`.'
    )


def test_pybind11_missing(bare_venv, tmp_path):
    put_torch(bare_venv, "2.13.0")
    for tool in ("cmake", "ninja"):
        script(tmp_path / "tools" / tool, "echo 3.31.0")
    assert build_ext(bare_venv, str(tmp_path / "tools")) == (
        "moba_ext needs pybind11 to build, which is missing: run `pip install pybind11`."
    )


# The C++ compiler


def cmake(*arguments: object, **variables: str | None) -> subprocess.CompletedProcess:
    """CMake's output with its line breaks turned into spaces."""
    folders = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])
    result = run(shutil.which("cmake", path=folders), *arguments, **variables)
    result.stdout = re.sub(r"\s+", " ", result.stdout)
    return result


def test_compiler_missing(tmp_path):
    result = cmake("-S", ROOT, "-B", tmp_path, "-G", "Ninja", CXX="/nonexistent/g++")
    assert result.returncode == 1
    assert (
        "moba_ext needs a C++ compiler, and none was found: install g++ 11 or newer "
        "(`apt install g++`), or name one in the environment variable CXX."
    ) in result.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="imitates an old g++ with a new one")
def test_compiler_too_old(tmp_path):
    old = script(tmp_path / "g++", 'exec g++ -U__GNUC__ -D__GNUC__=9 "$@"')
    result = cmake("-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", CXX=str(old))
    assert result.returncode == 1
    assert (
        f"moba_ext needs C++20, that is g++ 11 or clang 14 at least, but {old} is GNU 9."
    ) in result.stdout
    assert (": install a newer one and name it in the environment variable CXX.") in result.stdout


# Whether the CUDA library is built: cmake/cuda.cmake decides before it needs a compiler

NVCC = """case "$1" in
--version) echo 'Cuda compilation tools, release {release}, V{release}.1' ;;
--list-gpu-arch) echo compute_75 compute_80 compute_90 compute_100 ;;
esac"""


def decide_cuda(
    tmp_path: Path, nvcc: str | None, gpu: str | None = None, **options: str
) -> tuple[int, str]:
    """Exit status and output of cuda.cmake, on a machine with nothing but these tools."""
    tools = tmp_path / "tools"
    tools.mkdir()
    if nvcc:
        script(tools / "nvcc", nvcc)
    if gpu:
        script(tools / "nvidia-smi", gpu)
    # A toolkit in /usr/local/cuda would be found as well.
    options["CMAKE_IGNORE_PATH"] = "/usr/local/cuda/bin;/usr/local/bin;/usr/bin;/bin"
    defines = [f"-D{name}={value}" for name, value in options.items()]
    variables = {"PATH": str(tools), "CUDACXX": None, "CUDA_HOME": None}
    result = cmake(*defines, "-P", ROOT / "cmake" / "cuda.cmake", **variables)
    return result.returncode, result.stdout


def test_cuda_is_left_out_without_gpu_and_nvcc_is_not_run(tmp_path):
    """A machine without a GPU never waits for nvcc: this one would hang."""
    status, output = decide_cuda(tmp_path, nvcc="sleep 1000")
    assert status == 0
    assert output.strip() == (
        "-- moba_ext: no CUDA library (no GPU is visible); to get it, "
        "set MOBA_CUDA=1 and install again."
    )


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        ("echo 7.5", "the GPU has compute capability 7.5, and 8.0 is the least supported"),
        ("echo No devices were found", "no GPU is visible"),
        ("echo NVML library version: 535.183; exit 18", "no GPU is visible"),
    ],
)
def test_cuda_is_left_out_without_usable_gpu(tmp_path, gpu, reason):
    status, output = decide_cuda(tmp_path, nvcc="sleep 1000", gpu=gpu)
    assert status == 0
    assert f"moba_ext: no CUDA library ({reason}); to get it" in output


def test_cuda_is_left_out_with_gpu_but_no_nvcc(tmp_path):
    status, output = decide_cuda(tmp_path, nvcc=None, gpu="echo 9.0")
    assert status == 0
    assert (
        "no CUDA library (a GPU is visible but no nvcc was found); to get it, "
        "install the CUDA toolkit, set MOBA_CUDA=1 and install again."
    ) in output


def test_cuda_is_left_out_when_told(tmp_path):
    status, output = decide_cuda(tmp_path, nvcc="sleep 1000", gpu="sleep 1000", MOBA_CUDA="0")
    assert status == 0
    assert "moba_ext: no CUDA library (MOBA_CUDA=0); to get it, set MOBA_CUDA=1" in output


@pytest.mark.parametrize(
    ("gpu", "options", "archs"),
    [
        ("echo 9.0; echo 9.0", {}, "90a"),
        ("echo 8.0; echo 7.5; echo 10.0", {}, "80;100"),
        (None, {"MOBA_CUDA": "1"}, "80;90a"),
        ("echo 10.0", {"MOBA_CUDA": "1"}, "80;90a"),
        ("sleep 1000", {"MOBA_CUDA_ARCHS": "90a"}, "90a"),
        (None, {"MOBA_CUDA": "1", "MOBA_CUDA_ARCHS": "100;80"}, "100;80"),
    ],
)
def test_cuda_architectures(tmp_path, gpu, options, archs):
    """What is decided; that it also compiles is for .ci/run."""
    _, output = decide_cuda(tmp_path, NVCC.format(release="12.8"), gpu, **options)
    assert f"-- moba_ext: CUDA library for {archs} with nvcc 12.8 " in output


@pytest.mark.parametrize(
    ("nvcc", "gpu", "options", "sentence"),
    [
        (
            None,
            None,
            {"MOBA_CUDA": "yes"},
            "moba_ext does not know MOBA_CUDA=yes: set it to 1 (build the CUDA library) or 0 "
            "(leave it out), or unset it (build it where a GPU is visible).",
        ),
        (
            None,
            None,
            {"MOBA_CUDA": "0", "MOBA_CUDA_ARCHS": "90a"},
            "moba_ext was told MOBA_CUDA=0 and MOBA_CUDA_ARCHS=90a, which contradict each other: "
            "unset one of them.",
        ),
        (
            None,
            None,
            {"MOBA_CUDA": "1"},
            "moba_ext was asked for its CUDA library, and no nvcc was found: install the CUDA "
            "toolkit 12.5 or newer and put nvcc on PATH (or name it in CUDACXX), or set "
            "MOBA_CUDA=0.",
        ),
        (
            NVCC.format(release="12.4"),
            "echo 9.0",
            {},
            "moba_ext needs nvcc 12.5 or newer, but {nvcc} is 12.4: install a newer CUDA toolkit "
            "and name its nvcc in CUDACXX, or set MOBA_CUDA=0.",
        ),
        (
            "exit 1",
            None,
            {"MOBA_CUDA": "1"},
            "moba_ext could not run {nvcc} --version: repair the CUDA toolkit or name another nvcc "
            "in CUDACXX, or set MOBA_CUDA=0 to do without the CUDA library.",
        ),
        (
            NVCC.format(release="12.8"),
            None,
            {"MOBA_CUDA_ARCHS": "90a;75"},
            'moba_ext cannot build for CUDA architecture "75": set MOBA_CUDA_ARCHS to a list such '
            'as "80;90a", of 80 and up, that nvcc 12.8 knows (75;80;90;100).',
        ),
        (
            NVCC.format(release="12.8"),
            None,
            {"MOBA_CUDA_ARCHS": "hopper"},
            'moba_ext cannot build for CUDA architecture "hopper": set MOBA_CUDA_ARCHS to a list '
            'such as "80;90a", of 80 and up, that nvcc 12.8 knows (75;80;90;100).',
        ),
    ],
)
def test_cuda_obstacles(tmp_path, nvcc, gpu, options, sentence):
    status, output = decide_cuda(tmp_path, nvcc, gpu, **options)
    assert status == 1
    assert sentence.format(nvcc=tmp_path / "tools" / "nvcc") in output


# Packages


def test_sdist_has_every_source(tmp_path):
    command = [
        sys.executable,
        "-m",
        "build",
        "--sdist",
        "--no-isolation",
        "--outdir",
        tmp_path,
        ROOT,
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    sources += [*(ROOT / "moba_ext").glob("*.py"), *(ROOT / "tests").glob("*.py")]
    sources += [ROOT / "CMakeLists.txt", ROOT / "cmake" / "cuda.cmake", ROOT / "LICENSE"]
    sources += [ROOT / "build_backend" / "moba_build.py"]
    assert packed.issuperset(str(path.relative_to(ROOT)) for path in sources)
    assert not [name for name in packed if name.endswith(".so")]
