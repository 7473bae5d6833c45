"""`mm generate`: a language model goes on with a text, or answers in its own chat format."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from mm.errors import InputError

from ..common.options import positive

if TYPE_CHECKING:
    from mm.decode.generation import Output
    from mm.decode.speculate import Proposer
    from mm.text.decoder import TextDecoder
    from mm.text.seq2seq import Seq2Seq

    Write = Callable[..., list[Output]]


def generate(argv: list[str]) -> int:
    """The command."""
    options = parse(argv)
    import torch

    from mm.decode.beam import Beams
    from mm.decode.sampling import Sampling

    if options.threads:
        torch.set_num_threads(options.threads)
    sampling = Sampling(
        max_tokens=options.max_tokens, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        min_p=options.min_p, repetition_penalty=options.repetition_penalty, seed=options.seed, stop=tuple(options.stop))
    model = load(options.model, options.quantize, options.compile)
    write = partial(model.generate, sampling=sampling, cache=options.cache,
                    beams=Beams(count=options.beams) if options.beams > 1 else None)
    if model.kind == "seq2seq":
        answer(write, options)
        return 0
    write = partial(write, speculate=proposer(options.speculate, options.quantize), compiled=options.compile)
    if options.chat:
        talk(model, write, options.prompt, options.stream)
    else:
        print(options.prompt or "", end="", flush=True)
        say(write, start(model) if options.prompt is None else options.prompt, options.stream)
    return 0


def answer(write: Write, options: argparse.Namespace) -> None:
    """What an encoder-decoder makes of a text. Raises InputError for what only models that go on with texts do."""
    if options.chat or options.speculate or options.compile or options.prompt is None:
        raise InputError(f"{options.model} is an encoder-decoder: it wants a text, and neither chats nor speculates, "
                         "and its steps are not compiled")
    say(write, options.prompt, options.stream)


def load(name: str, quantized: str | None, compiled: bool = False) -> TextDecoder | Seq2Seq:
    """A model in float32, arranged for decoding: an encoder-decoder where the directory holds one."""
    from torch import float32

    from mm.checkpoint.pretrained import load as opened
    from mm.lowbit import arrange, quantize

    model = opened(name, float32, kinds=("seq2seq", "decoder"))
    if quantized:
        return quantize(model, quantized)
    if not compiled:
        arrange(model.decoder if model.kind == "seq2seq" else model)
    return model


def proposer(way: str | None, quantized: str | None) -> Proposer | None:
    from mm.decode.speculate import Ahead, Draft, PromptLookup
    ways = {"lookup": PromptLookup, "heads": Ahead}
    if way is None:
        return None
    return ways[way]() if way in ways else Draft(load(way, quantized))


def start(model: TextDecoder) -> list[int]:
    """What a text that nobody began starts with. Raises InputError when the model has no start token."""
    if model.tokenizer is None or not model.tokenizer.prefix:
        raise InputError("mm generate needs a text to go on with, or --chat: the model has no start token")
    return list(model.tokenizer.prefix)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mm generate", description="Go on with a text, answer it "
                                     "(encoder-decoders such as T5), or chat.")
    parser.add_argument("model", metavar="MODEL", nargs="?", default="stories260k", help="a directory, a hub name, a "
                        ".gguf or llama2.c file, or stories260k, which ships with this package (default)")
    parser.add_argument("prompt", metavar="TEXT", nargs="?", help="the text to go on with, or the first message")
    parser.add_argument("--chat", action="store_true", help="answer messages, in the model's own chat format")
    parser.add_argument("--stream", action="store_true", help="print tokens as they are made")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--beams", type=positive, default=1, metavar="K", help="the likeliest text that K beams find")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], metavar="STRING", help="end before this string")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="weights of 8 bits: faster on a CPU; of 4: "
                        "smaller still, long prompts are read slowly")
    parser.add_argument("--cache", choices=("full", "int8"), default="full", help="int8: keys and values in 8 bits, a "
                        "quarter of the memory")
    parser.add_argument("--speculate", metavar="WAY", help="several tokens a step, the same text: lookup (from what "
                        "was said before), heads (the model's own), or a smaller MODEL of the same vocabulary")
    parser.add_argument("--compile", action="store_true", help="compile a step first, which takes half a minute and a "
                        "C++ compiler (g++): from then on tokens come about twice as fast on a CPU")
    parser.add_argument("--threads", type=int, help="CPU threads")
    return parser.parse_args(argv)


def talk(model: TextDecoder, write: Write, first: str | None, live: bool) -> None:
    """Messages from the first argument, or line by line from standard input, each answered in turn."""
    messages: list[dict[str, str]] = []
    for text in [first] if first is not None else lines():
        messages.append({"role": "user", "content": text})
        if model.tokenizer is None:
            raise InputError("the model has no tokenizer, which a chat needs")
        answer = say(write, model.tokenizer.chat(messages), live)
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


def say(write: Write, prompt: str | list[int], live: bool) -> str:
    """Prints what the model writes, and on stderr its speed and the memory in use."""
    began = time.perf_counter()

    def show(row: int, piece: str) -> None:
        if live:
            print(piece, end="", flush=True)
    out = write([prompt], on_text=show)[0]
    print("" if live else out.text, flush=True)
    seconds = time.perf_counter() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(out.ids)} tokens, {len(out.ids) / seconds:.1f} per second, {memory:.2f} GiB at most, ended by "
          f"{out.reason}", file=sys.stderr)
    return out.text
