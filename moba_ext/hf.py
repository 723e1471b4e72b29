"""MoBA in Hugging Face Transformers (5.4 or later), through its attention and mask interfaces.

    config = MoBAConfig(moba_chunk_size=4096, moba_topk=12, full_attention_layers=(-3, -2, -1))
    register_moba(config)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="moba")  # "moba_naive"

What a forward pass does::

    moba_mask               once: padding, cache length -> PackedLayout, where each sequence lies
    moba_attention_forward  every layer: pack [B, H, L, D] to [tokens, H, D], attend, unpack

Prefill, more than one query per row, runs MoBA. Decoding, one query per row, runs full attention,
as the paper deploys MoBA. A chunk of ``1 < M < L`` queries after a cache runs MoBA with the queries
aligned to the end of the keys, so prefill in chunks equals prefill at once; but a chunk of one
token counts as decoding, and tokens verified together in assisted generation count as a chunk. Full
attention, in decoding and in layers that keep it, is Transformers' own ``sdpa``.

Padding is packed away: a row of a padded batch gives what it gives alone. Sequences packed into one
row are told apart as flash attention does it, by ``position_ids`` that restart or by
``cu_seq_lens_q`` and its companions; ``torch.compile`` needs the latter and asserts it. What MoBA
cannot honour (dropout, output_attentions, sliding windows, softcap, sinks, other masks) is a
ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import Tensor, nn

from . import reference
from .attention import moba_attention_varlen

if Version(transformers.__version__) < Version("5.4"):
    found = f"found {transformers.__version__}: pip install -U transformers"
    raise ImportError(f"moba_ext needs transformers >= 5.4, {found}")

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

__all__ = ["MoBAConfig", "register_moba"]


@dataclass(frozen=True)
class MoBAConfig:
    """What MoBA needs to know about a model.

    moba_chunk_size: keys per block, >= 1.
    moba_topk: blocks a query attends to, its own included, >= 1.
    full_attention_layers: indices of the layers that keep full attention; negative ones count from
        the last layer, so ``(-3, -2, -1)`` is the published recipe.
    backend: as in :func:`moba_ext.moba_attention_varlen`.
    """

    moba_chunk_size: int
    moba_topk: int
    full_attention_layers: tuple[int, ...] = ()
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("moba_chunk_size", "moba_topk"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int >= 1, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        layers = self.full_attention_layers
        if not isinstance(layers, Sequence) or not all(isinstance(i, int) for i in layers):
            raise TypeError(f"full_attention_layers must hold layer indices, got {layers!r}")
        object.__setattr__(self, "full_attention_layers", tuple(layers))


class PackedLayout(NamedTuple):
    """Where the sequences lie in a batch of queries ``[B, M]`` and its keys ``[B, L]``.

    ``ndim`` and ``contiguous`` let ``generate`` carry it like the tensors that other masks are.
    """

    cu_seqlens_q: Tensor  # int32 [sequences + 1]
    cu_seqlens_k: Tensor  # int32 [sequences + 1]
    max_seqlen_q: int
    max_seqlen_k: int
    length_k: int  # L, the cache slots in use: the rest of a static cache is cut
    tokens_q: tuple[Tensor, Tensor] | None = None  # (row, column) of each query; None: no padding
    tokens_k: tuple[Tensor, Tensor] | None = None  # (row, column) of each key

    @property
    def ndim(self) -> int:
        return 0

    def contiguous(self) -> PackedLayout:
        return self


# attn_implementation -> its configuration; None: only for models that patch_llama gave one.
configs: dict[str, MoBAConfig | None] = {}


def register_moba(config: MoBAConfig, name: str = "moba") -> None:
    """Make ``attn_implementation=name``, and ``name + "_naive"`` for masked dense attention, known.

    Every forward pass looks its configuration up by name: registering a name again changes all
    models that use it. Models with different settings need different names, or
    :func:`moba_ext.patch_llama`, which keeps the configuration in the model.
    """
    if not isinstance(config, MoBAConfig):
        raise TypeError(f"config must be a MoBAConfig, got {type(config).__name__}")
    install(name)
    configs[name] = configs[f"{name}_naive"] = config


def install(name: str = "moba") -> None:
    """Register the functions of ``name`` and ``name + "_naive"``, not their configuration."""
    for key, attend in ((name, _moba), (f"{name}_naive", _moba_naive)):
        AttentionInterface.register(key, partial(moba_attention_forward, attend=attend))
        # Without a mask of the same name Transformers passes None, and padding is attended to.
        AttentionMaskInterface.register(key, moba_mask)
        configs.setdefault(key, None)


def moba_mask(
    q_length: int,
    mask_function: Callable,
    attention_mask: Tensor | PackedLayout | None = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    **rest,
) -> Tensor | PackedLayout | None:
    """The mask function; ``transformers.masking_utils`` describes the arguments.

    attention_mask: bool ``[B, L]`` or longer, True for tokens. Returns what
    ``moba_attention_forward`` takes: the mask of ``sdpa`` for one query per row, else a
    ``PackedLayout``.
    """
    if isinstance(attention_mask, PackedLayout):  # made ahead by generate
        return attention_mask
    if local_size is not None:
        raise _unsupported("sliding-window or chunked attention", "choose a model without it")
    if use_vmap:
        raise _unsupported("custom mask functions", "use attn_implementation='sdpa'")
    if q_length == 1:
        return sdpa_mask(
            q_length=q_length, mask_function=mask_function, attention_mask=attention_mask, **rest
        )
    batch, device, length = rest["batch_size"], rest["device"], int(rest["q_offset"]) + q_length
    if mask_function is not causal_mask_function:
        # Packed rows, which the attention function finds itself, or a mask that looks ahead.
        query, row = torch.arange(q_length - 1, device=device), torch.arange(batch, device=device)
        ahead = mask_function(row[:, None], torch.zeros_like(query), query, query + 1)
        _require(~ahead, "moba does not support non-causal masks: use attn_implementation='sdpa'")
    if attention_mask is not None and attention_mask.shape[1] < length:
        got = attention_mask.shape[1]
        raise ValueError(f"attention_mask must cover all {length} cached and new tokens, got {got}")
    if attention_mask is None or attention_mask[:, :length].all():
        rows = torch.arange(batch + 1, dtype=torch.int32, device=device)
        return PackedLayout(rows * q_length, rows * length, q_length, length, length)
    keep_k = attention_mask[:, :length]
    keep_q = keep_k[:, -q_length:]
    cu_q, cu_k = (F.pad(keep.sum(1).cumsum(0), (1, 0)).int() for keep in (keep_q, keep_k))
    tokens = [keep.nonzero(as_tuple=True) for keep in (keep_q, keep_k)]
    return PackedLayout(cu_q, cu_k, int(cu_q.diff().max()), int(cu_k.diff().max()), length, *tokens)


def moba_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PackedLayout | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    attend: Callable,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention function.

    query: ``[B, Hq, M, D]``, key and value: ``[B, Hk, L, D]``, longer for a static cache. Returns
    ``[B, M, Hq, D]``, zero where a query is padding, and no attention weights.
    """
    _reject_unsupported(module, dropout, kwargs)
    batch, _, length_q, _ = query.shape
    if length_q == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    if not isinstance(attention_mask, PackedLayout):
        got = None if attention_mask is None else f"shape {tuple(attention_mask.shape)}"
        raise _unsupported(f"ready-made masks, got {got}", "give the model a 2-D mask or none")
    config = getattr(module, "moba_config", None) or configs[module.config._attn_implementation]
    if config is None:
        raise ValueError("no MoBA configuration: call register_moba(config) or patch_llama")
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embedding and norms leave queries and keys in float32, beside 16-bit values.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    layout = _split_packed_rows(attention_mask, batch, length_q, kwargs)
    q, k, v = (x[:, :, : layout.length_k].transpose(1, 2) for x in (query, key, value))
    if layout.tokens_q is None:
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    else:
        q, k, v = q[layout.tokens_q], k[layout.tokens_k], v[layout.tokens_k]
    attend = partial(_full, module) if is_full(module, config) else partial(attend, config)
    out = attend(q, k, v, layout, scaling)
    if layout.tokens_q is None:
        return out.unflatten(0, (batch, length_q)), None
    return out.new_zeros(batch, length_q, *out.shape[1:]).index_put(layout.tokens_q, out), None


