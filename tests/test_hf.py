"""MoBA behind Transformers' attention and mask interfaces."""

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
    tiny_config,
    tiny_model,
)
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)
from transformers.masking_utils import create_causal_mask

from moba_ext import hf
from moba_ext.hf import MoBAConfig, register_moba

SPARSE = MoBAConfig(moba_chunk_size=8, moba_topk=3)
NAMES = ("moba", "moba_naive")


@pytest.fixture(autouse=True)
def sparse_by_default():
    """Every test starts from the same registration."""
    register_moba(SPARSE)


def with_attention(model: PreTrainedModel, attn: str) -> PreTrainedModel:
    model.set_attn_implementation(attn)
    return model


# --- the same as full attention, the same as the definition


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attn", NAMES)
@pytest.mark.parametrize("length", [2, 7, 8, 9, LENGTH])
def test_equals_sdpa_when_topk_covers_all_blocks(family, attn, length):
    register_moba(MoBAConfig(8, 6))
    tokens, model = random_tokens(2, length), tiny_model(family)
    expected = logits(model, tokens)
    assert_same(logits(with_attention(model, attn), tokens), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("chunk", "topk"), [(8, 1), (8, 3), (5, 2), (16, 2), (1, 4)])
def test_moba_equals_naive(family, chunk, topk):
    register_moba(MoBAConfig(chunk, topk))
    tokens, model = random_tokens(2, LENGTH), tiny_model(family)
    full = logits(model, tokens)
    sparse = logits(with_attention(model, "moba"), tokens)
    assert_same(sparse, logits(with_attention(model, "moba_naive"), tokens))
    assert_far(sparse, full)


def test_bfloat16_stays_near_float32():
    tokens, model = random_tokens(1, 24), tiny_model(attn="moba")
    expected = logits(model, tokens)  # k*B >= S: also what sdpa gives
    sparse = logits(model.bfloat16(), tokens)
    full = logits(with_attention(model, "sdpa"), tokens)
    assert sparse.dtype == torch.bfloat16
    assert (sparse - expected).abs().max() <= 2 * (full - expected).abs().max()


def test_scaling_of_the_model_is_honoured():
    tokens, model = random_tokens(2, LENGTH), tiny_model(attn="moba")
    plain = logits(model, tokens)
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3
    sparse = logits(model, tokens)
    assert_far(sparse, plain)
    assert_same(sparse, logits(with_attention(model, "moba_naive"), tokens))
    register_moba(MoBAConfig(8, 6))
    covered = logits(with_attention(model, "moba"), tokens)
    assert_same(covered, logits(with_attention(model, "sdpa"), tokens))


@pytest.mark.parametrize("attn", NAMES)
def test_scaling_defaults_to_that_of_the_head_dim(attn):
    tokens, model = random_tokens(2, LENGTH), tiny_model(attn=attn)
    expected = logits(model, tokens)
    for layer in model.model.layers:
        assert layer.self_attn.scaling == 16**-0.5
        layer.self_attn.scaling = None
    assert torch.equal(logits(model, tokens), expected)


def test_from_pretrained_and_from_config(tmp_path):
    tokens, model = random_tokens(1, LENGTH), tiny_model()
    model.save_pretrained(tmp_path)
    expected = logits(with_attention(model, "moba"), tokens)
    for attn in NAMES:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attn)
        assert loaded.config._attn_implementation == attn
        assert_same(logits(loaded, tokens), expected)


# --- what reaches the op


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """Shapes and lengths of every call of the op."""
    seen, op = [], hf.moba_attention_varlen

    def recording(q, k, v, *lengths, **options):
        seen.append({"q": q.shape, "k": k.shape, "dtype": q.dtype, "lengths": lengths, **options})
        return op(q, k, v, *lengths, **options)

    monkeypatch.setattr(hf, "moba_attention_varlen", recording)
    return seen


