"""The public functions: check arguments, pick a backend, call ``torch.ops.moba.attention``."""

from __future__ import annotations

import functools
import math
import numbers
import os
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from . import flash, ops, reference, sm90

__all__ = [
    "BlockSelection",
    "moba_attention",
    "moba_attention_varlen",
    "moba_attn_varlen",
    "moba_attn_varlen_naive",
    "select_blocks",
]

_DEBUG = os.environ.get("MOBA_DEBUG") == "1"
_REFERENCE_DTYPES = (*ops.COMPILED_DTYPES, torch.float64)


class BlockSelection(NamedTuple):
    """What the gate chose for every query.

    block_ids: int32 ``[Tq, Hq, K]``, chosen past blocks, local to the sequence, ascending, padded
        with -1. ``K = min(topk, blocks of the longest sequence) - 1``; the own block is always
        attended and not listed.
    scores: float32 ``[Tq, Hq, K]``, ``<q, kbar>`` of each, -inf where padded.
    counts: int32 ``[Tq, Hq]``, number of past blocks chosen.
    """

    block_ids: Tensor
    scores: Tensor
    counts: Tensor


def _check_int(name: str, value: object, allowed: str) -> None:
    # Most are an int: to ask whether a number is an Integral takes 1 us.
    if type(value) is not int and (
        isinstance(value, bool) or not isinstance(value, (torch.SymInt, numbers.Integral))
    ):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}), must be {allowed}")


def _check_positive(name: str, value: object) -> int:
    _check_int(name, value, "an int >= 1")
    if isinstance(value, torch.SymInt):
        return value
    if value < 1:
        raise ValueError(f"{name} is {value}, must be an int >= 1")
    return int(value)


def _check_scale(softmax_scale: object) -> float | None:
    if softmax_scale is not None and (
        isinstance(softmax_scale, bool) or not isinstance(softmax_scale, numbers.Real)
    ):
        kind = type(softmax_scale).__name__
        raise TypeError(f"softmax_scale is {softmax_scale!r} ({kind}), must be a number or None")
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale is {softmax_scale}, must be finite")
    return None if softmax_scale is None else float(softmax_scale)


def _check_rows(names: str, tensors: tuple[Tensor, ...], layout: str) -> None:
    """Ranks, dtypes, devices, heads, head_dim of q, k and maybe v."""
    dimensions = layout.count(",") + 1
    for name, x in zip(names, tensors):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is {type(x).__name__}, must be a torch.Tensor {layout}")
        if x.dim() != dimensions:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, must be {layout}")
    q, k = tensors[:2]
    dtype, device, head_dim = q.dtype, q.device, q.shape[-1]
    if dtype not in _REFERENCE_DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in _REFERENCE_DTYPES)
        raise TypeError(f"q has dtype {dtype}, must be one of {allowed}")
    for name, x in zip(names[1:], tensors[1:]):
        if x.dtype != dtype:
            raise TypeError(f"{name} has dtype {x.dtype}, must be that of q, {dtype}")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}, must be on the device of q, {device}")
        if x.shape[-1] != head_dim:
            raise ValueError(f"{name} has head_dim {x.shape[-1]}, must be that of q, {head_dim}")
    if len(tensors) == 3 and tensors[2].shape != k.shape:
        raise ValueError(
            f"v has shape {tuple(tensors[2].shape)}, must be that of k, {tuple(k.shape)}"
        )
    heads_q, heads_k = q.shape[-2], k.shape[-2]
    if heads_k < 1 or heads_q < 1 or heads_q % heads_k:
        raise ValueError(
            f"q has {heads_q} heads and k has {heads_k}: "
            "the heads of q must be a multiple of those of k"
        )