# Three kinds of attention over packed rows: q [Tq, Hq, D], k and v [Tk, Hk, D] -> [Tq, Hq, D].


def _moba(
    config: MoBAConfig, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scaling: float | None
) -> Tensor:
    sizes = {"block_size": config.moba_chunk_size, "topk": config.moba_topk}
    options = {"softmax_scale": scaling, "backend": config.backend}
    return moba_attention_varlen(q, k, v, *layout[:4], **sizes, **options)


def _moba_naive(
    config: MoBAConfig, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scaling: float | None
) -> Tensor:
    cu_q, cu_k, _, max_k = layout[:4]
    sizes = config.moba_chunk_size, config.moba_topk
    return reference.naive_attention_varlen(q, k, v, cu_q, cu_k, max_k, *sizes, scaling)[0]


def _full(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scaling: float | None
) -> Tensor:
    """Transformers' sdpa: sequences of one length in one call, others in a call each."""
    cu_q, cu_k, max_q, max_k = layout[:4]
    n = cu_q.shape[0] - 1
    if (q.shape[0], k.shape[0]) == (n * max_q, n * max_k):
        sequences = [(x.unflatten(0, (n, -1)) for x in (q, k, v))]
    else:
        cuts_q, cuts_k = cu_q[1:-1].tolist(), cu_k[1:-1].tolist()
        parts = (q.tensor_split(cuts_q), k.tensor_split(cuts_k), v.tensor_split(cuts_k))
        sequences = [(x[None] for x in part) for part in zip(*parts, strict=True) if len(part[0])]
    outs = []
    for sequence in sequences:  # [n or 1, length, H, D]
        query, key, value = (x.transpose(1, 2) for x in sequence)
        length_q, length_k = query.shape[2], key.shape[2]
        mask = None
        if 1 < length_q < length_k:
            mask = torch.ones(length_q, length_k, dtype=torch.bool, device=q.device)
            mask = mask.tril(length_k - length_q)[None, None]
        out, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)
        outs.append(out.flatten(0, 1))
    return torch.cat(outs)


