"""`mm generate`: a language model goes on with a text, or answers in its own chat format."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import PositiveInt

from mm.errors import InputError

from ..common.command import argument

if TYPE_CHECKING:
    from mm.decode.generation import Output
    from mm.decode.sampling import Sampling
    from mm.decode.speculate import Proposer
    from mm.text.decoder import TextDecoder
    from mm.text.seq2seq import Seq2Seq

    Write = Callable[..., list[Output]]


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a text, answer it (encoder-decoders such as T5), or chat.

    Args:
        model: a shipped model, a directory, a hub name, or a .gguf or llama2.c file.
        prompt: the text to continue, or the first message.
        chat: answer messages, in the model's own chat format.
        stream: print tokens as they are made.
        max_tokens: the most tokens of an answer.
        temperature: 0 takes the likeliest token.
        top_k: draw among this many of the likeliest tokens; 0 among all.
        top_p: draw among the likeliest tokens that hold this share of the probability.
        min_p: draw among tokens that are at least this share as likely as the likeliest.
        repetition_penalty: divide the scores of tokens that the text holds already.
        beams: write the likeliest text that this many beams find.
        seed: of what is drawn.
        stop: end before this string; may stand several times.
        quantize: weights of 8 bits, faster on a CPU, or of 4, smaller still, which read long prompts slowly.
        cache: int8 keeps keys and values in 8 bits, a quarter of the memory.
        speculate: propose several tokens a step, for the same text: lookup (from the text so far), heads (the model's
            own), or the name of a smaller model with the same vocabulary.
        compile: compile a step first, which takes half a minute and a C++ compiler (g++); from then on tokens come
            about twice as fast on a CPU.
        threads: CPU threads; none is PyTorch's choice.
    """

    model: str = argument("stories260k")
    prompt: str | None = argument(None)
    chat: bool = False
    stream: bool = False
    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    beams: PositiveInt = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    quantize: Literal["int8", "int4"] | None = None
    cache: Literal["full", "int8"] = "full"
    speculate: str | None = None
    compile: bool = False
    threads: PositiveInt | None = None

    def run(self) -> None:
        import torch

        from mm.decode.beam import Beams

        if self.threads:
            torch.set_num_threads(self.threads)
        sampling, model = self.sampling(), load(self.model, self.quantize, self.compile)
        write = partial(model.generate, sampling=sampling, cache=self.cache,
                        beams=Beams(count=self.beams) if self.beams > 1 else None)
        if model.kind == "seq2seq":
            answer(write, self)
            return
        write = partial(write, speculate=proposer(self.speculate, self.quantize), compiled=self.compile)
        if self.chat:
            talk(model, write, self.prompt, self.stream)
        else:
            print(self.prompt or "", end="", flush=True)
            say(write, start(model) if self.prompt is None else self.prompt, self.stream)

    def sampling(self) -> Sampling:
        from mm.decode.sampling import Sampling

        return Sampling(max_tokens=self.max_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
                        min_p=self.min_p, repetition_penalty=self.repetition_penalty, seed=self.seed, stop=self.stop)


def answer(write: Write, options: Generate) -> None:
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

    model = opened(name, float32, kinds=("decoder", "seq2seq"))
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
