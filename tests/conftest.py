from __future__ import annotations

import pytest
import torch

from moba_ext import flash, ops, varlen


def pytest_collection_modifyitems(items) -> None:
    """Tests marked ``gpu`` need a GPU and the CUDA library, those of sm90 a Hopper."""
    missing = ops.cuda_status() or (None if torch.cuda.is_available() else "no GPU is visible")
    no_sm90 = missing or ops.backend_status()["sm90"]
    for item in items:
        why_not = no_sm90 if item.path.name.startswith("test_sm90") else missing
        if why_not and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=why_not))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20250218)


@pytest.fixture(autouse=True)
def plans():
    """Plans are kept by sizes and workspace; tests change what else they depend on."""
    flash._plan.cache_clear()
    yield
    flash._plan.cache_clear()


@pytest.fixture
def poisoned():
    """Uninitialised memory is NaN (all ones for integers): what isn't written, shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def flash_attention(request, monkeypatch) -> str:
    """Which FlashAttention the flash backend calls: torch's own, which has every head_dim and both
    dtypes, or by indirect parametrization the one of the package flash-attn."""
    name = getattr(request, "param", "aten")
    if name == "aten":
        monkeypatch.setattr(varlen, "package", lambda: None)
    elif varlen.package() is None:
        pytest.skip("the package flash-attn is not installed")
    return name