def _split_packed_rows(
    layout: PackedLayout, batch: int, length_q: int, kwargs: dict
) -> PackedLayout:
    """Tell the sequences in a row apart, by flash attention's arguments or by position_ids."""
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    lengths = [kwargs.get(name) for name in names]
    missing = [name for name, value in zip(names, lengths, strict=True) if value is None]
    position_ids = kwargs.get("position_ids")
    if layout.tokens_q is not None or (len(missing) == 4 and position_ids is None):
        return layout
    if len(missing) == 4:
        restarts = position_ids.diff() != 1  # [1 or B, M - 1]
        if torch.compiler.is_compiling():
            _require(~restarts, f"packed rows under torch.compile need {', '.join(names)}")
            return layout
        if not restarts.any():
            return layout
        starts = F.pad(restarts, (1, 0), value=True).expand(batch, -1).flatten()
        cu_seqlens = F.pad(starts, (0, 1), value=True).nonzero().squeeze(1)
        lengths = [cu_seqlens, cu_seqlens, *[cu_seqlens.diff().max()] * 2]
    elif missing:
        raise ValueError(f"packed rows need {', '.join(names)}, got no {', '.join(missing)}")
    if layout.length_k != length_q:
        raise ValueError("packed rows cannot continue a cache: position_ids must not restart")
    cu_q, cu_k, max_q, max_k = lengths
    return PackedLayout(cu_q.int(), cu_k.int(), int(max_q), int(max_k), length_q)


def is_full(module: nn.Module, config: MoBAConfig) -> bool:
    """Does this layer keep full attention: as set_attention_mode said, else as configured."""
    mode = getattr(module, "moba_mode", None)
    layers = resolve_layers(config.full_attention_layers, module.config.num_hidden_layers)
    return mode == "full" or (mode is None and module.layer_idx in layers)


def resolve_layers(indices: Iterable[int], layers: int) -> set[int]:
    """Indices from 0 of the layers named; negative ones count from the last."""
    indices = list(indices)
    wrong = [index for index in indices if not -layers <= index < layers]
    if wrong:
        raise ValueError(f"layer indices must lie in [{-layers}, {layers}), got {wrong}")
    return {index % layers for index in indices}


def _reject_unsupported(module: nn.Module, dropout: float, kwargs: dict) -> None:
    if dropout > 0:
        raise _unsupported(f"dropout, got {dropout}", "load the model with attention_dropout=0")
    if kwargs.get("output_attentions") or module.config.output_attentions:
        raise _unsupported("output_attentions=True", "use attn_implementation='eager'")
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise _unsupported("is_causal=False", "use attn_implementation='sdpa'")
    # read_index: where in a paged cache the keys are.
    for name in ("sliding_window", "softcap", "s_aux", "position_bias", "read_index"):
        if kwargs.get(name) is not None:
            raise _unsupported(f"the attention argument {name}", "use attn_implementation='eager'")


def _unsupported(what: str, remedy: str) -> ValueError:
    return ValueError(f"moba does not support {what}: {remedy}")


def _require(condition: Tensor, message: str) -> None:
    """ValueError unless all are true; inside a compiled graph, an assertion of the graph."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition.all(), message)
    elif not condition.all():
        raise ValueError(message)
