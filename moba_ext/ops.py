"""Loads the compiled libraries and completes ``torch.ops.moba``: backends, fake tensors, autograd.

Schemas and CPU registration are in ``csrc/ops.cpp``. ``moba::attention`` returns the block ids
because an autograd formula sees only inputs and outputs: without them the backward would gate
and route again.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import torch
from torch import Tensor

from . import flash, reference, sm90, varlen
from ._C import build_info

_LIB = Path(__file__).parent / "lib"
_BUILD_CUDA = (
    "moba_ext was built without its CUDA library: install it again with MOBA_CUDA=1 set "
    "(needs nvcc; MOBA_CUDA_ARCHS=90a names the GPU architecture), or use CPU tensors"
)
COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _load_libraries() -> str | None:
    """Loads what was built; returns why there is no CUDA library, None if there is one."""
    torch.ops.load_library(_LIB / "libmoba_cpu.so")
    if not (_LIB / "libmoba_cuda.so").exists():
        return _BUILD_CUDA
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA: install a CUDA build of torch"
    torch.ops.load_library(_LIB / "libmoba_cuda.so")
    return None


_CUDA_MISSING = _load_libraries()


def backend_status() -> dict[str, str | None]:
    """The known backends; None where available, else the reason why not."""
    return {
        "reference": None,
        "cpu": None,
        "flash": _CUDA_MISSING or varlen.unavailable(),
        "sm90": _CUDA_MISSING or varlen.unavailable() or _why_not_hopper(),
    }


@torch.compiler.assume_constant_result
def _why_not_hopper() -> str | None:
    return _not_hopper()


@functools.cache  # 2 us at every call
def _not_hopper() -> str | None:
    if torch.cuda.get_device_capability() != (9, 0):
        return "it needs compute capability 9.0 (Hopper)"
    if "90a" not in build_info()["cuda_archs"]:
        return (
            "moba_ext was built without code for sm_90a: install it again with MOBA_CUDA_ARCHS=90a"
        )
    return None


def cuda_status() -> str | None:
    """None if the CUDA library is loaded, else the reason why not, with the remedy."""
    return _CUDA_MISSING


def _why_not_gate(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why compiled block_mean and gate_topk can't take such tensors, in words that follow "q has";
    None if they can."""
    if dtype not in COMPILED_DTYPES:
        return f"dtype {dtype}, and compiled backends take float32, bfloat16 and float16"
    if head_dim % 8 or not 8 <= head_dim <= 256:
        return f"head_dim {head_dim}, and compiled backends take multiples of 8 from 8 to 256"
    if device not in ("cpu", "cuda", "meta"):
        return f"device {device}, and compiled backends take CPU and CUDA tensors"
    return None