def test_key_heads_are_not_repeated(calls):
    logits(tiny_model(attn="moba"), random_tokens(2, LENGTH))
    assert [call["k"] for call in calls] == [(2 * LENGTH, 2, 16)] * LAYERS
    assert [call["q"] for call in calls] == [(2 * LENGTH, 4, 16)] * LAYERS


def test_configuration_and_exact_lengths_reach_the_op(calls):
    register_moba(MoBAConfig(4, 2, backend="reference"))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :9] = mask[1, :5] = 0
    logits(tiny_model(attn="moba"), random_tokens(2, 20), attention_mask=mask)
    call = calls[0]
    assert (call["block_size"], call["topk"], call["backend"]) == (4, 2, "reference")
    cu_q, cu_k, max_q, max_k = call["lengths"]
    assert cu_q.tolist() == cu_k.tolist() == [0, 11, 26]
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (max_q, max_k) == (15, 15)


def test_empty_slots_of_a_static_cache_are_cut(calls):
    model, tokens = tiny_model(attn="moba"), random_tokens(1, LENGTH)
    cache = StaticCache(config=model.config, max_cache_len=200)
    actual = logits(model, tokens, past_key_values=cache, use_cache=True)
    assert calls[0]["k"] == (LENGTH, 2, 16)
    assert_same(actual, logits(model, tokens))


# --- padding and packing


def padding_mask(side: str, lengths: list[int]) -> Tensor:
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[slice(None, length) if side == "right" else slice(max(lengths) - length, None)] = 1
    return mask


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attn", NAMES)
@pytest.mark.parametrize("positions", [True, False])
def test_padded_rows_equal_rows_alone(family, side, attn, positions):
    lengths = [LENGTH, 1, 17, 32]
    tokens, mask = random_tokens(len(lengths), LENGTH), padding_mask(side, lengths)
    kwargs = {"attention_mask": mask}
    if positions:
        kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    model = tiny_model(family, attn)
    batch = logits(model, tokens, **kwargs)
    assert batch.isfinite().all()
    for row, ids, kept in zip(batch, tokens, mask.bool(), strict=True):
        assert_same(row[kept], logits(model, ids[kept][None])[0])


def test_padding_tokens_do_not_matter():
    mask, tokens = padding_mask("left", [LENGTH, 30]), random_tokens(2, LENGTH)
    model, other = tiny_model(attn="moba"), tokens.where(mask.bool(), 5)
    a, b = (logits(model, ids, attention_mask=mask) for ids in (tokens, other))
    assert torch.equal(a[mask.bool()], b[mask.bool()])


def test_a_row_of_nothing_but_padding_is_harmless():
    mask, tokens = padding_mask("left", [LENGTH, 0]), random_tokens(2, LENGTH)
    for attn in NAMES:
        out = logits(tiny_model(attn=attn), tokens, attention_mask=mask)
        assert out.isfinite().all()
        assert_same(out[:1], logits(tiny_model(attn=attn), tokens[:1]))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("attn", NAMES)
