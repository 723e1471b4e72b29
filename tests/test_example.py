"""The main job, ``python examples/llama.py``: what it prints, and how it fails."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from tiny_models import VOCAB, assert_same, logits, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from moba_ext.hf import MoBAConfig, register_moba

SCRIPT = Path(__file__).parents[1] / "examples" / "llama.py"
SMALL = ["--context", "200", "--moba-chunk-size", "32", "--max-new-tokens", "3"]


def load_example():
    spec = importlib.util.spec_from_file_location("example_llama", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


example = load_example()


@pytest.fixture
def run(capsys):
    """Run the example with these flags and return what it printed."""

    def run(*flags) -> str:
        example.main([str(flag) for flag in flags])
        return capsys.readouterr().out

    return run


@pytest.fixture
def fails(capsys):
    """Run the example with these flags and return its one sentence of error."""

    def fails(*flags) -> str:
        with pytest.raises(SystemExit) as stop:
            example.main([str(flag) for flag in flags])
        assert stop.value.code == 2
        *progress, error = capsys.readouterr().err.splitlines()
        assert not any("Error" in line for line in progress)
        assert error.startswith("error: ")
        return error

    return fails


# --- what it prints


def test_as_a_program():
    result = subprocess.run([sys.executable, SCRIPT, *SMALL], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "untrained, its weights are seeded" in result.stdout
    assert "200 tokens of Python's standard library" in result.stdout


def test_default_is_moba_over_16384_tokens():
    args = example.build_parser().parse_args([])
    example.check_flags(args)
    assert (args.model, args.attn, args.moba_chunk_size, args.moba_topk) == (None, "moba", 512, 3)
    assert (args.device, args.dtype) == ("cpu", torch.float32)
    model, tokenizer = example.load_model(args)
    assert len(example.read_prompt(args, model, tokenizer)) == 16384


@pytest.mark.parametrize("attn", ["moba", "moba_naive"])
def test_moba_tells_speed_pairs_and_blocks(run, attn):
    out = run(*SMALL, "--attn", attn)
    assert re.search(r"prefill +[\d.]+ s, [\d,]+ tokens/s", out)
    assert re.search(r"decoding +[\d.]+ s, [\d,.]+ tokens/s, with full attention", out)
    pairs = sum(i + 1 if i < 96 else 64 + i % 32 + 1 for i in range(200)) / sum(range(201))
    assert f"pairs       {pairs:.1%} of full attention's" in out
    layers = re.findall(r"layer +\d+ +(.*)", out)
    assert len(layers) == 4
    for layer in layers:
        heads = [[int(block) for block in head.split()] for head in layer.split("|")]
        assert [len(head) for head in heads] == [2] * 8
        assert all(0 <= a < b < 6 for a, b in heads)  # the last token's own block is 6
    assert "continues   " in out


def test_blocks_and_continuation_are_those_of_the_model(run):
    flags = ["--prompt", "abcdefgh" * 20, "--moba-chunk-size", "16", "--max-new-tokens", "4"]
    moba, naive = (run(*flags, "--attn", attn) for attn in ("moba", "moba_naive"))
    select = re.compile(r"(layer|block|continues) .*")
    assert [m.group() for m in select.finditer(moba)] == [m.group() for m in select.finditer(naive)]
    register_moba(MoBAConfig(16, 3))
    model = example.embedded_llama("moba")
    ids = torch.tensor([list(b"abcdefgh" * 20)])
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)[0, 160:].tolist()
    assert f"continues   {bytes(expected).decode(errors='replace')!r}" in moba


def test_compare_without_sparsity_finds_no_difference(run):
    out = run(*SMALL, "--compare", "--moba-topk", 7)
    assert "100.0% of full attention's" in out
    assert re.search(r"full +prefill .*: moba is [\d.]+ times as fast", out)
    assert "hidden states 0.00% (relative L2)" in out
    assert "same next token at 100.0% of the positions" in out


def test_compare_with_sparsity_finds_one(run):
    out = run(*SMALL, "--compare", "--moba-topk", 1)
    assert float(re.search(r"hidden states ([\d.]+)%", out)[1]) > 1


def test_last_layers_can_stay_full(run):
    out = run(*SMALL, "--full-last", 3)
    assert "the last 3 layers full" in out
    assert len(re.findall(r"layer +\d+ ", out)) == 1
    assert "blocks" not in run(*SMALL, "--full-last", 4).split("per query")[1]


def test_sdpa_has_no_blocks(run):
    out = run(*SMALL, "--attn", "sdpa")
    assert "prefill" in out
    assert "pairs" not in out


def test_bfloat16(run):
    assert "bfloat16 on cpu" in run(*SMALL, "--dtype", "bfloat16")


def test_prompt_file(run, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("Ein Satz mit Umlauten: äöü. " * 10)
    size = len(file.read_bytes())
    assert f"{size} tokens of {file}" in run("--prompt-file", file, "--max-new-tokens", 1)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A Llama with a tokenizer of words, as ``save_pretrained`` writes them."""
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    return tmp_path


