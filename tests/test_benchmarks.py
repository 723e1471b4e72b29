"""The GPU benchmark, as far as it goes without a GPU: inputs, tables, --check, a run of it."""

import argparse
import functools
import json
import re
import statistics
import time
from pathlib import Path

import pytest
import torch

import attention
import common
import flash_alone
import inputs
import moba_ext
import traffic

BLOCK = 32
SIZES = 64 * BLOCK, 4, 2, 64, BLOCK, 4


def draw(kind: str, dtype=torch.float32):
    return inputs.draw(kind, *SIZES, dtype=dtype, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", inputs.KINDS)
def test_shapes_of_inputs(kind, dtype):
    q, k, v = draw(kind, dtype)
    assert q.shape == (64 * BLOCK, 4, 64) and k.shape == v.shape == (64 * BLOCK, 2, 64)
    assert all(x.dtype == dtype and x.is_contiguous() and x.isfinite().all() for x in (q, k, v))
    assert v.mean().abs() < 0.02 and abs(v.std() - 1) < 0.02


def test_kind_of_inputs_must_be_known():
    with pytest.raises(ValueError, match="'warm', must be one of random, correlated, hot, hottest"):
        draw("warm")


def test_random_inputs_are_standard_normal():
    for x in draw("random")[:2]:
        assert x.mean().abs() < 0.02 and abs(x.std() - 1) < 0.02


def test_correlated_keys_share_a_topic_per_block():
    k = draw("correlated")[1].unflatten(0, (64, BLOCK))
    topic = k.mean(1)  # [blocks, heads, head_dim], 4 * u with noise 0.5 / sqrt(BLOCK) per element
    assert abs(topic.norm(dim=-1).mean() - 4) < 0.2
    assert abs((k - topic[:, None]).std() - 0.5 * (1 - 1 / BLOCK) ** 0.5) < 0.01
    alike = torch.cosine_similarity(topic[:, None], topic[None], dim=-1) > 0.8  # [64, 64, heads]
    assert alike[..., 0].equal(alike[..., 1]) and 64 < alike[..., 0].sum() < 64 + 64 * 6


def test_correlated_queries_keep_their_topic_and_find_its_blocks():
    topics = inputs.query_topics(200_000, "cpu")
    assert topics.min() >= 0 and topics.max() < inputs.TOPICS and len(topics.unique()) > 60
    # Of the changes, one in 64 leads to the same topic.
    mean = len(topics) / (1 + int((topics[1:] != topics[:-1]).sum()))
    assert 225 < mean < 300
    for kind, share in (("correlated", 0.9), ("random", 0)):
        q, k, _ = inputs.draw(kind, 512 * BLOCK, *SIZES[1:], dtype=torch.float32, device="cpu")
        scores = moba_ext.select_blocks(q, k, block_size=BLOCK, topk=2).scores[256 * BLOCK :]
        found = (scores > 10).float().mean()  # 4 * 4 where a past block has the query's topic
        assert share <= found <= share + 0.1


@pytest.mark.parametrize(("kind", "hot_blocks"), [("hot", 1), ("hottest", 3)])
def test_nearly_every_query_chooses_the_hot_blocks(kind, hot_blocks):
    q, k, _ = draw(kind, torch.bfloat16)
    chosen = moba_ext.select_blocks(q, k, block_size=BLOCK, topk=4).block_ids
    for block in range(4):
        later = (chosen == block)[4 * BLOCK :].any(-1).float().mean()
        assert later > 0.99 if block < hot_blocks else later < 0.5
    hot, cold = (x.mean((0, 1)).norm() for x in (k[: hot_blocks * BLOCK, :1], k[-BLOCK:, :1]))
    assert abs(hot - 8) < 2 and cold < 3


GATE = ("csrc/cuda/sm90/gate_scores.cuh", "csrc/cuda/sm90/ptx.cuh")  # of flash too


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A checkout with kernels and a README, without results."""
    for name in ("csrc/cuda/deep", "csrc/cuda/sm90", "benchmarks/results", "moba_ext"):
        (tmp_path / name).mkdir(parents=True)
    kernels = ("csrc/cuda/a.cu", "csrc/cuda/deep/b.cuh", "csrc/params.h", *GATE)
    modules = (f"moba_ext/{name}.py" for name in ("flash", "groups", "sm90", "varlen"))
    for name in (*kernels, *modules):
        (tmp_path / name).write_text(name)
    marks = "<!-- benchmarks/attention.py begin -->\n\n<!-- benchmarks/attention.py end -->"
    (tmp_path / "README.md").write_text(f"before\n{marks}\nafter\n")
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "benchmarks/results")
    return tmp_path


def results() -> dict:
    """As a run of rows A and 1M writes them."""
    moba = {
        "ms": {"forward": 0.8, "backward": 2.0},
        "runs": 10,
        "extra_bytes": {"forward": 500_000_000, "backward": 1_250_000_000},
        "queued_ms": {"forward": 0.25, "backward": 0.5},
        "stages_ms": {
            phase: {**dict.fromkeys(attention.STAGES, 0.125), "attend": 0.5}
            for phase in attention.PHASES
        },
    }
    dense = {
        "ms": {"forward": 1.6, "backward": 1.0},
        "runs": 3,
        "extra_bytes": {"forward": 1, "backward": 2},
    }
    rows = []
    for name, yardstick in (("A", dense), ("1M", {"skipped": "takes minutes"})):
        methods = {attention.MOBA: moba, attention.DENSE: yardstick}
        rows.append({"row": name, **common.ROWS[name]._asdict(), "methods": methods})
    names = ("gpu", "driver", "cuda", "torch", "cudnn", "flash_attention", "commit")
    return {
        **{name: f"some {name}" for name in names},
        **{"command": "python benchmarks/attention.py", "inputs": "random", "backend": "flash"},
        **{"kernels_sha256": common.kernels_sha256("flash"), "rows": rows},
    }


def test_table_of_a_results_file(tree):
    common.write_results("gpu", results())
    common.write_results("other", {"command": "python benchmarks/cpu.py"})
    text = attention.tables()
    assert "medians of 3 to 10 runs" in text and "some gpu" in text
    cells = (
        "A | 8,192 | 16/16 | 128, 8 | moba_ext | 0.80 | 2.00 | 1.60 | 1.00 | **2.0x** | **0.5x**"
    )
    assert f"| {cells} | 0.50 | 1.25 |\n" in text
    assert "| 1M | 1,048,576 | 32/8 | 128, 8 | moba_ext | 0.80 | 2.00 | - | - | - | - |" in text
    assert "Not measured: 1M dense cuDNN: takes minutes." in text
    assert "| A | moba_ext | 0.250 | 0.500 |\n" in text
    stages = "0.12 | 0.12 | 0.12 | 0.50 | 0.12 | 0.12 | 0.12 | 0.50 | 0.12 | 0.12"
    assert text.endswith(f"| A | {stages} |\n| 1M | {stages} |")
    for part in text.split("\n\n"):
        assert not part.startswith("|") or len({line.count("|") for line in part.split("\n")}) == 1


def test_tables_of_failures(tree):
    failed = results()
    for row in failed["rows"]:
        row["methods"] = dict.fromkeys(row["methods"], {"skipped": "RuntimeError: no"})
    assert "A moba_ext: RuntimeError: no." in attention.table(failed)
    assert "saw no kernels" in attention.table(failed)


def test_readme_gets_the_tables(tree):
    for _ in range(2):
        common.put_into_readme("attention.py", attention.tables())
        assert (tree / "README.md").read_text().count("\n") == 5
    common.write_results("gpu", results())
    common.put_into_readme("attention.py", attention.tables())
    text = (tree / "README.md").read_text()
    assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n")
    assert attention.tables() in text


def test_check_tells_results_of_other_kernels(tree, capsys):
    assert attention.check() == 0 and "nothing to check" in capsys.readouterr().out
    common.write_results("gpu", results())
    assert attention.check() == 0 and "made by these kernels" in capsys.readouterr().out
    (tree / "csrc/cuda/README.md").write_text("no kernel")
    (tree / "csrc/cuda/sm90/d.cu").write_text("not launched by the flash backend")
    assert attention.check() == 0
    assert common.kernels_sha256("flash") != common.kernels_sha256("sm90")
    for name in ("csrc/cuda/deep/b.cuh", "csrc/params.h", "moba_ext/varlen.py", *GATE):
        before = (tree / name).read_text()
        (tree / name).write_text(before + " ")
        assert attention.check() == 1 and "made by OTHER kernels" in capsys.readouterr().out
        (tree / name).write_text(before)
    (tree / "csrc/cuda/a.cu").rename(tree / "csrc/cuda/c.cu")
    assert attention.check() == 1


def test_arguments(capsys):
    options = attention.parse(["--check", "--rows", "1M,A"])
    assert options.rows == ["1M", "A"] and options.inputs == "random" and options.repeats == 10
    assert attention.parse(["--readme"]).rows == list(common.ROWS)
    wrong = ["--rows A,Z", "--repeats 0", "--inputs warm", "--check --hot"]
    for arguments in (*wrong, *([] if torch.cuda.is_available() else ["--rows A"])):
        with pytest.raises(SystemExit):
            attention.parse(arguments.split())
    assert "has Z, must be of S2K" in capsys.readouterr().err


def test_kernels_go_to_their_stages():
    def event(cat, name, ts, dur, tid, **args):
        return {"cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}

    def launched(number, ts, tid, name, dur):
        call = event("cuda_runtime", "cudaLaunchKernel", ts, 1, tid, correlation=number)
        return call, event("kernel", name, 900, dur, 7, correlation=number)

    ours = "void moba::cuda::(anonymous namespace)::"
    events = [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", "benchmark::forward", 0, 100, 1),
        event("user_annotation", "benchmark::backward", 100, 100, 1),
        event("gpu_user_annotation", "benchmark::forward", 900, 900, 7),
        event("cpu_op", "aten::fill_", 112, 3, 2, **{"External id": 5}),
        *launched(1, 10, 1, f"{ours}tiles_kernel<true>(Sort)", 1000),
        *launched(2, 45, 1, f"{ours}place_kernel<4>(Sort)", 2000),
        *launched(3, 30, 1, f"{ours}attend_forward_tiles_kernel<T, 128>(Params)", 4000),
        *launched(4, 150, 2, "void flash_bwd_dq_dk_dv_loop_kernel<>(P)", 8000),  # autograd's thread
        *launched(5, 150, 3, "void at::vectorized_elementwise_kernel<4>(int)", 16000),
        event("gpu_memset", "Memset", 900, 32000, 7, **{"External id": 5}),  # no launch known
        *launched(6, 500, 1, f"{ours}merge_kernel(P)", 64000),  # after all
    ]
    found = attention.stage_ms(events)
    assert {name: ms for name, ms in found["forward"].items() if ms} == {"route": 3, "attend": 4}
    assert {name: ms for name, ms in found["backward"].items() if ms} == {"attend": 8, "other": 48}
    assert attention.stage_ms(events[:5]) is None


def test_traffic_is_added_up_by_kernel():
    report = """==PROF== Connected
"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum"
"","","Mbyte","byte"
"0","void merge_kernel<float>(P)","1,500.5","500,000"
"1","void merge_kernel<float>(P)","1","0"
"2","other","2,000","0"
"""
    found = traffic.gigabytes(report)
    assert found == {"merge_kernel": pytest.approx(1.502), "other": 2}


@pytest.mark.parametrize(("row", "tera"), [("C", 2.57), ("G", 13.5), ("I", 207)])
def test_operations_of_a_backward(row, tera):
    """Against those that the rows were laid out with, by hand."""
    assert flash_alone.products(flash_alone.pairs_of(common.ROWS[row])) == pytest.approx(
        tera * 1e12, rel=0.01
    )


def test_every_kernel_has_a_stage():
    sources = Path(common.__file__).parents[1].glob("csrc/cuda/**/*.cu*")
    kernels = set(re.findall(r"(\w+_kernel)\(", "".join(file.read_text() for file in sources)))
    assert kernels - {"flat_kernel"} == set(attention.STAGE_OF)  # flat: of moba::route alone


class Event:
    """torch.cuda.Event on a CPU."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end) -> float:
        return (end.time - self.time) * 1e3


@pytest.fixture
def no_gpu(monkeypatch):
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    memory = {"memory_allocated": 100, "max_memory_allocated": 10**9}
    memory |= {"memory_reserved": 300, "max_memory_reserved": 10**9 + 205}
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    monkeypatch.setattr(attention, "DEVICE", "cpu")


def test_a_run(tree, no_gpu, monkeypatch, capsys):
    monkeypatch.setitem(common.ROWS, "A", common.Row(256, 4, 2, 32, 3))
    monkeypatch.setitem(attention.PEERS, "numbers", ("a peer", attention.moba("cpu")))
    options = {"rows": ["A", "1M"], "backend": "cpu", "inputs": "hot", "repeats": 2}
    monkeypatch.setitem(common.ROWS, "1M", common.Row(96, 4, 2, 32, 2))
    monkeypatch.setattr(attention, "DENSE_MOST", 96)
    monkeypatch.setattr(attention, "SHORT", 1e9)
    monkeypatch.setattr(common, "queued", lambda call: len(call()))
    found = attention.run(argparse.Namespace(**options, name="gpu", commit="abc", no_dense=False))
    assert found == json.loads((tree / "benchmarks/results/gpu.json").read_text())
    assert found["commit"] == "abc" and found["kernels_sha256"] == common.kernels_sha256("cpu")
    row = found["rows"][0]["methods"]
    assert row["moba_ext"]["queued_ms"] == {"forward": 256, "backward": 3}
    assert row["moba_ext"]["runs"] >= 2 and row["moba_ext"]["ms"].keys() == attention.PHASES.keys()
    out = 256 * 4 * 128 * 2
    assert row["moba_ext"]["extra_bytes"] == {
        "forward": 10**9 - 95 - out,
        "backward": 10**9 - 95 - 2 * out,
    }
    assert row["moba_ext"]["stages_ms"] is None and row["a peer"]["ms"]
    assert row["dense cuDNN"] == {"skipped": "above 96 tokens, takes minutes"}
    # cuDNN has no kernel for CPU tensors.
    assert found["rows"][1]["methods"]["dense cuDNN"]["skipped"].startswith("RuntimeError")
    assert "no GPU" in attention.table(found)
    assert "FlashMoBA is left out: No module named 'flash_moba'" in capsys.readouterr().err


def test_calls_are_queued_until_the_host_is_ahead(no_gpu, monkeypatch):
    slept = []
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: slept.append(cycles))
    monkeypatch.setattr(Event, "elapsed_time", lambda *_: 100.0 if len(slept) > 2 else 0.0)
    assert common.queued(lambda: time.sleep(0.001), runs=3) == 100.0
    assert slept == [10**7, 2 * 10**7, 4 * 10**7]
    monkeypatch.setattr(Event, "elapsed_time", lambda *_: 0.0)
    with pytest.raises(RuntimeError, match="to launch 3 calls, longer than the wait"):
        common.queued(lambda: time.sleep(0.001), runs=3)


