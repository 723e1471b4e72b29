"""The yardsticks of the flash backend's tests against each other, on a CPU."""

import flash_checks
import pytest
import torch
from flash_checks import (
    INPUTS,
    assert_tiles_within_budget,
    check_samples,
    exact_and_plain,
    upstream,
)
from numerics import Case, self_attention

CASES = [
    Case([130, 0, 61, 40, 9], [130, 20, 90, 25, 0], 4, 2, 16, 16, 3),
    self_attention([70, 33], 2, 1, 8, 8, 1),
    self_attention([50, 9], 2, 2, 8, 16, 9),
]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(flash_checks, "DEVICE", "cpu")


@pytest.mark.parametrize("case", CASES)
def test_sampled_rows_and_keys_are_those_of_masked_attention(case, monkeypatch):
    """check_samples computes in float64 what exact_and_plain has of the same rows and keys."""
    calls, sampled = [], flash_checks._sampled

    def spy(*args):
        calls.append((args, sampled(*args)))
        return calls[-1][1]

    monkeypatch.setattr(flash_checks, "_sampled", spy)
    for name in ("_assert_numbers", "_check_sum_of_dv"):  # budgets of 16-bit kernels
        monkeypatch.setattr(flash_checks, name, lambda *_: None)
    inputs, douts = INPUTS["random"](case, torch.float32), upstream(case, torch.float32)
    blocks = [(b, j) for b, n in enumerate(case.lengths_k) for j in range(-(-n // case.block_size))]
    got = check_samples(case, inputs, blocks, douts, backend="cpu")
    exact, _ = exact_and_plain(case, inputs, got.ids, douts, case.head_dim**-0.5)
    (_, queries, heads, places, dtype), (out, lse, dq, *of_keys) = calls[0]
    assert dtype == torch.float64 and len(queries) == 256 * case.heads_q and len(places) > 2
    for x, wanted in ((out, exact[0]), (lse, exact[1].T), (dq, exact[2])):
        torch.testing.assert_close(x, wanted[queries, heads])
    begins = torch.tensor([0, *case.lengths_k]).cumsum(0).tolist()
    for parts, wanted in zip(of_keys, exact[3:]):
        for x, (b, j, h) in zip(parts, places):
            first = begins[b] + j * case.block_size
            last = min(first + case.block_size, begins[b + 1])
            torch.testing.assert_close(x, wanted[first:last, h])


def test_a_tile_of_small_values_has_its_own_budget():
    exact = torch.ones(200, 2, 8, dtype=torch.float64)
    exact[64:] = 1e-3
    plain = exact.bfloat16()
    assert_tiles_within_budget(plain, exact, plain, "x")
    wrong = plain.clone()
    wrong[128:192, 1] *= 1.1
    with pytest.raises(AssertionError, match="error of a tile"):
        assert_tiles_within_budget(wrong, exact, plain, "x")


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", ["ids", "lse", "dq", "dk", "dv"])
def test_checks_see_a_wrong_result(kind, name, monkeypatch):
    case = self_attention(900, 2, 1, 64, 32, 4)
    right = flash_checks.run

    def run(*args, **kwargs):
        result = right(*args, **kwargs)
        wrong = getattr(result, name).clone()
        if name == "ids":
            wrong[-1, 0] = torch.arange(3)
        elif name == "lse":
            wrong[:, -1] += 1e-3
        else:
            wrong[-4:] = 0
        return result._replace(**{name: wrong})

    inputs = INPUTS[kind](case, torch.bfloat16)
    check_samples(case, inputs, [(0, 0), (0, 28)], backend="cpu")
    monkeypatch.setattr(flash_checks, "run", run)
    with pytest.raises(AssertionError):
        check_samples(case, inputs, [(0, 0), (0, 28)], backend="cpu")