@pytest.mark.parametrize("rows", [1, 2])
def test_sequences_packed_by_position_ids_equal_sequences_alone(attn, use_cache, rows):
    lengths = [20, 1, 24]
    tokens = random_tokens(rows, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    model = tiny_model(attn=attn)
    packed = logits(model, tokens, position_ids=positions, use_cache=use_cache)
    for row, ids in zip(packed, tokens, strict=True):
        for part, alone in zip(row.split(lengths), ids.split(lengths), strict=True):
            assert_same(part, logits(model, alone[None])[0])


def cu_seq_lens(lengths: list[int]) -> dict:
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    names = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
    return {**names, "max_length_q": max(lengths), "max_length_k": max(lengths)}


def test_sequences_packed_by_cu_seq_lens_equal_sequences_alone():
    lengths, tokens, model = [20, 25], random_tokens(1, 45), tiny_model(attn="moba")
    packed = logits(model, tokens, **cu_seq_lens(lengths))[0]
    for part, alone in zip(packed.split(lengths), tokens[0].split(lengths), strict=True):
        assert_same(part, logits(model, alone[None])[0])


# --- cache, chunks, generation


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunks", [[20, 25], [8, 8, 29], [3, 40, 2]])
@pytest.mark.parametrize("static", [False, True])
def test_prefill_in_chunks_equals_prefill_at_once(family, chunks, static):
    model, tokens = tiny_model(family, "moba"), random_tokens(2, LENGTH)
    cache = DynamicCache(config=model.config)
    if static:
        cache = StaticCache(config=model.config, max_cache_len=64)
    parts = [logits(model, part, past_key_values=cache) for part in tokens.split(chunks, dim=1)]
    assert_same(torch.cat(parts, dim=1), logits(model, tokens))


@pytest.mark.parametrize("full_layers", [(), (0, 2)])
def test_chunks_of_a_padded_batch_equal_prefill_at_once(full_layers):
    register_moba(MoBAConfig(8, 3, full_attention_layers=full_layers))
    model, tokens = tiny_model(attn="moba"), random_tokens(2, LENGTH)
    mask, cache = padding_mask("left", [LENGTH, 31]), DynamicCache(config=model.config)
    parts = []
    for end in (10, 30, LENGTH):
        part = tokens[:, cache.get_seq_length() : end]
        parts.append(logits(model, part, past_key_values=cache, attention_mask=mask[:, :end]))
    kept = mask.bool()
    expected = logits(model, tokens, attention_mask=mask)
    assert_same(torch.cat(parts, dim=1)[kept], expected[kept])


def test_decoding_is_full_attention():
    model, tokens = tiny_model(attn="moba"), random_tokens(2, LENGTH)
    cache = DynamicCache(config=model.config)
    logits(model, tokens[:, :-1], past_key_values=cache)
    again, last = copy.deepcopy(cache), tokens[:, -1:]
    step = logits(model, last, past_key_values=cache)
    assert_far(step[:, 0], logits(model, tokens)[:, -1])
    assert torch.equal(step, logits(with_attention(model, "sdpa"), last, past_key_values=again))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attn", NAMES)
def test_greedy_generation_is_moba_prefill_then_full_steps(family, attn):
    model, tokens = tiny_model(family, attn), random_tokens(2, LENGTH)
    cache, step, expected = DynamicCache(config=model.config), tokens, []
    for _ in range(5):
        step = logits(model, step, past_key_values=cache)[:, -1:].argmax(-1)
        expected.append(step)
        model.set_attn_implementation("sdpa")
    model.set_attn_implementation(attn)
    assert torch.equal(generate(model, tokens), torch.cat(expected, dim=1))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_left_padded_batch_generates_what_its_rows_do(beams, cache):
    lengths = [LENGTH, 19, 33]
    model, tokens = tiny_model(attn="moba"), random_tokens(3, LENGTH)
    mask, options = padding_mask("left", lengths), {"num_beams": beams}
    batch = generate(model, tokens, attention_mask=mask, cache_implementation=cache, **options)
    for row, ids, length in zip(batch, tokens, lengths, strict=True):
        assert torch.equal(row, generate(model, ids[None, -length:], **options)[0])


def test_beam_search_equals_sdpa_when_topk_covers_all_blocks():
    register_moba(MoBAConfig(8, 6))
    model, tokens = tiny_model(), random_tokens(2, LENGTH)
    expected = generate(model, tokens, num_beams=4)
    assert torch.equal(generate(with_attention(model, "moba"), tokens, num_beams=4), expected)


def test_generate_with_chunked_prefill_equals_without():
    model, tokens = tiny_model(attn="moba"), random_tokens(2, LENGTH)
    assert torch.equal(generate(model, tokens, prefill_chunk_size=16), generate(model, tokens))


# --- layers, configurations


def test_full_attention_layers_are_sdpa():
    tokens, model = random_tokens(2, LENGTH), tiny_model()
    expected = logits(model, tokens)
    register_moba(MoBAConfig(8, 3, full_attention_layers=range(LAYERS)))
    assert torch.equal(logits(with_attention(model, "moba"), tokens), expected)


def test_full_attention_layers_counts_from_either_end(calls):
    tokens, model = random_tokens(1, LENGTH), tiny_model(attn="moba")
    outs = []
    for layers in ((2, 1), (-1, -2)):
        register_moba(MoBAConfig(8, 3, full_attention_layers=layers))
        outs.append(logits(model, tokens))
    assert torch.equal(*outs)
    assert len(calls) == 2  # one sparse layer each


def test_full_attention_layers_out_of_range():
    register_moba(MoBAConfig(8, 3, full_attention_layers=(3,)))
    with pytest.raises(ValueError, match=r"\[-3, 3\), got \[3\]"):
        logits(tiny_model(attn="moba"), random_tokens(1, LENGTH))


def test_two_models_with_different_configurations():
    tokens = random_tokens(1, LENGTH)
    register_moba(MoBAConfig(4, 2), name="moba_short")
    models = {name: tiny_model(attn=name) for name in ("moba", "moba_short", "moba_short_naive")}
    out = {name: logits(model, tokens) for name, model in models.items()}
    assert_far(out["moba"], out["moba_short"])
    assert_same(out["moba_short"], out["moba_short_naive"])
    register_moba(SPARSE, name="moba_short")
    assert torch.equal(logits(models["moba_short"], tokens), out["moba"])


def test_names_have_a_mask_function():
    for name in NAMES:
        assert name in AttentionInterface()
        assert name in AttentionMaskInterface()


# --- training


def gradients(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()(tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_naive(family):
    tokens, model = random_tokens(2, LENGTH), tiny_model(family, "moba")
    actual = gradients(model, tokens)
    expected = gradients(with_attention(model, "moba_naive"), tokens)
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-5)
    full = gradients(with_attention(model, "sdpa"), tokens)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (actual[name] - full[name]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(calls, use_reentrant):
    tokens, model = random_tokens(2, LENGTH), tiny_model(attn="moba")
    expected = gradients(model, tokens)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    recomputed = gradients(model, tokens)
    assert len(calls) == 3 * LAYERS  # once, then twice
    for name, grad in recomputed.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_autocast_runs_the_op_in_its_dtype(calls, family, use_cache):
    tokens, model = random_tokens(2, LENGTH), tiny_model(family, "moba")
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, labels=tokens, use_cache=use_cache)
    out.loss.backward()
    assert [call["dtype"] for call in calls] == [torch.bfloat16] * LAYERS
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


# --- torch.compile


def test_compiles_to_one_graph():
    register_moba(MoBAConfig(8, 3, full_attention_layers=(-1,)))
    tokens, model = random_tokens(2, LENGTH), tiny_model(attn="moba")
    expected = logits(model, tokens)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for use_cache in (False, True):
        assert_same(logits(compiled, tokens, use_cache=use_cache), expected)


def test_compiled_packed_rows_need_cu_seq_lens():
    lengths, tokens, model = [20, 25], random_tokens(1, 45), tiny_model(attn="moba")
    expected = logits(model, tokens, **cu_seq_lens(lengths))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert_same(logits(compiled, tokens, **cu_seq_lens(lengths), use_cache=False), expected)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with pytest.raises(RuntimeError, match="cu_seq_lens_q"):
        logits(compiled, tokens, position_ids=positions, use_cache=False)


# --- errors


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((0, 3), ValueError, "moba_chunk_size must be >= 1, got 0"),
        ((8, -1), ValueError, "moba_topk must be >= 1, got -1"),
        ((8.0, 3), TypeError, "moba_chunk_size must be an int >= 1, got 8.0"),
        ((8, True), TypeError, "moba_topk must be an int >= 1, got True"),
        ((8, 3, ("last",)), TypeError, "full_attention_layers must hold layer indices"),
        ((8, 3, -1), TypeError, "full_attention_layers must hold layer indices, got -1"),
    ],
)
def test_configuration_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        MoBAConfig(*arguments)


