"""Bad input: an error of the right type that names the argument, what came and what is allowed."""

import math
import re
import warnings

import pytest
import torch

import moba_ext


def arguments(**changes):
    """A good call of moba_attention_varlen, with changes."""
    good = {
        "q": torch.randn(40, 4, 16),
        "k": torch.randn(50, 2, 16),
        "v": torch.randn(50, 2, 16),
        "cu_seqlens_q": torch.tensor([0, 10, 40], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 20, 50], dtype=torch.int32),
        "max_seqlen_q": 30,
        "max_seqlen_k": 30,
        "block_size": 8,
        "topk": 3,
    }
    return {**good, **changes}


def offsets(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def test_the_good_call():
    assert moba_ext.moba_attention_varlen(**arguments()).shape == (40, 4, 16)


BAD = [
    # ranks and types
    (
        {"q": torch.randn(1, 40, 4, 16)},
        ValueError,
        "q has shape (1, 40, 4, 16), must be [tokens, heads, head_dim]",
    ),
    (
        {"k": torch.randn(50, 32)},
        ValueError,
        "k has shape (50, 32), must be [tokens, heads, head_dim]",
    ),
    ({"v": [1.0]}, TypeError, "v is list, must be a torch.Tensor [tokens, heads, head_dim]"),
    # dtypes
    (
        {"q": torch.ones(40, 4, 16, dtype=torch.int32)},
        TypeError,
        "q has dtype torch.int32, must be one of float32, bfloat16, float16, float64",
    ),
    (
        {"k": torch.randn(50, 2, 16).half()},
        TypeError,
        "k has dtype torch.float16, must be that of q, torch.float32",
    ),
    (
        {"v": torch.randn(50, 2, 16).double()},
        TypeError,
        "v has dtype torch.float64, must be that of q, torch.float32",
    ),
    # devices
    (
        {"k": torch.empty(50, 2, 16, device="meta")},
        ValueError,
        "k is on meta, must be on the device of q, cpu",
    ),
    (
        {"cu_seqlens_q": torch.empty(3, dtype=torch.int32, device="meta")},
        ValueError,
        "cu_seqlens_q is on meta, must be on the device of q, cpu",
    ),
    # shapes that don't fit
    (
        {"q": torch.randn(40, 3, 16)},
        ValueError,
        "q has 3 heads and k has 2: the heads of q must be a multiple of those of k",
    ),
    (
        {"k": torch.randn(50, 2, 24), "v": torch.randn(50, 2, 24)},
        ValueError,
        "k has head_dim 24, must be that of q, 16",
    ),
    (
        {"v": torch.randn(49, 2, 16)},
        ValueError,
        "v has shape (49, 2, 16), must be that of k, (50, 2, 16)",
    ),
    # cu_seqlens
    (
        {"cu_seqlens_q": [0, 10, 40]},
        TypeError,
        "cu_seqlens_q is list, must be an int32 tensor [batch + 1]",
    ),
    (
        {"cu_seqlens_q": offsets(0, 10, 40, dtype=torch.int64)},
        TypeError,
        "cu_seqlens_q has dtype torch.int64, must be torch.int32",
    ),
    (
        {"cu_seqlens_k": offsets(0)},
        ValueError,
        "cu_seqlens_k has shape (1,), must be [batch + 1] with batch >= 1",
    ),
    ({"cu_seqlens_k": offsets(5, 20, 50)}, ValueError, "cu_seqlens_k[0] is 5, must be 0"),
    (
        {"cu_seqlens_k": offsets(0, 60, 50)},
        ValueError,
        "cu_seqlens_k decreases at index 2, must not decrease: [0, 60, 50]",
    ),
    (
        {"cu_seqlens_k": offsets(0, 20, 49)},
        ValueError,
        "cu_seqlens_k[-1] is 49, must be the number of tokens of k, 50",
    ),
    (
        {"cu_seqlens_q": offsets(0, 40)},
        ValueError,
        "cu_seqlens_k has 3 entries, must have as many as cu_seqlens_q, 2",
    ),
    (
        {"max_seqlen_k": 29},
        ValueError,
        "max_seqlen_k is 29, must be at least the longest sequence, 30",
    ),
    (
        {"max_seqlen_q": 29},
        ValueError,
        "max_seqlen_q is 29, must be at least the longest sequence, 30",
    ),
    ({"max_seqlen_q": 30.0}, TypeError, "max_seqlen_q is 30.0 (float), must be an int"),
    # numbers
    ({"block_size": 0}, ValueError, "block_size is 0, must be an int >= 1"),
    ({"block_size": 8.0}, TypeError, "block_size is 8.0 (float), must be an int >= 1"),
    ({"topk": -1}, ValueError, "topk is -1, must be an int >= 1"),
    ({"topk": True}, TypeError, "topk is True (bool), must be an int >= 1"),
    ({"topk": None}, TypeError, "topk is None (NoneType), must be an int >= 1"),
    ({"softmax_scale": math.nan}, ValueError, "softmax_scale is nan, must be finite"),
    ({"softmax_scale": "0.1"}, TypeError, "softmax_scale is '0.1' (str), must be a number or None"),
    # backends
    (
        {"backend": "fast"},
        ValueError,
        "backend is 'fast', must be 'auto' or one of: 'reference' (available); "
        "'cpu' (available); 'flash' (",
    ),
    ({"backend": None}, ValueError, "backend is None, must be 'auto' or one of"),
    (
        {"backend": "sm90"},
        ValueError,
        "backend is 'sm90', which is not available: ",
    ),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), BAD, ids=[message[:50] for _, _, message in BAD]
)
def test_bad_argument(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        moba_ext.moba_attention_varlen(**arguments(**changes))


def test_named_compiled_backend_refuses_what_it_cannot_take():
    double = {name: torch.randn(50, 2, 16, dtype=torch.float64) for name in "qkv"}
    one = {
        "cu_seqlens_q": offsets(0, 50),
        "cu_seqlens_k": offsets(0, 50),
        "max_seqlen_q": 50,
        "max_seqlen_k": 50,
    }
    with pytest.raises(TypeError, match="backend is 'cpu', but q has dtype torch.float64"):
        moba_ext.moba_attention_varlen(**arguments(**double, **one, backend="cpu"))
    odd = {name: torch.randn(50, 2, 20) for name in "qkv"}
    with pytest.raises(
        ValueError,
        match="backend is 'cpu', but q has head_dim 20, and compiled backends take multiples of 8",
    ):
        moba_ext.moba_attention_varlen(**arguments(**odd, **one, backend="cpu"))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [(torch.float64, 16, "dtype torch.float64"), (torch.float32, 20, "head_dim 20")],
)
def test_auto_says_once_that_it_takes_the_reference(dtype, head_dim, reason):
    q = torch.randn(1, 30, 1, head_dim, dtype=dtype)
    moba_ext.attention._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=f"slow reference backend: q has {reason}"):
        out = moba_ext.moba_attention(q, q, q, block_size=8, topk=2)
    assert out.dtype == dtype
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moba_ext.moba_attention(q, q, q, block_size=8, topk=2)


