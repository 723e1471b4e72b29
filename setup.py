"""Runs CMake, which describes the whole build, and puts its libraries into the package."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "build_backend"))
# Importable only from here on: the in-tree build backend is not an installed package.
from moba_build import find_torch  # noqa: E402


def find_tool(name: str, minimum: str) -> tuple[str, str]:
    """``(path, version)`` of the first command ``name`` that is new enough, activated or not."""
    seen = "none was found"
    folders = [*os.environ.get("PATH", "").split(os.pathsep), sysconfig.get_path("scripts")]
    for tool in filter(None, (shutil.which(name, path=folder) for folder in folders)):
        output = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"\d+(\.\d+)+", output)
        if version and [*map(int, version[0].split("."))] >= [*map(int, minimum.split("."))]:
            return tool, version[0]
        seen = f"{tool} is {version[0]}" if version else f"{tool} does not run"
    raise SystemExit(
        f"moba_ext needs {name} >= {minimum} to build, and {seen}: "
        f'run `pip install -U "{name}>={minimum}"`.'
    )


def pybind11_cmake_dir() -> str:
    try:
        import pybind11
    except ImportError:
        raise SystemExit(
            "moba_ext needs pybind11 to build, which is missing: run `pip install pybind11`."
        ) from None
    return pybind11.get_cmake_dir()


class CMakeBuild(build_ext):
    """Configures, compiles and installs; the CMake folder is kept, so that rebuilding is quick."""

    def run(self) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit(
                "moba_ext needs torch to build, and this environment has none: "
                'run `pip install "torch>=2.10"`, or leave out --no-build-isolation.'
            )
        (cmake, cmake_version), (ninja, _) = find_tool("cmake", "3.24"), find_tool("ninja", "1.10")
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "moba_ext"
        folder = ROOT / "build" / sys.implementation.cache_tag
        options = {
            "CMAKE_INSTALL_PREFIX": package,
            "CMAKE_MAKE_PROGRAM": ninja,
            "MOBA_CUDA": os.environ.get("MOBA_CUDA", ""),
            "MOBA_CUDA_ARCHS": os.environ.get("MOBA_CUDA_ARCHS", ""),
            "MOBA_TORCH_DIR": torch[0],
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11_cmake_dir(),
        }
        # CMake keeps the compilers that it found once: what chose them must not have changed.
        variables = ("CXX", "CXXFLAGS", "CUDACXX", "CUDA_HOME")
        chosen_by = [cmake_version, shutil.which("nvcc") or ""]
        chosen_by += [os.environ.get(name, "") for name in variables]
        stamp = folder / "compilers.txt"
        same = stamp.is_file() and stamp.read_text().split("\n") == chosen_by
        stamp.unlink(missing_ok=True)
        configure = subprocess.run(
            [cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", *([] if same else ["--fresh"])]
            + [f"-D{name}={value}" for name, value in options.items()],
            stderr=subprocess.PIPE,
            text=True,
        )
        if configure.returncode:
            # CMake wraps what CMakeLists.txt has to say: one sentence, all that a reader needs.
            ours = re.search(r"^ +(moba_ext .*?)\n(\n|Call Stack)", configure.stderr, re.S | re.M)
            raise SystemExit(re.sub(r"\s+", " ", ours[1]) if ours else configure.stderr)
        sys.stderr.write(configure.stderr)
        stamp.write_text("\n".join(chosen_by))
        if subprocess.run([cmake, "--build", folder, "--target", "install"]).returncode:
            raise SystemExit("moba_ext did not compile: the compiler's messages are above.")
        installed = (folder / "install_manifest.txt").read_text().split("\n")
        for library in package.glob("lib/*.so"):
            if str(library) not in installed:
                library.unlink()

    def get_outputs(self) -> list[str]:
        return [str(path) for path in Path(self.build_lib, "moba_ext").glob("**/*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension("moba_ext._C", [])], cmdclass={"build_ext": CMakeBuild})