def test_register_wants_a_configuration():
    with pytest.raises(TypeError, match="MoBAConfig, got dict"):
        register_moba({"moba_chunk_size": 8})


def test_dropout_in_training():
    model = tiny_model(attn="moba", attention_dropout=0.1)
    logits(model, random_tokens(1, LENGTH))
    with pytest.raises(ValueError, match=r"dropout, got 0.1: .*attention_dropout=0"):
        logits(model.train(), random_tokens(1, LENGTH))


def test_output_attentions():
    model = tiny_model(attn="moba")
    with pytest.raises(ValueError, match="output_attentions=True: use attn_implementation='eager'"):
        logits(model, random_tokens(1, LENGTH), output_attentions=True)
    model = tiny_model(attn="eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions=True: use attn_implementation='eager'"):
        logits(with_attention(model, "moba"), random_tokens(1, LENGTH))


def test_sliding_window():
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    model = tiny_model("qwen3", "moba", **window)
    with pytest.raises(ValueError, match="sliding-window"):
        logits(model, random_tokens(1, LENGTH))


@pytest.mark.parametrize(
    "name", ["sliding_window", "softcap", "s_aux", "position_bias", "read_index"]
)
def test_attention_arguments_that_moba_lacks(name):
    model = tiny_model(attn="moba")
    with pytest.raises(ValueError, match=rf"the attention argument {name}:"):
        logits(model, random_tokens(1, LENGTH), **{name: 1})


