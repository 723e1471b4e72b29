"""A Llama reads a long text with MoBA, then continues it.

    python examples/llama.py              no network: an embedded Llama reads a real text
    python examples/llama.py --compare    the same, and against full attention
    python examples/llama.py --model meta-llama/Llama-3.1-8B --prompt-file book.txt

Without ``--model`` this is a small byte-level Llama (one byte, one token) whose weights are seeded,
not trained: its speed and its choice of blocks are real, what it writes is noise. Without a prompt
it reads the sources of Python's own standard library. ``--attn moba`` reads with MoBA and decodes
with full attention; ``moba_naive`` computes the same through a masked score matrix, for checking. A
model that was not trained with MoBA loses quality with it.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

CONTEXT, NAIVE_CONTEXT = 16384, 2048  # moba_naive holds a score for every pair of tokens
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fail(message: str) -> NoReturn:
    """One line on stderr, exit code 2."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message)


class ByteTokenizer:
    """Every byte is a token."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


@dataclass
class Run:
    """One pass over the prompt and the continuation."""

    prefill_seconds: float
    hidden: Tensor  # [S, hidden size], after the last norm
    tokens: list[int]  # the continuation
    decode_seconds: float = 0.0
    blocks: dict[int, Tensor] = field(default_factory=dict)  # layer -> past blocks [Hq, topk - 1]


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_flags(args)
    try:
        model, tokenizer = load_model(args)
        tokens = read_prompt(args, model, tokenizer)
        describe(args, model, tokens)
        run = read_and_continue(model, tokens, args)
        report(args, model, run, tokens, tokenizer)
        if args.compare:
            model.set_attn_implementation("sdpa")
            compare(args.attn, model, run, read_and_continue(model, tokens, args))
    except ModuleNotFoundError as error:
        fail(f"{error}: install it with: pip install -e .")
    except (ValueError, torch.OutOfMemoryError) as error:
        fail(str(error))


# Flags, model, text


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="hub id or local folder; default: the embedded byte-level Llama")
    add("--attn", default="moba", choices=["moba", "moba_naive", "sdpa", "flash_attention_2"])
    add("--moba-chunk-size", type=at_least(1), default=512, help="keys per block (512)")
    add("--moba-topk", type=at_least(1), default=3, help="blocks per query, own included (3)")
    add("--full-last", type=at_least(0), default=0, help="last layers that stay full (0)")
    add("--prompt", help="text to read")
    add("--prompt-file", type=Path, help="file to read")
    add("--max-new-tokens", type=at_least(1), default=32, help="length of the continuation (32)")
    add("--context", type=at_least(2), help="tokens to read; default: the whole prompt, or 16384")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    add("--dtype", choices=DTYPES, help="default: float32 on the CPU, else bfloat16")
    add("--compare", action="store_true", help="read with full attention too, tell the difference")
    return parser


def at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a number of at least {least}, got {text}")
        return int(text)

    return parse


def check_flags(args: argparse.Namespace) -> None:
    if args.prompt is not None and args.prompt_file is not None:
        fail("give either --prompt or --prompt-file, not both")
    if args.compare and not args.attn.startswith("moba"):
        fail(f"--compare is for --attn moba or moba_naive, got {args.attn}")
    if args.device.split(":")[0] not in ("cpu", "cuda"):
        fail(f"--device must be cpu, cuda or cuda:N, got {args.device}")
    if args.device != "cpu" and not torch.cuda.is_available():
        fail("--device cuda needs a GPU and a CUDA build of torch: use --device cpu")
    if args.attn == "flash_attention_2" and args.device == "cpu":
        fail("--attn flash_attention_2 needs a GPU: use --attn sdpa")
    if args.attn == "flash_attention_2" and find_spec("flash_attn") is None:
        fail("--attn flash_attention_2 needs: pip install flash-attn; or use --attn sdpa")
    args.dtype = DTYPES[args.dtype or ("float32" if args.device == "cpu" else "bfloat16")]


def load_model(args: argparse.Namespace) -> tuple[nn.Module, object]:
    from moba_ext import MoBAConfig, register_moba

    full = tuple(range(-args.full_last, 0))
    register_moba(MoBAConfig(args.moba_chunk_size, args.moba_topk, full_attention_layers=full))
    if args.model is None:
        model, tokenizer = embedded_llama(args.attn), ByteTokenizer()
    else:
        model, tokenizer = pretrained(args.model, args.attn, args.dtype)
    return model.to(args.device, args.dtype).eval(), tokenizer


def embedded_llama(attn: str) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1 << 20,
        initializer_range=1 / 16,  # unit-size queries and keys: attention is far from uniform
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn)


def pretrained(name: str, attn: str, dtype: torch.dtype) -> tuple[nn.Module, object]:
    from huggingface_hub.errors import GatedRepoError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(name).is_dir()
    if folder and not (Path(name) / "config.json").exists():
        fail(f"{name} has no config.json: give --model the folder of a saved model")
    local = folder or not hub_answers(name)
    options = {"attn_implementation": attn, "dtype": dtype, "local_files_only": local}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
        return AutoModelForCausalLM.from_pretrained(name, **options), tokenizer
    except (ImportError, OSError, ValueError) as error:
        if isinstance(error.__cause__, GatedRepoError):
            page = f"https://huggingface.co/{name}"
            fail(f"{name} is gated: accept its licence at {page}, then run: hf auth login")
        if local and not folder:
            offline = "is neither a local folder nor cached, and huggingface.co cannot be reached"
            fail(f"{name} {offline}: go online, or give --model a local folder")
        fail(f"cannot load {name}: {error}")


def hub_answers(name: str) -> bool:
    """Asked before loading, which without network would retry for a minute."""
    from huggingface_hub import errors, model_info

    try:
        model_info(name, timeout=10)
    except errors.GatedRepoError:
        return True
    except (errors.HFValidationError, errors.RepositoryNotFoundError):
        fail(f"{name} is neither a local folder nor on huggingface.co: check --model")
    except Exception:  # the HTTP library, and so its classes of errors, differ between versions
        return False
    return True


def read_prompt(args: argparse.Namespace, model: nn.Module, tokenizer: object) -> list[int]:
    room = model.config.max_position_embeddings - args.max_new_tokens
    text, length = args.prompt, args.context
    if args.prompt_file is not None:
        try:
            text = args.prompt_file.read_text(errors="replace")
        except OSError as error:
            fail(f"cannot read --prompt-file {args.prompt_file}: {error.strerror}")
    elif text is None:
        length = length or min(NAIVE_CONTEXT if args.attn == "moba_naive" else CONTEXT, room)
        text = library_text(8 * length)
    tokens = tokenizer.encode(text)
    length = length or len(tokens)
    if len(tokens) < max(length, 2):
        fail(f"the text has {len(tokens)} tokens, fewer than {max(length, 2)}: lower --context")
    if length > room:
        fail(f"the model has room for {room} tokens of text, not {length}: lower --context")
    return tokens[:length]


def library_text(size: int) -> str:
    """The first ``size`` characters, or all there are, of Python's standard library."""
    text = ""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")):
        text += path.read_text(errors="replace")
        if len(text) >= size:
            break
    return text[:size] or fail("this Python has no library sources to read: give --prompt-file")


