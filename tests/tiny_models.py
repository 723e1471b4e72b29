"""Tiny random decoders of two families, and how the tests run and compare them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM as Auto
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

VOCAB, LAYERS = 61, 3
LENGTH = 45  # five blocks of 8 and a short one
FAMILIES = {"llama": LlamaConfig, "qwen3": Qwen3Config}


def tiny_config(family: str = "llama", **overrides) -> PreTrainedConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # about 32**-0.5: scores of unit size, so that selection matters
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return FAMILIES[family](**sizes, **overrides)


def tiny_model(family: str = "llama", attn: str = "sdpa", **overrides) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config(family, **overrides)
    return Auto.from_config(config, attn_implementation=attn).eval()


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor, **kwargs) -> Tensor:
    return model(tokens, **kwargs).logits


def generate(model: PreTrainedModel, tokens: Tensor, **kwargs) -> Tensor:
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **kwargs}
    options.setdefault("attention_mask", torch.ones_like(tokens))
    return model.generate(tokens, **options)[:, tokens.shape[1] :]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal within float32 rounding: logits here are of size one, sparsity moves them by 0.1."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def assert_far(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() > 0.05
