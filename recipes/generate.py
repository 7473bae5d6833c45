"""`mm generate`: a language model goes on with a text, or answers in its own chat format."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mm.errors import InputError

if TYPE_CHECKING:
    from mm.decoder import TextDecoder
    from mm.sampling import Sampling

def generate(argv: list[str]) -> int:
    """The command."""
    options = parse(argv)
    import torch

    from mm.decoder import TextDecoder
    from mm.quantize import quantize
    from mm.sampling import Sampling

    from .weights import SHIPPED
    if options.threads:
        torch.set_num_threads(options.threads)
    sampling = Sampling(
        max_tokens=options.max_tokens, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        min_p=options.min_p, repetition_penalty=options.repetition_penalty, seed=options.seed, stop=tuple(options.stop))
    name = SHIPPED[options.model]() if options.model in SHIPPED else options.model
    model = TextDecoder.from_pretrained(name, torch.float32)
    if options.quantize:
        quantize(model, options.quantize)
    if options.chat:
        talk(model, options.prompt, sampling, options.stream)
    else:
        if options.prompt is None:
            raise InputError("mm generate needs a text to go on with, or --chat")
        print(options.prompt, end="", flush=True)
        say(model, options.prompt, sampling, options.stream)
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mm generate", description="Go on with a text, or chat.")
    parser.add_argument("model", metavar="MODEL", help="a directory, a hub name, a .gguf or llama2.c file, or "
                        "stories260k, which ships with this package")
    parser.add_argument("prompt", metavar="TEXT", nargs="?", help="the text to go on with, or the first message")
    parser.add_argument("--chat", action="store_true", help="answer messages, in the model's own chat format")
    parser.add_argument("--stream", action="store_true", help="print tokens as they are made")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], metavar="STRING", help="end before this string")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="weights of 8 bits: faster on a CPU; of 4: "
                        "smaller still, long prompts are read slowly")
    parser.add_argument("--threads", type=int, help="CPU threads")
    return parser.parse_args(argv)


def talk(model: TextDecoder, first: str | None, sampling: Sampling, live: bool) -> None:
    """Messages from the first argument, or line by line from standard input, each answered in turn."""
    messages: list[dict[str, str]] = []
    for text in [first] if first is not None else lines():
        messages.append({"role": "user", "content": text})
        if model.tokenizer is None:
            raise InputError("the model has no tokenizer, which a chat needs")
        answer = say(model, model.tokenizer.chat(messages), sampling, live)
        messages.append({"role": "assistant", "content": answer})


def lines() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def say(model: TextDecoder, prompt: str | list[int], sampling: Sampling, live: bool) -> str:
    """Prints what the model writes, and on stderr its speed and the memory in use."""
    start = time.perf_counter()

    def show(row: int, piece: str) -> None:
        if live:
            print(piece, end="", flush=True)
    out = model.generate([prompt], sampling, on_text=show)[0]
    print("" if live else out.text, flush=True)
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(out.ids)} tokens, {len(out.ids) / seconds:.1f} per second, {memory:.2f} GiB at most, ended by "
          f"{out.reason}", file=sys.stderr)
    return out.text
