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
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MAX_SEQUENCES = 65_535  # of a varlen call: FlashAttention has them in gridDim.y or z
_FOLDED = 2**26  # elements of a gradient that lse_grad has in float32 at a time
_MAX_OFFSET = 2**31 - 1  # in its backward's fp32 dq (seen in 2.8.3): beyond, it writes elsewhere


def needs_order(max_k: int, head_dim: int) -> bool:
    """Whether the bits of dq depend on the order in which FlashAttention's backward adds to it.

    It has tiles of 64 keys or more up to head_dim 128, each with its share of dq. Two shares always
    give the same: 0 + x + y = 0 + y + x.
    """
    return max_k > 128 or head_dim > 128


def ranges(size: int, step: int) -> list[tuple[int, int]]:
    """Of 0 to size, as long as step each; none where both are 0."""
    return [(first, min(first + step, size)) for first in range(0, size, max(step, 1))]


Places = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Where the gradients of q, k and v may be written, by a FlashAttention that can be told."""
ANYWHERE: Places = (None, None, None)


class Sequences(NamedTuple):
    """Offsets of the sequences of a varlen call, int32 ``[n + 1]``, and their host-side bounds."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    def calls(self) -> Iterator[Sequences]:
        """As many calls as FlashAttention's limit on sequences asks for."""
        sequences = self.cu_q.shape[0] - 1
        if sequences <= MAX_SEQUENCES:
            yield self
            return
        for first, last in ranges(sequences, MAX_SEQUENCES):
            yield self._replace(cu_q=self.cu_q[first : last + 1], cu_k=self.cu_k[first : last + 1])


@torch.compiler.assume_constant_result  # torch.compile can't trace the search for a package
def unavailable() -> str | None:
    """Why no FlashAttention can be called here; None if one can."""
    return _unavailable()


@functools.cache
def _unavailable() -> str | None:
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
    spec = importlib.util.find_spec("flash_attn")
    if spec is None or spec.origin is None:  # flash-attn-4 alone: a namespace, flash_attn.cute
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


class _Function(NamedTuple):
    """A function of flash_attn, and no sliding window under the names that this version has."""

    call: Callable
    window: dict


@functools.cache
def _function(function: Callable) -> _Function:
    # Since 2.7 these are custom ops of torch: 0.04 ms of the host for a forward, 0.2 ms for a
    # backward, whose function in Python takes 0.003 ms.
    call = getattr(function, "_init_fn", function)
    if "window_size" in inspect.signature(call).parameters:
        return _Function(call, {"window_size": (-1, -1)})
    return _Function(call, {"window_size_left": -1, "window_size_right": -1})


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
    call, window = _function(flash_attn._flash_attn_varlen_forward)
    # 8 values before 2.7 (out, q, k, v, out_padded, lse, ...), 4 since (out, lse, ...).
    results = call(
        *(q, k, v, cu_q, cu_k, max_q, max_k),
        **{"dropout_p": 0.0, "softmax_scale": scale, "causal": causal, **window},
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
    places: Places = ANYWHERE,
) -> tuple[Tensor, Tensor, Tensor]:
    cu_q, cu_k, max_q, max_k = sequences
    ordered = needs_order(max_k, q.shape[-1])
    flash_attn = package()
    if flash_attn is None:
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # state of dropout
        with deterministic() if ordered else contextlib.nullcontext():
            return torch.ops.aten._flash_attention_backward(
                *(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, causal, unused, unused),
                scale=scale,
            )
    call, window = _function(flash_attn._flash_attn_varlen_backward)
    dq, dk, dv = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if grad is None else grad
        for x, grad in zip((q, k, v), places)
    )
    call(
        *(dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, max_q, max_k),
        **{"dropout_p": 0.0, "softmax_scale": scale, "causal": causal, **window},
        **{"softcap": 0.0, "alibi_slopes": None, "deterministic": ordered},
    )
    return dq, dk, dv


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
    places: Places = ANYWHERE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, wherever they were written. The place of dq may be out, which is read
    before it is written."""

    def run(dout, v, out, places):
        return _backward_by_heads(dout, q, k, v, out, lse, sequences, scale, causal, places)

    dq, dk, dv = run(dout, v, out, places)
    if dlse is not None:
        ones = torch.zeros_like(v)
        ones[..., :2] = 1
        more_dq, more_dk, _ = run(dlse.dout, ones, torch.zeros_like(out), ANYWHERE)
        dq, dk = (
            (x.float() + more.float() * dlse.factor).to(x.dtype)
            for x, more in ((dq, more_dq), (dk, more_dk))
        )
    return dq, dk, dv


def accumulator_rows(rows: int, sequences: int) -> int:
    """Of FlashAttention's fp32 dq: every sequence has 128 more."""
    return rows + 128 * sequences


