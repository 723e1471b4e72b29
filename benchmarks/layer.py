"""A decoder layer of Llama-3.1-8B's shape, random weights, on one GPU: MoBA against full attention.

    python benchmarks/layer.py --name h200_layer    writes benchmarks/results/h200_layer.json
    python benchmarks/layer.py --readme             puts the tables of all results into README.md

The layer as a user of Transformers has it: a Llama of one layer and no vocabulary to speak of, with
``register_moba``; the final norm and the rotary tables are in its time. Full attention is ``sdpa``
by cuDNN, with the same weights. Forward in grad mode and backward to the input and all weights,
medians between CUDA events, fresh inputs for every run.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModel, LlamaConfig

import common
from common import HEAD_DIM
from moba_ext import MoBAConfig, register_moba

DEVICE = "cuda"
LENGTHS = (32_768, 131_072)
BLOCK_SIZE, TOPK = 128, 8
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": HEAD_DIM,
}


def one_layer() -> nn.Module:
    """[1, S, hidden size] -> the same, by ``inputs_embeds``."""
    config = LlamaConfig(
        **SHAPE,
        vocab_size=8,
        num_hidden_layers=1,
        max_position_embeddings=max(LENGTHS),
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModel.from_config(config, attn_implementation="moba", dtype=torch.bfloat16)
    return model.to(DEVICE)


def time_layer(model: nn.Module, length: int, repeats: int) -> dict:
    weights = [*model.layers.parameters(), *model.norm.parameters()]
    full = model.config._attn_implementation == "sdpa"

    def draw() -> torch.Tensor:
        size = (1, length, SHAPE["hidden_size"])
        return torch.randn(size, dtype=torch.bfloat16, device=DEVICE)

    def once() -> dict[str, tuple]:
        x, dout = draw().requires_grad_(), draw()
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if full else nullcontext():
            forward, out = common.span(lambda: model(inputs_embeds=x, use_cache=False)[0])
        backward, _ = common.span(lambda: torch.autograd.grad(out, [x, *weights], dout))
        return {"forward": forward, "backward": backward}

    ms, runs = common.medians(once, repeats)
    return {"ms": ms, "runs": runs}


def run(options: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    register_moba(MoBAConfig(BLOCK_SIZE, TOPK, backend=options.backend))
    model = one_layer()
    results = {
        **common.facts("python benchmarks/layer.py", options.backend, options.commit),
        **{**SHAPE, "block_size": BLOCK_SIZE, "topk": TOPK, "rows": []},
    }
    for length in LENGTHS:
        row = {"tokens": length}
        for attention in ("moba", "sdpa"):
            model.set_attn_implementation(attention)
            torch.cuda.empty_cache()
            row[attention] = time_layer(model, length, options.repeats)
        results["rows"].append(row)
        common.write_results(options.name, results)
    return results


def table(results: dict) -> str:
    header = ["S", "moba forward ms", "backward", "sdpa forward ms", "backward"]
    header += ["speed-up forward", "forward + backward"]
    lines = []
    for row in results["rows"]:
        moba, sdpa = (list(row[attention]["ms"].values()) for attention in ("moba", "sdpa"))
        ratios = [sdpa[0] / moba[0], sum(sdpa) / sum(moba)]
        cells = [f"{x:.2f}" for x in (*moba, *sdpa)] + [f"{x:.2f}x" for x in ratios]
        lines.append([f"{row['tokens']:,}", *cells])
    return common.markdown(header, lines)


def tables() -> str:
    """Of all committed results, with what is common to them."""
    intro = (
        f"A decoder layer of Llama-3.1-8B's shape ({SHAPE['num_attention_heads']}/"
        f"{SHAPE['num_key_value_heads']} heads), random weights, MoBA with block {BLOCK_SIZE} and "
        f"topk {TOPK} against `sdpa` by cuDNN, through Transformers; "
        "`python benchmarks/layer.py`. Backward to the input and all weights."
    )
    parts = [intro]
    for results in common.read_results("layer.py").values():
        parts += [f"{results['gpu']}, commit {results['commit']}:", table(results)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    common.command_line("layer", __doc__, run, table, tables)
