from __future__ import annotations

import pytest
import torch

from moba_ext import ops


def pytest_collection_modifyitems(items) -> None:
    """Tests marked ``gpu`` need a GPU and the CUDA library."""
    missing = ops.cuda_status() or (None if torch.cuda.is_available() else "no GPU is visible")
    for item in items:
        if missing and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20250218)


@pytest.fixture
def poisoned():
    """Uninitialised memory is NaN (all ones for integers): what isn't written, shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