def test_runs_are_fewer_when_long_and_more_when_short(no_gpu):
    def once():
        time.sleep(0.02)
        return {"all": common.span(lambda: None)[0]}

    assert common.medians(once, 4, 10, least=0)[1] == 4
    assert common.medians(once, 10, 0.01, least=0)[1] == 3
    assert common.medians(once, 1, 0.01, least=0)[1] == 1
    assert common.medians(lambda: {"all": common.span(lambda: None)[0]}, 1, least=0.1)[1] > 1


def test_turns_are_as_many_for_each(no_gpu, monkeypatch):
    called = []
    monkeypatch.setattr(Event, "elapsed_time", lambda *_: float(len(called)))

    def once(name):
        called.append(name)
        time.sleep(0.001)
        return {"all": common.span(lambda: None)[0]}

    found = common.in_turns({name: functools.partial(once, name) for name in "ab"}, least=0.3)
    turns = [called[i : i + 6] for i in range(0, len(called), 6)]
    assert all(turn == turn[:1] * 6 for turn in turns)
    rounds = {(first[0], second[0]) for first, second in zip(turns[::2], turns[1::2])}
    assert rounds == {("a", "b"), ("b", "a")}
    assert {count for _, count in found.values()} == {len(turns) // 2 * 5}
    of_a = [i + 1.0 for i, name in enumerate(called) if name == "a" and i % 6]
    assert found["a"][0] == {"all": statistics.median(of_a)}