def _check_cu_seqlens(
    name: str, cu_seqlens: Tensor, tokens_name: str, tokens: int, device: torch.device
) -> int | None:
    """Returns the longest sequence, where values are read."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(
            f"{name} is {type(cu_seqlens).__name__}, must be an int32 tensor [batch + 1]"
        )
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {cu_seqlens.dtype}, must be torch.int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{name} has shape {tuple(cu_seqlens.shape)}, must be [batch + 1] with batch >= 1"
        )
    if cu_seqlens.device != device:
        raise ValueError(f"{name} is on {cu_seqlens.device}, must be on the device of q, {device}")
    if not _values_visible(cu_seqlens):
        return None
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0:
        raise ValueError(f"{name}[0] is {first}, must be 0")
    lengths = cu_seqlens.diff()
    shortest, longest = map(int, lengths.aminmax())
    if shortest < 0:
        at = int((lengths < 0).nonzero()[0]) + 1
        raise ValueError(f"{name} decreases at index {at}, must not decrease: {_shown(cu_seqlens)}")
    if last != tokens:
        raise ValueError(
            f"{name}[-1] is {last}, must be the number of tokens of {tokens_name}, {tokens}"
        )
    return longest


def _check_cu_seqlens_pair(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> tuple[int | None, int | None]:
    """Returns the longest sequences, where values are read."""
    longest_q = _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, "q", q.shape[0], q.device)
    longest_k = _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "k", k.shape[0], q.device)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k has {cu_seqlens_k.shape[0]} entries, must have as many as cu_seqlens_q, "
            f"{cu_seqlens_q.shape[0]}"
        )
    return longest_q, longest_k


def _check_max_seqlen(name: str, max_seqlen: object, longest: int | None) -> None:
    _check_int(name, max_seqlen, "an int")
    if longest is not None and max_seqlen < longest:
        raise ValueError(
            f"{name} is {max_seqlen}, must be at least the longest sequence, {longest}"
        )


class _Checked(NamedTuple):
    """What came of a call's checks."""

    sizes: tuple  # what the op takes after its tensors; the backend is never auto
    prepared: tuple | None  # by sm90.prepare


# By the signatures of calls: checks and plans take 30 us, and as much again where the caller's work
# has driven them out of the processor's caches.
_checked: dict[tuple, _Checked] = {}


def _check_call(tensors: tuple[Tensor, ...], numbers: tuple, backend: str) -> _Checked:
    """Of a packed call, q, k, v, cu_seqlens_q, cu_seqlens_k and max_seqlen_q, max_seqlen_k,
    block_size, topk, softmax_scale."""
    signature = _signature(tensors, numbers, backend)
    try:
        checked = None if signature is None else _checked.get(signature)
    except TypeError:  # something that can't be hashed
        checked = signature = None
    if checked is None:
        checked = _check_arguments(tensors, numbers, backend, signature is not None)
        if signature is not None:
            if len(_checked) >= 1024:
                _checked.clear()
            _checked[signature] = checked
    return checked


def _signature(tensors: tuple[Tensor, ...], numbers: tuple, backend: str) -> tuple | None:
    """All that is checked of such arguments on CUDA, and what prepare asks for; None where values
    are to be read, or tensors are of another kind."""
    q, k, v, cu_q, cu_k = tensors
    if (
        not type(q) is type(k) is type(v) is type(cu_q) is type(cu_k) is Tensor
        or not q.is_cuda
        or _DEBUG
        or torch.compiler.is_compiling()
    ):
        return None
    types = *map(type, numbers), type(backend)  # True is an int, and equals 1
    return (
        numbers, backend, types, flash.WORKSPACE_BYTES,
        q.shape, k.shape, v.shape, cu_q.shape, cu_k.shape, q.stride(), k.stride(), v.stride(),
        q.dtype, k.dtype, v.dtype, cu_q.dtype, cu_k.dtype,
        q.get_device(), k.get_device(), v.get_device(), cu_q.get_device(), cu_k.get_device(),
    )  # fmt: skip


def _check_arguments(
    tensors: tuple[Tensor, ...], numbers: tuple, backend: str, prepare: bool
) -> _Checked:
    q, k, v, cu_seqlens_q, cu_seqlens_k = tensors
    max_seqlen_q, max_seqlen_k, block_size, topk, softmax_scale = numbers
    _check_rows(("q", "k", "v"), (q, k, v), "[tokens, heads, head_dim]")
    longest_q, longest_k = _check_cu_seqlens_pair(q, k, cu_seqlens_q, cu_seqlens_k)
    _check_max_seqlen("max_seqlen_q", max_seqlen_q, longest_q)
    _check_max_seqlen("max_seqlen_k", max_seqlen_k, longest_k)
    block_size, topk = _check_positive("block_size", block_size), _check_positive("topk", topk)
    softmax_scale = _check_scale(softmax_scale)
    sizes = max_seqlen_q, max_seqlen_k, block_size, topk, softmax_scale
    name = _pick_backend(backend, q)
    prepared = sm90.prepare(tensors, sizes) if prepare and name == "sm90" else None
    return _Checked((*sizes, name), prepared)


def _values_visible(tensor: Tensor) -> bool:
    """Values are read where that costs no sync and breaks no graph, and under MOBA_DEBUG=1."""
    if torch.compiler.is_compiling():
        return False
    device = tensor.device.type
    if device != "cpu" and (device == "meta" or not _DEBUG):
        return False
    return not isinstance(tensor, torch._subclasses.FakeTensor)


def _shown(tensor: Tensor) -> str:
    values = tensor.tolist()
    return str(values if len(values) <= 10 else [*values[:5], "...", *values[-3:]])