def test_batched_call():
    q = torch.randn(2, 10, 4, 16)
    with pytest.raises(
        ValueError,
        match=re.escape("k has shape (20, 2, 16), must be [batch, tokens, heads, head_dim]"),
    ):
        moba_ext.moba_attention(
            q, torch.randn(20, 2, 16), torch.randn(20, 2, 16), block_size=4, topk=2
        )
    k = torch.randn(3, 10, 4, 16)
    with pytest.raises(ValueError, match="k has batch size 3, must be that of q, 2"):
        moba_ext.moba_attention(q, k, k, block_size=4, topk=2)


def test_select_blocks_call():
    q = torch.randn(10, 1, 16)
    with pytest.raises(
        ValueError, match="cu_seqlens_q is given and cu_seqlens_k is None: give both or neither"
    ):
        moba_ext.select_blocks(q, q, block_size=4, topk=2, cu_seqlens_q=offsets(0, 10))
    with pytest.raises(ValueError, match="topk is 0, must be an int >= 1"):
        moba_ext.select_blocks(q, q, block_size=4, topk=0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seqlens_q": []}, ValueError, "seqlens_q is empty"),
        ({"seqlens_q": [4, 2.5]}, TypeError, "seqlens_q has 2.5 (float), must be int lengths"),
        ({"seqlens_q": -3}, ValueError, "seqlens_q has -3, must be lengths >= 0"),
        ({"seqlens_q": 2**62 + 1}, ValueError, "tokens, must be below 2^31: offsets are int32"),
        (
            {"seqlens_k": [1, 2]},
            ValueError,
            "seqlens_k has 2 sequences, must have as many as seqlens_q, 1",
        ),
        ({"heads_k": 3}, ValueError, "heads_q is 4, must be a multiple of heads_k, 3"),
        ({"head_dim": 0}, ValueError, "head_dim is 0, must be an int >= 1"),
        ({"dtype": "bf16"}, TypeError, "dtype is 'bf16', must be a torch.dtype"),
        ({"backend": "sm90"}, ValueError, "backend is 'sm90', which is not available"),
    ],
)
def test_plan_call(changes, error, message):
    good = {"seqlens_q": 100, "heads_q": 4, "head_dim": 64, "block_size": 16, "topk": 2}
    with pytest.raises(error, match=re.escape(message)):
        moba_ext.plan(**{**good, **changes})


