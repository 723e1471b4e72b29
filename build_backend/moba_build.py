"""PEP 517 backend: setuptools, plus torch as a build requirement only where there is none.

Compiling needs torch's headers and the name of its library, not a running torch, and the stable ABI
makes any torch >= 2.10 as good as another. So the torch of the environment that is being installed
into serves the build, although an isolated build cannot import it; nothing is downloaded twice.
"""

import os
import re
import site
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403
from setuptools.build_meta import get_requires_for_build_editable as _requires_editable
from setuptools.build_meta import get_requires_for_build_wheel as _requires_wheel

MINIMUM_TORCH = (2, 10)


def _site_packages() -> list[str]:
    """Where the environment's packages lie, also when build isolation keeps them off sys.path."""
    folders = site.getsitepackages()
    if sys.prefix == sys.base_prefix:
        folders.append(site.getusersitepackages())
    # `python -m build` makes an environment of its own; these name the one it was called from.
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if prefix := os.environ.get(variable):
            folders.append(str(Path(prefix, "lib", python, "site-packages")))
    return folders


def find_torch() -> tuple[Path, str] | None:
    """``(folder of the package, its version)`` of the torch to build against, None without one.

    Raises SystemExit when that torch is too old.
    """
    spec = PathFinder.find_spec("torch", [*sys.path, *_site_packages()])
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    text = (folder / "version.py").read_text()
    version = re.search(r"^__version__ = ['\"]([^'\"]+)", text, re.MULTILINE).group(1)
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
        minimum = ".".join(map(str, MINIMUM_TORCH))
        raise SystemExit(
            f"moba_ext needs torch >= {minimum}, but {folder.parent} has torch {version}: "
            f'run `pip install -U "torch>={minimum}"` first.'
        )
    return folder, version


def _torch_requirement() -> list[str]:
    return [] if find_torch() else ["torch>=" + ".".join(map(str, MINIMUM_TORCH))]


def get_requires_for_build_wheel(config_settings=None):
    return _requires_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return _requires_editable(config_settings) + _torch_requirement()