@functools.cache
def _warn_once(message: str, stacklevel: int) -> None:
    warnings.warn(message, stacklevel=stacklevel)


def _pick_backend(backend: str, q: Tensor) -> str:
    name, reason = ops.resolve_backend(backend, q.device.type, q.dtype, q.shape[-1])
    if backend == "auto" and name == "reference":
        _warn_of_reference(reason, stacklevel=7)
    return name


def _warn_of_reference(reason: str, stacklevel: int) -> None:
    if not torch.compiler.is_compiling():
        _warn_once(f"moba_ext runs its slow reference backend: {reason}", stacklevel)


def moba_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    block_size: int,
    topk: int,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """MoBA over a packed batch of sequences, causal, differentiable in q, k and v.

    Every query attends, in one softmax, to the keys up to its own position in its own block of
    ``block_size`` keys and to the ``topk - 1`` past blocks whose mean key has the largest inner
    product with it. ``topk * block_size >= `` sequence length is full causal attention.

    Args:
        q: ``[Tq, Hq, D]``; float32, bfloat16, float16 (float64 on the reference backend).
        k, v: ``[Tk, Hk, D]``, dtype and device of q; ``Hq`` is a multiple of ``Hk`` (GQA, MQA),
            query head ``h`` uses KV head ``h // (Hq // Hk)``. Keys are taken as given, so rotate
            them (RoPE) before.
        cu_seqlens_q, cu_seqlens_k: int32 ``[batch + 1]``, first token of every sequence, from 0
            to ``Tq`` and ``Tk``, on the device of q. A sequence may be empty. Queries are aligned
            to the end of their keys, as in a prefill by chunks; a query before the first key has
            output 0 and lse -inf.
        max_seqlen_q, max_seqlen_k: longest sequence, in tokens; a larger bound is allowed.
        block_size: keys per block, >= 1.
        topk: blocks per query including its own, >= 1; may exceed the number of blocks.
        softmax_scale: factor of the scores in the softmax, ``D ** -0.5`` if None. It never enters
            the gate.
        return_lse: also return the log-sum-exp.
        backend: ``"auto"``, ``"cpu"`` (compiled; CPU tensors, head_dim a multiple of 8 up to 256),
            ``"flash"`` (CUDA gate and routing around FlashAttention; bfloat16 and float16 on GPUs
            of compute capability 8.0 and up, the same head dims), ``"sm90"`` (our own kernels for
            Hopper, compute capability 9.0, forward and backward; the same dtypes, head_dim 64 and
            128) or ``"reference"`` (PyTorch, any device and head_dim, slow). ``auto`` takes
            sm90 where it can, and warns once when it must take the reference.

    Returns:
        out ``[Tq, Hq, D]`` in the dtype of q; with ``return_lse`` also lse, natural logarithm,
        float32 ``[Hq, Tq]``, differentiable.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or value; the message names it.
            Inside ``torch.compile`` the values of cu_seqlens are checked by the op, which raises
            RuntimeError. On CUDA they are not read, which would wait for the device, unless the
            environment has MOBA_DEBUG=1 when moba_ext is imported.

    Source: arXiv 2502.13189, section 2.2.
    """
    numbers = max_seqlen_q, max_seqlen_k, block_size, topk, softmax_scale
    tensors = q, k, v, cu_seqlens_q, cu_seqlens_k
    sizes, prepared = _check_call(tensors, numbers, backend)
    if sizes[-1] == "reference":
        out, lse, _ = reference.moba_attention_varlen(*tensors, *sizes[1:-1])
    else:
        if prepared is None:
            q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
            tensors = q, k, v, cu_seqlens_q, cu_seqlens_k
        out, lse, _ = ops.attention(tensors, sizes, prepared)
    return (out, lse) if return_lse else out


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    topk: int,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """MoBA over a batch of sequences of one length; see :func:`moba_attention_varlen`.

    q: ``[B, M, Hq, D]``; k, v: ``[B, L, Hk, D]``. With ``M < L`` the queries are the last ``M``
        positions. Returns out ``[B, M, Hq, D]`` and, with ``return_lse``, lse float32 ``[B, Hq,
        M]``. Inputs whose batch and token dimensions merge into one without a copy are not
        copied.
    """
    _check_rows(("q", "k", "v"), (q, k, v), "[batch, tokens, heads, head_dim]")
    batch, queries, heads = q.shape[:3]
    keys = k.shape[1]
    if k.shape[0] != batch:
        raise ValueError(f"k has batch size {k.shape[0]}, must be that of q, {batch}")
    if batch < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}, must have a batch of at least 1")
    cu_seqlens_q = _offsets(batch, queries, q.device)
    cu_seqlens_k = cu_seqlens_q if keys == queries else _offsets(batch, keys, q.device)
    result = moba_attention_varlen(
        *(x.flatten(0, 1) for x in (q, k, v)),
        cu_seqlens_q,
        cu_seqlens_k,
        queries,
        keys,
        block_size=block_size,
        topk=topk,
        softmax_scale=softmax_scale,
        return_lse=return_lse,
        backend=backend,
    )
    if not return_lse:
        return result.view(q.shape)
    out, lse = result
    return out.view(q.shape), lse.view(heads, batch, queries).transpose(0, 1)