OP_CHANGES = [
    ({"k": torch.randn(50, 2, 16).half()}, "k has another dtype than q"),
    ({"q": torch.randn(40, 4, 16).double()}, "k has another dtype than q"),
    ({"cu_seqlens_q": offsets(0, 10, 41)}, "cu_seqlens_q ends at 41, but there are 40 tokens"),
    ({"cu_seqlens_k": offsets(0, 60, 50)}, "cu_seqlens_k decreases at 2"),
    ({"cu_seqlens_k": offsets(-1, 20, 50)}, "cu_seqlens_k[0] is -1, must be 0"),
    ({"cu_seqlens_k": offsets(0, 20, 50, dtype=torch.int64)}, "cu_seqlens_k must be int32"),
    ({"max_seqlen_k": 10}, "max_seqlen_k is 10, but sequence 0 has 20 tokens"),
    ({"block_size": 0}, "block_size is 0, must be at least 1"),
    ({"topk": 0}, "topk is 0, must be at least 1"),
    ({"softmax_scale": math.inf}, "softmax_scale is inf, must be finite"),
    ({"q": torch.randn(40, 3, 16)}, "q has 3 heads and k has 2"),
    ({"q": torch.randn(16, 4, 40).transpose(0, 2)}, "q must be contiguous in its last dimension"),
    ({"backend": "flash"}, "backend is 'flash', CPU tensors take 'auto' or 'cpu' here"),
]


@pytest.mark.parametrize(
    ("changes", "message"), OP_CHANGES, ids=[message[:40] for _, message in OP_CHANGES]
)
def test_the_op_checks_for_itself(changes, message):
    """torch.ops.moba.attention is reached without the Python checks, for instance when compiled."""
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.moba.attention(**arguments(**changes))


def test_op_refuses_dtypes_and_head_dims_that_kernels_lack():
    for dtype, head_dim, message in (
        (torch.float64, 16, "dtype must be float32"),
        (torch.float32, 12, "head_dim is 12"),
        (torch.float32, 264, "head_dim is 264"),
    ):
        x = torch.randn(10, 1, head_dim, dtype=dtype)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.moba.attention(x, x, x, offsets(0, 10), offsets(0, 10), 10, 10, 4, 2)


def test_backward_op_refuses_foreign_block_ids():
    call = arguments()
    out, lse, ids = torch.ops.moba.attention(**call)
    rest = list(call.values())
    with pytest.raises(RuntimeError, match="block_ids has 9, but sequence 0 has 3 blocks"):
        torch.ops.moba.attention_backward(out, None, *rest[:3], out, lse, ids.fill_(9), *rest[3:])
    with pytest.raises(
        RuntimeError, match=re.escape("block_ids must be [40, 4, 2], as attention returned it")
    ):
        torch.ops.moba.attention_backward(out, None, *rest[:3], out, lse, ids[:20], *rest[3:])


def test_vmap_loops_over_the_batch():
    q = torch.randn(2, 10, 1, 16)
    cu_seqlens = offsets(0, 10)

    def attention(x):
        return torch.ops.moba.attention(x, x, x, cu_seqlens, cu_seqlens, 10, 10, 4, 2)[0]

    assert torch.equal(torch.func.vmap(attention)(q), torch.stack([attention(x) for x in q]))


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_call_like_one_before_is_checked_too(device):
    """On CUDA arguments that have been checked are known, as no values are read."""

    def to_device(x):
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(device, torch.bfloat16 if x.is_floating_point() else x.dtype)

    def call(**changes):
        good = {name: to_device(x) for name, x in known_call.items()}
        return moba_ext.moba_attention_varlen(**{**good, **changes})

    q, k, v = (torch.randn(*shape, 64) for shape in ((40, 4), (50, 2), (50, 2)))
    known_call = arguments(q=q, k=k, v=v, topk=1, softmax_scale=1.0)
    known = moba_ext.attention._checked
    known.clear()
    for _ in range(2):
        assert call().shape == (40, 4, 64)
    assert len(known) == (device == "cuda")
    for changes, error, message in [
        ({"topk": True}, TypeError, "topk is True"),
        ({"block_size": 8.0}, TypeError, "block_size is 8.0"),
        ({"softmax_scale": True}, TypeError, "softmax_scale is True"),
        ({"topk": [1]}, TypeError, "topk is [1]"),
        ({"max_seqlen_k": None}, TypeError, "max_seqlen_k is None"),
        ({"softmax_scale": math.nan}, ValueError, "softmax_scale is nan"),
        ({"backend": "gpu"}, ValueError, "backend is 'gpu', must be 'auto' or one of"),
        ({"backend": ["auto"]}, ValueError, "backend is ['auto'], must be 'auto' or one of"),
        ({"k": to_device(torch.randn(50, 3, 64))}, ValueError, "v has shape (50, 2, 64)"),
        ({"v": v.to(torch.bfloat16)}, ValueError, "v is on cpu"),
        ({"v": to_device(v).half()}, TypeError, "v has dtype torch.float16"),
        ({"cu_seqlens_q": to_device(offsets(0, 40))}, ValueError, "cu_seqlens_k has 3 entries"),
        (
            {"cu_seqlens_k": to_device(offsets(0, 20, 50, dtype=torch.int64))},
            TypeError,
            "cu_seqlens_k has dtype torch.int64",
        ),
    ]:
        for _ in range(2):
            with pytest.raises(error, match=re.escape(message)):
                call(**changes)
    assert len(known) == (device == "cuda")
    for topk in range(2, 1030):
        call(topk=topk)
    assert len(known) <= 1024
