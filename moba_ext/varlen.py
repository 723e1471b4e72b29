"""FlashAttention's varlen API, forward and backward, from whichever FlashAttention is there.

The package flash-attn (2.6.3 or newer) where it is installed, else the one inside torch.
Deterministic, for any number of sequences, and with a gradient for the lse.

Source: arXiv 2307.08691 (FlashAttention-2).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MAX_SEQUENCES = 65_535  # of a varlen call: FlashAttention has them in gridDim.y or z


def ranges(size: int, step: int) -> list[tuple[int, int]]:
    return [(first, min(first + step, size)) for first in range(0, size, step)]


class Sequences(NamedTuple):
    """Offsets of the sequences of a varlen call, int32 ``[n + 1]``, and their host-side bounds."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    def calls(self) -> Iterator[Sequences]:
        """As many calls as FlashAttention's limit on sequences asks for."""
        for first, last in ranges(self.cu_q.shape[0] - 1, MAX_SEQUENCES):
            yield self._replace(cu_q=self.cu_q[first : last + 1], cu_k=self.cu_k[first : last + 1])


def unavailable() -> str | None:
    """Why no FlashAttention can be called here; None if one can."""
    if not torch.cuda.is_available():
        return "no GPU is visible to torch"
    if torch.cuda.get_device_capability() < (8, 0):
        return "FlashAttention needs compute capability 8.0 (Ampere) or newer"
    if package() is None and not torch.backends.cuda.is_flash_attention_available():
        return "neither the package flash-attn (2.6.3 or newer) nor one inside torch is there"
    return None


@functools.cache
def package():
    """flash_attn's interface module, None if it is not installed."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        import flash_attn
        from flash_attn import flash_attn_interface
    except ImportError as error:
        problem = f"flash-attn is installed and can't be imported ({error})"
    else:
        if _version(flash_attn.__version__) >= (2, 6, 3):
            return flash_attn_interface
        problem = f"flash-attn {flash_attn.__version__} is older than 2.6.3"
    warnings.warn(
        f"{problem}: moba_ext calls the FlashAttention inside torch instead", stacklevel=2
    )
    return None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", text)[:3])


def _window(function) -> dict:
    """No sliding window, under the names that this version of flash_attn has."""
    if "window_size" in inspect.signature(function).parameters:
        return {"window_size": (-1, -1)}
    return {"window_size_left": -1, "window_size_right": -1}


def forward_call(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    cu_q, cu_k, max_q, max_k = sequences
    # With max_seqlen_q 1 and GQA, FlashAttention trades heads for rows and the lse changes shape.
    max_q = max(max_q, 2)
    flash_attn = package()
    if flash_attn is None:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale
        )
        return out, lse
    call = flash_attn._flash_attn_varlen_forward
    # 8 values before 2.7 (out, q, k, v, out_padded, lse, ...), 4 since (out, lse, ...).
    results = call(
        *(q, k, v, cu_q, cu_k, max_q, max_k),
        **{"dropout_p": 0.0, "softmax_scale": scale, "causal": causal, **_window(call)},
    )
    return results[0], results[5 if len(results) == 8 else 1]


def backward_call(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    cu_q, cu_k, max_q, max_k = sequences
    flash_attn = package()
    if flash_attn is None:
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # state of dropout
        with deterministic():
            return torch.ops.aten._flash_attention_backward(
                *(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, causal, unused, unused),
                scale=scale,
            )
    call = flash_attn._flash_attn_varlen_backward
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    call(
        *(dout, q, k, v, out, lse, *grads, cu_q, cu_k, max_q, max_k),
        **{"dropout_p": 0.0, "softmax_scale": scale, "causal": causal, **_window(call)},
        **{"softcap": 0.0, "alibi_slopes": None, "deterministic": True},
    )
    return grads


@contextlib.contextmanager
def deterministic():
    """torch's own FlashAttention takes its deterministic backward from the global switch.

    Set by its debug mode, as use_deterministic_algorithms would change the inductor's settings too,
    and without the switch's other effect, which would fill every new buffer.
    """
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = fill and mode > 0
    torch.set_deterministic_debug_mode(2)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _keep(old: Tensor, new: Tensor, cu: Tensor, dim: int) -> Tensor:
    """``new`` in the tokens of the sequences that ``cu`` bounds, ``old`` elsewhere."""
    index = torch.arange(old.shape[dim], device=old.device)
    mine = (index >= cu[0]) & (index < cu[-1])
    return torch.where(mine.view([-1 if d == dim else 1 for d in range(old.dim())]), new, old)


def forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """q ``[Tq, Hq, D]``, k, v ``[Tk, Hk, D]`` -> out ``[Tq, Hq, D]``, lse ``[Hq, Tq]``."""
    first, *others = sequences.calls()
    out, lse = forward_call(q, k, v, first, scale, causal)
    for call in others:
        part_out, part_lse = forward_call(q, k, v, call, scale, causal)
        out, lse = _keep(out, part_out, call.cu_q, 0), _keep(lse, part_lse, call.cu_q, 1)
    return out, lse


def backward(
    dout: Tensor,
    dlse: LseGrad | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v."""

    def run(dout, v, out):
        first, *others = sequences.calls()
        grads = backward_call(dout, q, k, v, out, lse, first, scale, causal)
        for call in others:
            parts = backward_call(dout, q, k, v, out, lse, call, scale, causal)
            bounds = (call.cu_q, call.cu_k, call.cu_k)
            grads = tuple(_keep(x, y, cu, 0) for x, y, cu in zip(grads, parts, bounds))
        return grads

    dq, dk, dv = run(dout, v, out)
    if dlse is not None:
        ones = torch.zeros_like(v)
        ones[..., :2] = 1
        more_dq, more_dk, _ = run(dlse.dout, ones, torch.zeros_like(out))
        dq, dk = (
            (x.float() + more.float() * dlse.factor).to(x.dtype)
            for x, more in ((dq, more_dq), (dk, more_dk))
        )
    return dq, dk, dv


class LseGrad(NamedTuple):
    """dlse as a dout ``[rows, heads, D]`` and the factor of the gradients that it gives.

    dS = P * (dP - delta + dlse), and FlashAttention has no place for dlse. But with a v whose first
    two columns are 1, an out of 0 and this dout, dP is dlse and delta is 0. Two columns, because
    one 16-bit number would round dlse; the factor, so that they are no larger than 1 and float16
    can hold them.
    """

    dout: Tensor
    factor: Tensor


def lse_grad(dlse: Tensor, no_keys: Tensor, like: Tensor) -> LseGrad:
    """dlse and no_keys ``[Hq, Tq]``; what dlse says of rows without keys does not count."""
    dlse = dlse.masked_fill(no_keys, 0.0)
    # Of the finite ones: another sequence's NaN must not reach this one's gradients.
    largest = dlse.nan_to_num(0.0, 0.0, 0.0).abs().amax()
    factor = largest.clamp(min=torch.finfo(torch.float32).tiny)
    dout = torch.zeros_like(like, memory_format=torch.contiguous_format)
    share = (dlse / factor).T
    dout[..., 0] = share
    dout[..., 1] = share - dout[..., 0].float()
    return LseGrad(dout, factor)


def aligned(x: Tensor) -> Tensor:
    """x, or a copy: FlashAttention loads 16 bytes at a time from every row."""
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:-1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)