def accumulator_width(head_dim: int) -> int:
    step = 32 if head_dim <= 128 else 64
    return -(-head_dim // step) * step


def most_heads(rows: int, sequences: int, head_dim: int) -> int:
    """Of q, that FlashAttention's 32-bit offsets in its fp32 dq can have at once."""
    rows = accumulator_rows(rows, min(sequences, MAX_SEQUENCES))
    return _MAX_OFFSET // (rows * accumulator_width(head_dim))


def _backward_by_heads(dout, q, k, v, out, lse, sequences, scale, causal, places):
    """In parts of the heads where FlashAttention's fp32 dq would be too large for its offsets."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    most = most_heads(q.shape[0], sequences.cu_q.shape[0] - 1, q.shape[2])
    if heads <= most:
        return _backward_by_calls(dout, q, k, v, out, lse, sequences, scale, causal, places)
    if most == 0:
        raise RuntimeError(
            f"q has {q.shape[0]:,} rows, too many for the 32-bit offsets of FlashAttention's "
            "backward: split the batch"
        )
    # Whole KV heads, or equal parts of the query heads of one.
    step = most // group * group or max(n for n in range(1, most + 1) if group % n == 0)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    for begin, end in ranges(heads, step):
        of_q, of_k = slice(begin, end), slice(begin // group, -(-end // group))
        dq[:, of_q], *parts = _backward_by_calls(
            *(dout[:, of_q], q[:, of_q], k[:, of_k], v[:, of_k], out[:, of_q], lse[of_q]),
            *(sequences, scale, causal, ANYWHERE),
        )
        for total, part in zip((dk, dv), parts):
            total[:, of_k] += part
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _backward_by_calls(dout, q, k, v, out, lse, sequences, scale, causal, places):
    first, *others = sequences.calls()
    places = ANYWHERE if others else places
    grads = backward_call(dout, q, k, v, out, lse, first, scale, causal, places)
    for call in others:
        parts = backward_call(dout, q, k, v, out, lse, call, scale, causal)
        bounds = (call.cu_q, call.cu_k, call.cu_k)
        grads = tuple(_keep(x, y, cu, 0) for x, y, cu in zip(grads, parts, bounds))
    return grads


class LseGrad(NamedTuple):
    """dlse as a dout ``[rows, heads, D]`` and the factor of the gradients that it gives.

    With a v whose first two columns are 1, an out of 0 and this dout, dP is dlse and delta is 0.
    Two columns, because one 16-bit number would round dlse; the factor, so that they are no larger
    than 1 and float16 can hold them.
    """

    dout: Tensor
    factor: Tensor


def lse_grad(dlse: Tensor, no_keys: Tensor, dout: Tensor, out: Tensor) -> tuple[Tensor, LseGrad]:
    """What brings dlse into a backward that has no place for it: an out, and what is left.

    dS = P * (dP - delta + dlse) with delta = sum(dout * out), which FlashAttention sums itself: it
    gets an out that makes it delta - dlse. Rows whose dout is too small beside dlse are left to a
    backward of their own, :class:`LseGrad`; whether there are any only the device knows. Not all
    rows, as 16-bit gradients of two backwards keep the roundings of what cancels in their sum.

    dlse and no_keys ``[Hq, Tq]``, dout and out ``[Tq, Hq, D]``; what dlse says of rows without keys
    does not count.
    """
    dlse = dlse.masked_fill(no_keys, 0.0)
    given = torch.empty_like(out, memory_format=torch.contiguous_format)
    tokens, heads, head_dim = out.shape
    for begin, end in ranges(heads, max(1, _FOLDED // (tokens * head_dim))):
        part = slice(begin, end)
        # Beyond, squares are denormal or float16 could not hold the out.
        size = dout[:, part].float().norm(dim=-1)
        folds = (size > 1e-15) & (dlse[part].T.abs() <= 1024 * size)
        folded = _out_with_dlse(dout[:, part], out[:, part], torch.where(folds, dlse[part].T, 0.0))
        given[:, part] = torch.where(folds[..., None], folded, out[:, part])
        dlse[part].masked_fill_(folds.T, 0.0)
    return given, _rest_of_lse_grad(dlse, out)


def _out_with_dlse(dout: Tensor, out: Tensor, dlse: Tensor) -> Tensor:
    """An out with sum(dout * out) less by dlse ``[rows, heads]``: by the share of dout in each
    element; then two elements, one after the other, take what rounding has left. The first has the
    largest dout, the second a small product, so that its own rounding is nothing."""
    row = dout.float()
    delta = (row * out.float()).sum(-1, keepdim=True) - dlse[..., None]
    share = dlse[..., None] / row.square().sum(-1, keepdim=True)
    given = (out.float() - share * row).to(out.dtype)

    def settle(at: Tensor) -> Tensor:
        others = (row * given.float()).scatter(-1, at, 0.0).sum(-1, keepdim=True)
        return given.scatter(-1, at, ((delta - others) / row.gather(-1, at)).to(out.dtype))

    size, largest = row.abs().max(-1, keepdim=True)
    given = settle(largest)
    product = (row * given.float()).abs().scatter(-1, largest, torch.inf)
    product, smallest = product.masked_fill(row.abs() < size / 1024, torch.inf).min(
        -1, keepdim=True
    )
    return settle(torch.where(product.isinf(), largest, smallest))


def _rest_of_lse_grad(dlse: Tensor, like: Tensor) -> LseGrad:
    # Of the finite ones: another sequence's NaN must not reach this one's gradients.
    largest = dlse.nan_to_num(0.0, 0.0, 0.0).abs().amax()
    exponent = torch.frexp(largest.clamp(min=2.0**-100)).exponent  # largest < 2 ** exponent
    factor = torch.exp2((exponent - exponent.clamp(0, 15)).float())
    dout = torch.zeros_like(like, memory_format=torch.contiguous_format)
    share = (dlse / factor).T
    dout[..., 0] = share
    dout[..., 1] = share - dout[..., 0].float()
    return LseGrad(dout, factor)


def aligned(x: Tensor) -> Tensor:
    """x, or a copy: FlashAttention and our kernels load 16 bytes at a time from every row."""
    if has_aligned_rows(x) and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def has_aligned_rows(x: Tensor) -> bool:
    """Whether all rows are aligned as the first one is."""
    token_stride, head_stride, step = x.stride()
    return step == 1 and token_stride % 8 == head_stride % 8 == 0