# Running


def read_and_continue(model: nn.Module, tokens: list[int], args: argparse.Namespace) -> Run:
    """Prefill and greedy decoding, timed apart, after an untimed warm-up."""
    from transformers import DynamicCache

    decoder, head = model.get_decoder(), model.get_output_embeddings()
    ids, cache = torch.tensor([tokens], device=args.device), DynamicCache(config=model.config)
    # Its name since Transformers 5.24, and before.
    renamed = "cache" in inspect.signature(decoder.forward).parameters
    cached = {"cache" if renamed else "past_key_values": cache, "use_cache": True}
    decoder(ids[:, : 2 * args.moba_chunk_size], use_cache=False)
    with layer_bar(decoder), last_queries(model) as queries:
        start = clock(args)
        hidden = decoder(ids, **cached).last_hidden_state[0]
        token = head(hidden[-1:]).argmax(-1)
        run = Run(clock(args) - start, hidden, [int(token)])
    if model.config._attn_implementation.startswith("moba"):
        run.blocks = chosen_blocks(queries, cache, args)
    end = model.generation_config.eos_token_id
    start = clock(args)
    for _ in tqdm(range(args.max_new_tokens - 1), "decoding", delay=1, disable=None):
        if run.tokens[-1] in (end if isinstance(end, list) else [end]):
            break
        step = decoder(token[None], **cached)
        token = head(step.last_hidden_state[0]).argmax(-1)
        run.tokens.append(int(token))
    run.decode_seconds = clock(args) - start
    return run


def clock(args: argparse.Namespace) -> float:
    if args.device != "cpu":
        torch.cuda.synchronize(args.device)
    return time.perf_counter()


@contextmanager
def layer_bar(decoder: nn.Module) -> Iterator[None]:
    """A progress bar over the layers, which appears if they take more than a second."""
    layers = decoder.layers
    with tqdm(total=len(layers), desc="reading, layers", delay=1, disable=None) as bar:
        hooks = [layer.register_forward_hook(lambda *_: bar.update() and None) for layer in layers]
        yield
        for hook in hooks:
            hook.remove()