def test_local_folder(run, folder):
    words = [f"w{7 * i % VOCAB}" for i in range(100)]
    flags = ["--model", folder, "--prompt", " ".join(words), "--moba-chunk-size", 8]
    out = run(*flags, "--max-new-tokens", 2)
    assert f"model       {folder}: 3 layers, 4 query and 2 KV heads" in out
    assert "untrained" not in out
    assert "100 tokens of --prompt" in out
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="moba")
    ids = torch.tensor([[int(word[1:]) for word in words]])
    first = logits(model, ids)[0, -1].argmax()
    assert f"continues   'w{first} " in out
    naive = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="moba_naive")
    assert_same(logits(model, ids), logits(naive, ids))


def test_default_context_fits_the_model(run, folder):
    assert "224 tokens of Python's standard library" in run("--model", folder)


def test_end_token_stops_the_continuation():
    register_moba(MoBAConfig(8, 3))
    args = example.build_parser().parse_args(["--max-new-tokens", "9"])
    model, tokens = tiny_model(attn="moba"), list(range(1, 31))
    with torch.inference_mode():
        free = example.read_and_continue(model, tokens, args).tokens
        model.generation_config.eos_token_id = [free[2]]
        stopped = example.read_and_continue(model, tokens, args).tokens
    assert stopped == free[: free.index(free[2]) + 1]


def test_library_text_is_the_same_every_time():
    text = example.library_text(5000)
    assert text == example.library_text(5000)
    assert len(text) == 5000
    assert example.library_text(70000).startswith(text)


# --- how it fails


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--moba-chunk-size", "0"], "--moba-chunk-size: must be a number of at least 1, got 0"),
        (["--moba-topk", "x"], "--moba-topk: must be a number of at least 1, got x"),
        (["--max-new-tokens", "-3"], "--max-new-tokens: must be a number of at least 1, got -3"),
        (["--context", "1"], "--context: must be a number of at least 2, got 1"),
        (["--attn", "eager"], "invalid choice: 'eager'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--prompt", "a", "--prompt-file", "b"], "either --prompt or --prompt-file"),
        (["--prompt-file", "/nowhere/x.txt"], "cannot read --prompt-file /nowhere/x.txt: No such"),
        (["--prompt", "a short text", "--context", "13"], "has 12 tokens, fewer than 13"),
        (["--prompt", ""], "the text has 0 tokens, fewer than 2"),
        (["--context", "2000000"], "room for 1048544 tokens"),
        (["--compare", "--attn", "sdpa"], "--compare is for --attn moba or moba_naive, got sdpa"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N, got tpu"),
        (["--attn", "flash_attention_2"], "flash_attention_2 needs a GPU: use --attn sdpa"),
        (["--full-last", "5"], "layer indices must lie in"),
    ],
)
def test_bad_flags(fails, flags, match):
    assert match in fails(*flags)


def test_cuda_without_a_gpu(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda needs a GPU" in fails("--device", "cuda")


def test_no_network(fails, monkeypatch):
    def unreachable(*args, **kwargs):
        raise RuntimeError("name or service not known")

    monkeypatch.setattr("huggingface_hub.model_info", unreachable)
    message = fails("--model", "somebody/some-model")
    assert "huggingface.co cannot be reached: go online, or give --model a local folder" in message


def refusal(error: type):
    def refuse(*args, **kwargs):
        raise error("no", response=SimpleNamespace(headers={}, request=None, status_code=403))

    return refuse


def test_missing_model(fails, monkeypatch):
    monkeypatch.setattr("huggingface_hub.model_info", refusal(RepositoryNotFoundError))
    assert "neither a local folder nor on huggingface.co" in fails("--model", "somebody/nothing")
    monkeypatch.undo()
    assert "neither a local folder nor on huggingface.co" in fails("--model", "./no/such/folder")


def test_gated_model(fails, monkeypatch):
    monkeypatch.setattr("huggingface_hub.model_info", refusal(GatedRepoError))
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refusal(GatedRepoError))
    message = fails("--model", "somebody/gated-model")
    assert "accept its licence at https://huggingface.co/somebody/gated-model" in message
    assert "hf auth login" in message


def test_folder_without_a_model(fails, tmp_path):
    assert f"{tmp_path} has no config.json" in fails("--model", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert f"cannot load {tmp_path}" in fails("--model", tmp_path)


def test_model_that_moba_cannot_run(fails, folder):
    model = tiny_model("qwen3", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    model.save_pretrained(folder)
    assert "sliding-window" in fails("--model", folder, "--prompt", "w1 w2 w3 w4")


def test_missing_transformers(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "moba_ext.hf", None)
    assert "pip install -e ." in fails()


def test_missing_flash_attention(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(example, "find_spec", lambda name: None)
    assert "pip install flash-attn" in fails("--attn", "flash_attention_2", "--device", "cuda")
