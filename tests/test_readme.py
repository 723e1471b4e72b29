"""README says only what is true: the example runs, tables are those of the committed results."""

import re
from pathlib import Path

import pytest

import attention
import cpu
import crossover
import layer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_example_of_the_functions_runs():
    section = README.split("## The functions")[1].split("## In Transformers")[0]
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", section, re.S)[1], names)
    assert names["out"].shape == (4096, 8, 64) and names["lse"].shape == (8, 4096)
    assert names["chosen"].block_ids.shape == (4096, 8, 2) and names["q"].grad.isfinite().all()
    assert names["mask"].shape == (4096, 8, 7)  # the longer sequence has 3,096 keys


@pytest.mark.parametrize("benchmark", [cpu, attention, crossover, layer])
def test_tables_are_generated_from_the_committed_results(benchmark):
    script = Path(benchmark.__file__).name
    section = README.split(f"<!-- benchmarks/{script} begin -->\n")[1]
    section = section.split(f"\n<!-- benchmarks/{script} end -->")[0]
    assert section == benchmark.tables(), f"run python benchmarks/{script} --readme"