@contextmanager
def last_queries(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Keep the last query ``[1, Hq, D]`` of every layer, as its attention function sees it."""
    from transformers import AttentionInterface

    name, queries = model.config._attn_implementation, {}
    attention = AttentionInterface()[name]

    def recording(module: nn.Module, query: Tensor, *rest, **kwargs) -> tuple:
        queries[module.layer_idx] = query[0, :, -1:].transpose(0, 1).clone()
        return attention(module, query, *rest, **kwargs)

    AttentionInterface.register(name, recording)
    try:
        yield queries
    finally:
        AttentionInterface.register(name, attention)


def chosen_blocks(
    queries: dict[int, Tensor], cache: object, args: argparse.Namespace
) -> dict[int, Tensor]:
    """The past blocks ``[Hq, topk - 1]`` that the last query chose, for every MoBA layer."""
    from moba_ext import select_blocks

    blocks = {}
    for layer in range(len(queries) - args.full_last):
        keys = cache.layers[layer].keys[0].transpose(0, 1)  # [S, Hk, D]
        sizes = {"block_size": args.moba_chunk_size, "topk": args.moba_topk}
        blocks[layer] = select_blocks(queries[layer], keys, **sizes).block_ids[0]
    return blocks


# Telling


def describe(args: argparse.Namespace, model: nn.Module, tokens: list[int]) -> None:
    config, size = model.config, sum(weight.numel() for weight in model.parameters()) / 1e6
    heads = f"{config.num_attention_heads} query and {config.num_key_value_heads} KV heads"
    shape = f"{config.num_hidden_layers} layers, {heads}, {size:,.1f} M weights"
    print(f"model       {args.model or 'embedded byte-level Llama'}: {shape}")
    if args.model is None:
        print("            untrained, its weights are seeded: what it continues with is noise")
    source = args.prompt_file or ("--prompt" if args.prompt else "Python's standard library")
    print(f"text        {len(tokens):,} tokens of {source}")
    sizes = f", blocks of {args.moba_chunk_size} keys, {args.moba_topk} per query"
    full = f", the last {args.full_last} layers full" if args.full_last else ""
    sizes = sizes + full if args.attn.startswith("moba") else ""
    dtype = str(args.dtype).removeprefix("torch.")
    print(f"attention   {args.attn}{sizes}; {dtype} on {args.device}", flush=True)


def report(
    args: argparse.Namespace, model: nn.Module, run: Run, tokens: list[int], tokenizer: object
) -> None:
    length, steps = len(tokens), len(run.tokens) - 1
    print(f"prefill     {run.prefill_seconds:.2f} s, {length / run.prefill_seconds:,.0f} tokens/s")
    if steps > 0:
        speed = f"{steps / run.decode_seconds:,.1f} tokens/s, with full attention"
        print(f"decoding    {run.decode_seconds:.2f} s, {speed}")
    if run.blocks:
        print(f"pairs       {density(args, model, length):.1%} of full attention's, per MoBA layer")
        report_blocks(args.moba_chunk_size, run.blocks, tokens, tokenizer)
    print(f"continues   {tokenizer.decode(run.tokens)!r}", flush=True)


def density(args: argparse.Namespace, model: nn.Module, length: int) -> float:
    """Share of the (query, key) pairs of full attention that MoBA computes."""
    from moba_ext import plan

    config, sizes = model.config, {"block_size": args.moba_chunk_size, "topk": args.moba_topk}
    heads = {"heads_q": config.num_attention_heads, "heads_k": config.num_key_value_heads}
    return plan(length, **heads, **sizes, head_dim=config.head_dim, dtype=args.dtype).density


def report_blocks(
    size: int, blocks: dict[int, Tensor], tokens: list[int], tokenizer: object
) -> None:
    """The past blocks that the last query chose, and how the text of the favourites begins."""
    print(
        f"blocks      chosen by the last token beside its own, {(len(tokens) - 1) // size}, by head"
    )
    for layer, chosen in blocks.items():
        heads = [" ".join(str(block) for block in head if block >= 0) for head in chosen.tolist()]
        print(f"  layer {layer:2}  " + " | ".join(f"{head:>5}" for head in heads))
    votes = Counter(int(b) for chosen in blocks.values() for b in chosen.flatten() if b >= 0)
    for block, count in votes.most_common(5):
        text = " ".join(tokenizer.decode(tokens[block * size :][:80]).split())[:56]
        print(f"  block {block:2}  chosen {count} times: {text} ...")


def compare(name: str, model: nn.Module, run: Run, full: Run) -> None:
    """What full attention takes, and how far the outputs differ."""
    ratio = full.prefill_seconds / run.prefill_seconds
    speed = len(full.hidden) / full.prefill_seconds
    print(f"full        prefill {full.prefill_seconds:.2f} s, {speed:,.0f} tokens/s", end="")
    print(f": {name} is {ratio:.2f} times as fast")
    distance = (run.hidden - full.hidden).norm() / full.hidden.norm()
    head, agree, change = model.get_output_embeddings(), 0, 0.0
    for ours, theirs in zip(run.hidden.split(1024), full.hidden.split(1024), strict=True):
        a, b = head(ours), head(theirs)
        agree += int((a.argmax(-1) == b.argmax(-1)).sum())
        change = max(change, float((a - b).abs().max()))
    print(
        f"difference  hidden states {distance:.2%} (relative L2), logits at most {change:.3g}",
        end="",
    )
    print(f", same next token at {agree / len(full.hidden):.1%} of the positions")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
