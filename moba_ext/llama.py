"""MoBA in a Llama that is already loaded: patch it, switch its layers, take the patch off again.

    patch_llama(model, MoBAConfig(4096, 12, full_attention_layers=(-3, -2, -1)))
    set_attention_mode(model, "full", layers=[0, 1])
    unpatch_llama(model)

Nothing is rewritten: Transformers' attention layers look their attention function up by the name in
``model.config``, so a patch is that name, plus a ``moba_config`` and a ``moba_mode`` on every
attention layer for the registered function to read. Weights are never touched. It works for every
decoder with that interface and causal full attention: Llama, Qwen3, Mistral without a window, ...
In a multimodal model patch the language model inside. Models that share one config object share the
name in it, so they go to ``moba`` together.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .hf import MoBAConfig, configs, install, resolve_layers

__all__ = ["patch_llama", "set_attention_mode", "unpatch_llama"]


def patch_llama(model: nn.Module, config: MoBAConfig) -> None:
    """Make a loaded model, whatever its ``attn_implementation``, run MoBA with this configuration.

    The configuration belongs to this model and wins over a registered one; patching again replaces
    it.
    """
    if not isinstance(config, MoBAConfig):
        raise TypeError(f"config must be a MoBAConfig, got {type(config).__name__}")
    layers = _attention_layers(model)
    resolve_layers(config.full_attention_layers, len(layers))
    install()
    original = getattr(model, "moba_original", model.config._attn_implementation)
    model.set_attn_implementation("moba")
    if layers[0].config._attn_implementation != "moba":
        raise ValueError(f"{type(model).__name__} does not let its attention implementation be set")
    model.moba_original = original
    for layer in layers:
        layer.moba_config = config


def unpatch_llama(model: nn.Module) -> None:
    """Undo ``patch_llama`` and any ``set_attention_mode``: the model is as it was loaded."""
    if not hasattr(model, "moba_original"):
        raise ValueError(f"this {type(model).__name__} is not patched: call patch_llama first")
    model.set_attn_implementation(model.moba_original)
    del model.moba_original
    for layer in _attention_layers(model):
        del layer.moba_config
        layer.__dict__.pop("moba_mode", None)


def set_attention_mode(model: nn.Module, mode: str, layers: Iterable[int] | None = None) -> None:
    """Switch layers of a live model between full attention and MoBA.

    mode: ``"full"`` or ``"moba"``. layers: indices, negative ones count from the last layer. None
    is all of them, where ``"moba"`` means as configured: ``full_attention_layers`` stay full. The
    model must have been loaded with ``attn_implementation="moba"`` or patched by ``patch_llama``.
    """
    if mode not in ("full", "moba"):
        raise ValueError(f"mode must be 'full' or 'moba', got {mode!r}")
    modules = _attention_layers(model)
    implementation = modules[0].config._attn_implementation
    if implementation not in configs:
        raise ValueError(
            f"the model runs attn_implementation={implementation!r}: load it with 'moba' after "
            "register_moba, or call patch_llama(model, config) first"
        )
    if layers is None:
        for module in modules:
            module.moba_mode = None if mode == "moba" else mode
    else:
        for index in resolve_layers(layers, len(modules)):
            modules[index].moba_mode = mode


def _attention_layers(model: nn.Module) -> list[nn.Module]:
    """Attention layers that follow Transformers' attention interface, in order."""
    modules = list(model.modules())
    layers = [m for m in modules if hasattr(m, "layer_idx") and hasattr(m, "num_key_value_groups")]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layers with Transformers' attention interface"
        )
    return layers
