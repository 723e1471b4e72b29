"""README says only what is true: its example runs, its table is that of the committed results."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_example_of_the_functions_runs():
    section = README.split("## The functions")[1].split("## In Transformers")[0]
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", section, re.S)[1], names)
    assert names["out"].shape == (4096, 8, 64) and names["lse"].shape == (8, 4096)
    assert names["chosen"].block_ids.shape == (4096, 8, 2) and names["q"].grad.isfinite().all()
    assert names["mask"].shape == (4096, 8, 7)  # the longer sequence has 3,096 keys


def test_table_is_generated_from_the_committed_results():
    spec = importlib.util.spec_from_file_location("cpu", ROOT / "benchmarks" / "cpu.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert benchmark.tables() in README, "run python benchmarks/cpu.py --readme"