def _offsets(batch: int, length: int, device: torch.device) -> Tensor:
    """cu_seqlens of sequences of one length, in one launch."""
    if length == 0:
        return torch.zeros(batch + 1, dtype=torch.int32, device=device)
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)


def select_blocks(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    topk: int,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> BlockSelection:
    """Which past blocks every query takes, and with what score: the gate alone.

    q: ``[Tq, Hq, D]``, k: ``[Tk, Hk, D]`` packed. Without cu_seqlens they are one sequence.
        ``max_seqlen_k`` is the longest sequence of keys; None reads it from cu_seqlens_k, which
        waits for the device on CUDA. No gradient flows through a selection. Dtypes, devices and
        errors as in :func:`moba_attention_varlen`.
    """
    _check_rows(("q", "k"), (q, k), "[tokens, heads, head_dim]")
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        given, missing = (
            ("cu_seqlens_q", "cu_seqlens_k")
            if cu_seqlens_k is None
            else ("cu_seqlens_k", "cu_seqlens_q")
        )
        raise ValueError(f"{given} is given and {missing} is None: give both or neither")
    if cu_seqlens_q is None:
        cu_seqlens_q, cu_seqlens_k = (
            torch.tensor([0, x.shape[0]], dtype=torch.int32, device=q.device) for x in (q, k)
        )
        max_seqlen_k = k.shape[0]
    _, longest_k = _check_cu_seqlens_pair(q, k, cu_seqlens_q, cu_seqlens_k)
    if max_seqlen_k is None:
        max_seqlen_k = int(cu_seqlens_k.diff().max())
    _check_max_seqlen("max_seqlen_k", max_seqlen_k, longest_k)
    block_size, topk = _check_positive("block_size", block_size), _check_positive("topk", topk)
    q, k = (x.detach() if x.stride(-1) == 1 else x.detach().contiguous() for x in (q, k))
    why_not = ops.compiled_gate(q.device.type, q.dtype, q.shape[-1])
    if why_not is not None:
        _warn_of_reference(why_not, stacklevel=4)
        kbar = reference.block_mean(k, cu_seqlens_k, block_size)
        ids, scores = reference.gate_topk(
            q, kbar, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, block_size, topk
        )
    else:
        kbar = torch.ops.moba.block_mean(k, cu_seqlens_k, block_size)
        ids, scores = torch.ops.moba.gate_topk(
            q, kbar, cu_seqlens_q, cu_seqlens_k, k.shape[0], max_seqlen_k, block_size, topk
        )
    return BlockSelection(ids, scores, (ids >= 0).sum(-1, dtype=torch.int32))


def moba_attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    moba_chunk_size: int,
    moba_topk: int,
) -> Tensor:
    """Drop-in for the function of the same name in the original MoBA package.

    q: ``[T, Hq, D]``, k and v: ``[T, Hk, D]``, cu_seqlens int32 ``[batch + 1]``. Returns ``[T,
        Hq, D]``. One
    difference: ``moba_topk=1`` attends to the own block alone, where the original takes full
        attention.
    """
    return moba_attention_varlen(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        block_size=moba_chunk_size,
        topk=moba_topk,
    )


def moba_attn_varlen_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    moba_chunk_size: int,
    moba_topk: int,
    *,
    return_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same attention as dense attention under a mask, for debugging and pictures.

    Takes the arguments of :func:`moba_attn_varlen`; costs the time and memory of full attention,
    O(L^2) per head. With ``return_mask`` also returns the boolean block mask ``[T, Hq, blocks of
    the longest sequence]``,
    own block included: ``plt.imshow(mask[:, head])``.
    """
    _check_rows(("q", "k", "v"), (q, k, v), "[tokens, heads, head_dim]")
    for name, x in (("q", q), ("k", k)):
        longest = _check_cu_seqlens("cu_seqlens", cu_seqlens, name, x.shape[0], q.device)
    _check_max_seqlen("max_seqlen", max_seqlen, longest)
    block_size = _check_positive("moba_chunk_size", moba_chunk_size)
    topk = _check_positive("moba_topk", moba_topk)
    out, mask = reference.naive_attention_varlen(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, block_size, topk
    )
    return (out, mask) if return_mask else out