def _why_not_cpu(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """The same of the cpu backend."""
    if device not in ("cpu", "meta"):
        return f"device {device}, and the cpu backend takes CPU tensors"
    return _why_not_gate(device, dtype, head_dim)


def _why_not_flash(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """The same of the flash backend."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {dtype}, and FlashAttention takes bfloat16 and float16"
    if head_dim % 8 or not 8 <= head_dim <= 256:
        return f"head_dim {head_dim}, and FlashAttention takes multiples of 8 from 8 to 256"
    if device not in ("cuda", "meta"):
        return f"device {device}, and the flash backend takes CUDA tensors"
    return None


def _why_not_sm90(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """The same of the sm90 backend."""
    if head_dim not in (64, 128):
        return f"head_dim {head_dim}, and the sm90 backend takes 64 and 128"
    return _why_not_flash(device, dtype, head_dim)


def _check_cuda_library(device: str) -> None:
    if device == "cuda" and _CUDA_MISSING is not None:
        raise ValueError(f"q is on a CUDA device, but {_CUDA_MISSING}")


def compiled_gate(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """None if block_mean and gate_topk run compiled on such tensors, else why not.

    Raises ValueError for CUDA tensors without the CUDA library.
    """
    _check_cuda_library(device)
    reason = _why_not_gate(device, dtype, head_dim)
    return reason and f"q has {reason}"


def resolve_backend(
    backend: str, device: str, dtype: torch.dtype, head_dim: int
) -> tuple[str, str]:
    """The backend that runs a call on such tensors, and why.

    Raises ValueError (TypeError for a dtype) where the named backend can't, or for CUDA tensors
    without the CUDA library unless the reference is asked for.
    """
    status = backend_status()
    if backend != "auto":
        if not isinstance(backend, str) or backend not in status:
            known = "; ".join(f"'{name}' ({why or 'available'})" for name, why in status.items())
            raise ValueError(f"backend is {backend!r}, must be 'auto' or one of: {known}")
        if status[backend] is not None:
            raise ValueError(f"backend is '{backend}', which is not available: {status[backend]}")
    if backend == "reference":
        return "reference", "asked for"
    why_not = {"cpu": _why_not_cpu, "flash": _why_not_flash, "sm90": _why_not_sm90}
    if backend != "auto":
        reason = why_not[backend](device, dtype, head_dim)
        if reason is None:
            return backend, "asked for"
        raise (TypeError if reason.startswith("dtype") else ValueError)(
            f"backend is '{backend}', but q has {reason}"
        )
    _check_cuda_library(device)
    if device == "cuda" and status["sm90"] is None and not _why_not_sm90(device, dtype, head_dim):
        return "sm90", "compiled kernels for Hopper"
    name = "flash" if device == "cuda" else "cpu"
    if status[name] is not None:
        return "reference", f"the {name} backend is not available: {status[name]}"
    reason = why_not[name](device, dtype, head_dim)
    if reason is not None:
        return "reference", f"q has {reason}"
    return name, f"compiled kernels for {'CUDA' if name == 'flash' else 'CPU'} tensors"


@functools.cache  # 2 us at every call
def _cuda_backend(backend: str, dtype: torch.dtype, head_dim: int):
    """The module, flash or sm90, that runs the op on CUDA tensors."""
    name, reason = resolve_backend(backend, "cuda", dtype, head_dim)
    if name not in ("flash", "sm90"):
        raise RuntimeError(
            f"backend is '{backend}', and on CUDA tensors the op runs 'flash' and 'sm90' only: "
            f"{reason} ('reference' is in moba_ext.moba_attention_varlen)"
        )
    return sm90 if name == "sm90" else flash


# By Library.impl, as what torch.library.register_kernel puts around a function takes longer.
_library = torch.library.Library("moba", "IMPL")


def _attention_cuda(
    q, k, v, cu_q, cu_k, max_q, max_k, block_size, topk, softmax_scale=None, backend="auto"
):
    sizes = max_q, max_k, block_size, topk, softmax_scale
    backend = _cuda_backend(backend, q.dtype, q.shape[-1])
    return backend.forward(q, k, v, cu_q, cu_k, *sizes)


def _attention_backward_cuda(
    dout, dlse, q, k, v, out, lse, block_ids, cu_q, cu_k, max_q, max_k, block_size, topk,
    softmax_scale=None, backend="auto",
):  # fmt: skip
    saved = q, k, v, out, lse, block_ids
    sizes = max_q, max_k, block_size, topk, softmax_scale
    backend = _cuda_backend(backend, q.dtype, q.shape[-1])
    return backend.backward(dout, dlse, *saved, cu_q, cu_k, *sizes)


_library.impl("attention", _attention_cuda, "CUDA")
_library.impl("attention_backward", _attention_backward_cuda, "CUDA")


@torch.library.register_fake("moba::attention")
def _(q, k, v, cu_q, cu_k, max_q, max_k, block_size, topk, softmax_scale=None, backend="auto"):
    slots = reference.num_slots(max_k, block_size, topk)
    return (
        q.new_empty(q.shape),
        q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32),
        q.new_empty((*q.shape[:2], slots), dtype=torch.int32),
    )


@torch.library.register_fake("moba::attention_backward")
def _(dout, dlse, q, k, v, *args, **kwargs):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake("moba::block_mean")
def _(k, cu_seqlens_k, block_size):
    return k.new_empty((k.shape[0] // block_size + cu_seqlens_k.shape[0] - 1, *k.shape[1:]))


@torch.library.register_fake("moba::gate_topk")
def _(q, kbar, cu_seqlens_q, cu_seqlens_k, tokens_k, max_seqlen_k, block_size, topk):
    shape = (*q.shape[:2], reference.num_slots(max_seqlen_k, block_size, topk))
    return q.new_empty(shape, dtype=torch.int32), q.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("moba::route")
def _(block_ids, cu_seqlens_q, cu_seqlens_k, tokens_k, heads_k, block_size):
    num_blocks = tokens_k // block_size + cu_seqlens_k.shape[0] - 1
    return (
        block_ids.new_empty(heads_k * num_blocks + 1, dtype=torch.int64),
        block_ids.new_empty(block_ids.numel(), dtype=torch.int64),
    )


class _Attention(torch.autograd.Function):
    """The derivative of ``moba::attention``, and ``results``, what that has returned."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, results, sizes):
        out, lse, block_ids = results
        ctx.sizes = sizes
        ctx.save_for_backward(q, k, v, out, lse, block_ids, cu_seqlens_q, cu_seqlens_k)
        ctx.mark_non_differentiable(block_ids)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None, _):
        saved = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(saved[3])
        elif dout.stride(-1) != 1:
            dout = dout.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        # What says that attention_backward has no derivative takes 0.01 ms.
        again = torch.is_grad_enabled()
        with contextlib.nullcontext() if again else torch._C._AutoDispatchBelowAutograd():
            around = not again and _goes_around(dout, *saved)
            op = _attention_backward_cuda if around else torch.ops.moba.attention_backward.default
            grads = op(dout, dlse, *saved, *ctx.sizes)
        return *grads, None, None, None, None


def _with_derivative(results: tuple, tensors: tuple[Tensor, ...], sizes: tuple):
    # Only now, as a Function takes 0.03 ms: the device has work meanwhile. Without gradients it has
    # nothing to do, but to say that it has no jvp.
    if torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0:
        return _Attention.apply(*tensors, results, sizes)
    return results


# register_autograd would do the same, but looks through the schema at every call, argument by
# argument, to fill in defaults: 0.09 of the 0.16 ms that the host needs for a small call.
def _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, *sizes) -> tuple[Tensor, Tensor, Tensor]:
    tensors = q, k, v, cu_seqlens_q, cu_seqlens_k
    with torch._C._AutoDispatchBelowAutograd():
        results = torch.ops.moba.attention.default(*tensors, *sizes)
    return _with_derivative(results, tensors, sizes)


