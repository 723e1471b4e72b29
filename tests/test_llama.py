"""Patching a loaded model, switching its layers, and taking the patch off."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import (
    FAMILIES,
    LAYERS,
    LENGTH,
    assert_far,
    assert_same,
    generate,
    logits,
    random_tokens,
    tiny_model,
)
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from moba_ext.hf import MoBAConfig, register_moba
from moba_ext.llama import patch_llama, set_attention_mode, unpatch_llama

SPARSE = MoBAConfig(moba_chunk_size=8, moba_topk=3)
TOKENS = random_tokens(2, LENGTH)


def state(model):
    """Where and what every weight is, and every attribute of every module."""
    weights = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    return weights, [set(vars(module)) for module in model.modules()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attn", ["eager", "sdpa", "moba"])
def test_patch_and_unpatch_restore_everything(family, attn):
    register_moba(MoBAConfig(4, 2))
    model = tiny_model(family, attn)
    before, (weights, attributes) = logits(model, TOKENS), state(model)
    patch_llama(model, SPARSE)
    patched = logits(model, TOKENS)
    assert_far(patched, before)
    unpatch_llama(model)
    assert model.config._attn_implementation == attn
    assert torch.equal(logits(model, TOKENS), before)
    after, attributes_after = state(model)
    assert attributes_after == attributes
    for name, (pointer, weight) in weights.items():
        assert after[name][0] == pointer
        assert torch.equal(after[name][1], weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_patched_equals_loaded_with_moba(family):
    register_moba(SPARSE)
    expected = logits(tiny_model(family, "moba"), TOKENS)
    register_moba(MoBAConfig(4, 2))
    model = tiny_model(family)
    patch_llama(model, SPARSE)
    assert torch.equal(logits(model, TOKENS), expected)
    model.set_attn_implementation("moba_naive")
    assert_same(logits(model, TOKENS), expected)


def test_patching_again_replaces_the_configuration():
    model, other = tiny_model(), tiny_model()
    before = logits(model, TOKENS)
    patch_llama(model, MoBAConfig(4, 2))
    patch_llama(model, SPARSE)
    patch_llama(other, SPARSE)
    assert torch.equal(logits(model, TOKENS), logits(other, TOKENS))
    unpatch_llama(model)
    assert torch.equal(logits(model, TOKENS), before)


def test_two_models_keep_their_own_configurations():
    models = {config: tiny_model() for config in (SPARSE, MoBAConfig(4, 2))}
    alone = {}
    for config, model in models.items():
        patch_llama(model, config)
        alone[config] = logits(model, TOKENS)
    assert_far(*alone.values())
    for config, model in models.items():
        assert torch.equal(logits(model, TOKENS), alone[config])


def test_patch_leaves_the_registered_configuration_alone():
    register_moba(MoBAConfig(4, 2))
    model = tiny_model(attn="moba")
    expected = logits(model, TOKENS)
    patch_llama(tiny_model(), SPARSE)
    assert torch.equal(logits(model, TOKENS), expected)


def test_a_patched_model_generates_copies_and_saves(tmp_path):
    model = tiny_model()
    plain = generate(model, TOKENS)
    patch_llama(model, SPARSE)
    sparse = generate(model, TOKENS)
    assert torch.equal(generate(copy.deepcopy(model), TOKENS), sparse)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert torch.equal(generate(loaded, TOKENS), plain)


def test_training_a_patched_model():
    model = tiny_model()
    patch_llama(model, SPARSE)
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


# --- set_attention_mode


@pytest.fixture(params=["loaded", "patched"])
def moba_model(request):
    if request.param == "loaded":
        register_moba(SPARSE)
        return tiny_model(attn="moba")
    model = tiny_model()
    patch_llama(model, SPARSE)
    return model


def test_full_and_back_are_bit_equal(moba_model):
    sparse, full = logits(moba_model, TOKENS), logits(tiny_model(), TOKENS)
    set_attention_mode(moba_model, "full")
    assert torch.equal(logits(moba_model, TOKENS), full)
    set_attention_mode(moba_model, "moba")
    assert torch.equal(logits(moba_model, TOKENS), sparse)


@pytest.mark.parametrize("layers", [[0], [1, 2], [-1], range(LAYERS), []])
def test_modes_of_single_layers(moba_model, layers):
    reference = tiny_model()
    patch_llama(reference, MoBAConfig(8, 3, full_attention_layers=tuple(layers)))
    set_attention_mode(moba_model, "full", layers=iter(layers))
    assert torch.equal(logits(moba_model, TOKENS), logits(reference, TOKENS))
    set_attention_mode(moba_model, "moba", layers=layers)
    set_attention_mode(reference, "moba", layers=range(LAYERS))
    assert torch.equal(logits(moba_model, TOKENS), logits(reference, TOKENS))


def test_moba_for_all_layers_means_as_configured():
    model = tiny_model()
    patch_llama(model, MoBAConfig(8, 3, full_attention_layers=(-1,)))
    configured = logits(model, TOKENS)
    set_attention_mode(model, "full")
    set_attention_mode(model, "moba")
    assert torch.equal(logits(model, TOKENS), configured)
    set_attention_mode(model, "moba", layers=[-1])
    assert_far(logits(model, TOKENS), configured)


def test_full_mode_on_padded_rows_and_chunks(moba_model):
    set_attention_mode(moba_model, "full")
    mask = torch.ones_like(TOKENS)
    mask[1, :20] = 0
    options = {"attention_mask": mask, "prefill_chunk_size": 16}
    assert torch.equal(
        generate(moba_model, TOKENS, **options), generate(tiny_model(), TOKENS, **options)
    )


def test_unpatching_forgets_the_modes():
    model = tiny_model()
    patch_llama(model, SPARSE)
    sparse = logits(model, TOKENS)
    set_attention_mode(model, "full", layers=[0])
    unpatch_llama(model)
    patch_llama(model, SPARSE)
    assert torch.equal(logits(model, TOKENS), sparse)


# --- errors


def test_patch_errors():
    with pytest.raises(TypeError, match="config must be a MoBAConfig, got dict"):
        patch_llama(tiny_model(), {"moba_topk": 3})
    with pytest.raises(ValueError, match=r"layer indices must lie in \[-3, 3\), got \[-4\]"):
        patch_llama(tiny_model(), MoBAConfig(8, 3, full_attention_layers=(-4,)))
    with pytest.raises(
        ValueError, match="Linear has no layers with Transformers' attention interface"
    ):
        patch_llama(torch.nn.Linear(2, 2), SPARSE)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="BertModel has no layers"):
        patch_llama(BertModel(BertConfig(**sizes, intermediate_size=8, vocab_size=8)), SPARSE)


def test_a_failed_patch_changes_nothing():
    model = tiny_model()
    attributes = state(model)[1]
    with pytest.raises(ValueError, match="layer indices"):
        patch_llama(model, MoBAConfig(8, 3, full_attention_layers=(7,)))
    assert model.config._attn_implementation == "sdpa"
    assert state(model)[1] == attributes


def test_unpatch_needs_a_patch():
    with pytest.raises(ValueError, match="not patched: call patch_llama first"):
        unpatch_llama(tiny_model())


def test_mode_errors():
    model = tiny_model()
    with pytest.raises(ValueError, match="mode must be 'full' or 'moba', got 'sparse'"):
        set_attention_mode(model, "sparse")
    with pytest.raises(ValueError, match="runs attn_implementation='sdpa': load it with 'moba'"):
        set_attention_mode(model, "full")
    patch_llama(model, SPARSE)
    with pytest.raises(ValueError, match=r"layer indices must lie in \[-3, 3\), got \[3, -5\]"):
        set_attention_mode(model, "full", layers=[0, 3, -5])
