"""MoBA (Mixture of Block Attention) for PyTorch: exact, trainable block-sparse attention.

Start with :func:`moba_attention_varlen`, or with :func:`register_moba` for Transformers.
"""

from importlib import import_module

try:
    from ._C import build_info as _build_info
except ImportError as error:
    raise ImportError(
        f"moba_ext is not built for this Python ({error}): run `pip install -e .` in its folder"
    ) from error
from .attention import (
    BlockSelection,
    moba_attention,
    moba_attention_varlen,
    moba_attn_varlen,
    moba_attn_varlen_naive,
    select_blocks,
)
from .plan import Plan, plan

__version__ = _build_info()["version"]

# Imported on first use, so that moba_ext works without transformers.
_LAZY = {
    "MoBAConfig": "hf",
    "register_moba": "hf",
    "set_attention_mode": "llama",
    "patch_llama": "llama",
    "unpatch_llama": "llama",
}

__all__ = [
    "BlockSelection",
    "Plan",
    "moba_attention",
    "moba_attention_varlen",
    "moba_attn_varlen",
    "moba_attn_varlen_naive",
    "plan",
    "select_blocks",
    *_LAZY,
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
