"""Times the gate alone on one GPU: ``python benchmarks/gate_topk_cuda.py [ROW ...]``.

Rows as in the project's table of targets: bfloat16, head_dim 128, one causal sequence. Random
inputs; C+ is row C with scores that rise with recency. TFLOP counts past blocks only.
"""

import statistics
import sys

import torch

import moba_ext  # noqa: F401  (loads the ops)

ROWS = {  # length, heads of q, of k, block_size, topk
    "A": (8_192, 16, 16, 128, 8),
    "B": (32_768, 16, 16, 128, 8),
    "C": (131_072, 16, 16, 128, 8),
    "C+": (131_072, 16, 16, 128, 8),
    "D": (524_288, 16, 16, 128, 8),
    "F": (131_072, 16, 16, 512, 3),
    "H": (32_768, 32, 8, 128, 8),
    "1M": (1_048_576, 32, 8, 128, 8),
}
HEAD_DIM = 128


def inputs(length: int, heads_q: int, heads_k: int, block_size: int, rising: bool):
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    q = torch.randn(length, heads_q, HEAD_DIM, **options)
    kbar = torch.randn(length // block_size + 1, heads_k, HEAD_DIM, **options)
    if rising:
        # Steps of 0.25 that bfloat16 holds, far above the noise of the other elements.
        block = torch.arange(len(kbar), device="cuda")
        q[..., 2:], q[..., 0], q[..., 1] = q[..., 2:] * 0.01, 32, 0.25
        kbar[..., 0], kbar[..., 1] = (block // 128)[:, None], (block % 128)[:, None]
    return q, kbar


def median_ms(call, repeats: int = 20) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    torch.manual_seed(0)
    print(torch.cuda.get_device_name())
    for name in sys.argv[1:] or ROWS:
        length, heads_q, heads_k, block_size, topk = ROWS[name]
        q, kbar = inputs(length, heads_q, heads_k, block_size, name == "C+")
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device="cuda")
        sizes = length, length, block_size, topk
        ms = median_ms(lambda: torch.ops.moba.gate_topk(q, kbar, cu_seqlens, cu_seqlens, *sizes))  # noqa: B023
        blocks = length // block_size
        pairs = heads_q * block_size * blocks * (blocks - 1) // 2
        print(f"{name:3} {ms:9.3f} ms {pairs * 2 * HEAD_DIM / ms / 1e9:7.1f} TFLOP/s", flush=True)


if __name__ == "__main__":
    main()