_library.impl("attention", _attention, "Autograd")


def attention(
    tensors: tuple[Tensor, ...], sizes: tuple, prepared: tuple | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.moba.attention(*tensors, *sizes)`` -> out, lse, block_ids.

    On CUDA tensors not by way of the dispatcher, which comes back to Python twice, 0.02 ms of a
    call that the device waits for, unless someone has to see the op itself. With what
    ``sm90.prepare`` has made of such a call before, its kernels are next.
    """
    q, k, v, *_ = tensors
    if not _goes_around(*tensors):
        return torch.ops.moba.attention.default(*tensors, *sizes)
    with torch._C._AutoDispatchBelowAutograd():
        if prepared is not None and (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0:
            results = sm90.forward_prepared(*tensors, prepared)
        else:
            results = _attention_cuda(*tensors, *sizes)
    return _with_derivative(results, tensors, sizes)


def _goes_around(*tensors: Tensor) -> bool:
    """Whether an op of such tensors need not go by way of the dispatcher."""
    return tensors[0].is_cuda and {*map(type, tensors)} == {Tensor} and not _is_seen()


def _is_seen() -> bool:
    """Whether a compiler, functorch, a mode of torch's or a profiler looks at ops."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch.autograd._profiler_enabled()
    )


def _without_derivative(name: str, reason: str) -> None:
    def backward(ctx, *grads):
        raise RuntimeError(f"moba::{name} has no derivative: {reason}")

    torch.library.register_autograd(f"moba::{name}", backward)


_without_derivative("attention_backward", "moba::attention can be differentiated once")
_without_derivative("block_mean", "MoBA's gate takes no gradient (arXiv 2502.13189, section 2.2)")
_without_derivative("gate_topk", "MoBA's gate takes no gradient (arXiv 2502.13189, section 2.2)")