def test_non_causal_attention():
    model, tokens = tiny_model(attn="moba"), random_tokens(1, LENGTH)
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(ValueError, match="is_causal=False: use attn_implementation='sdpa'"):
        logits(model, tokens)
    model.config.is_causal = False
    with pytest.raises(ValueError, match="non-causal masks"):
        logits(model, tokens)


def test_custom_masks():
    model, tokens = tiny_model(attn="moba"), random_tokens(1, 6)
    with pytest.raises(ValueError, match=r"ready-made masks, got shape \(1, 1, 6, 6\)"):
        logits(model, tokens, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool).tril())
    embeds = model.get_input_embeddings()(tokens)
    with pytest.raises(ValueError, match="custom mask functions"):
        create_causal_mask(
            config=model.config,
            inputs_embeds=embeds,
            attention_mask=None,
            past_key_values=None,
            and_mask_function=lambda batch, head, q, k: q - k < 4,
        )


def test_an_attention_layer_without_a_mask_is_not_guessed():
    model = tiny_model(attn="moba")
    hidden = torch.zeros(1, 6, 32)
    rotary = model.model.rotary_emb(hidden, torch.arange(6)[None])
    with pytest.raises(ValueError, match="ready-made masks, got None"):
        model.model.layers[0].self_attn(hidden, position_embeddings=rotary, attention_mask=None)


def test_masks_that_forget_the_cache():
    model, cache = tiny_model(attn="moba"), DynamicCache(config=tiny_config())
    logits(model, random_tokens(1, 20), past_key_values=cache)
    mask = torch.ones(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="all 25 cached and new tokens, got 5"):
        logits(model, random_tokens(1, 5), past_key_values=cache, attention_mask=mask)


def test_cu_seq_lens_come_as_four():
    arguments = cu_seq_lens([20, 25])
    del arguments["max_length_k"]
    with pytest.raises(ValueError, match="got no max_length_k"):
        logits(tiny_model(attn="moba"), random_tokens(1, 45), **arguments)


def test_packed_rows_cannot_continue_a_cache():
    model, cache = tiny_model(attn="moba"), DynamicCache(config=tiny_config())
    logits(model, random_tokens(1, 20), past_key_values=cache)
    positions = torch.tensor([[20, 21, 0, 1, 2]])
    with pytest.raises(ValueError, match="packed rows cannot continue a cache"):
        logits(model, random_tokens(1, 5), past_key_values=cache, position_ids=positions)


def test_a_name_without_configuration():
    hf.install("moba_unconfigured")
    with pytest.raises(ValueError, match="no MoBA configuration: call register_moba"):
        logits(tiny_model(attn="moba_unconfigured"), random_tokens(1, LENGTH))
