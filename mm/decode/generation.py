"""Prompts in, texts out: the plain way to use an `Engine`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict, Unpack

from torch import Tensor

from mm.decode.engine import Engine
from mm.decode.requests import Cache, LanguageModel, Prompts, Reason, check_prompt, prompt_ids
from mm.decode.sampling import GREEDY, Sampling
from mm.errors import InputError
from mm.nn.memory import Memory

if TYPE_CHECKING:
    from mm.decode.beam import Beams
    from mm.decode.speculate import Proposer


@dataclass(frozen=True)
class Output:
    """The text written after a prompt: ids without the end token, their text, and why it ended ("eos", "stop" by a stop
    string, "length" by max_tokens, "context" full)."""

    ids: list[int]
    text: str
    reason: Reason


class EngineOptions(TypedDict, total=False):
    """Keywords of `generate` that it hands to its `Engine`."""

    chunk: int
    eos: Sequence[int] | None
    speculate: Proposer | None
    cache: Cache
    compiled: bool
    remembered: int


class GenerateOptions(EngineOptions, total=False):
    """Keywords of `generate`."""

    slots: int | None
    beams: Beams | None
    on_text: Callable[[int, str], None] | None
    memories: Sequence[Callable[[], Memory]]


def generate(model: LanguageModel, prompts: Prompts, sampling: Sampling | Sequence[Sampling] = GREEDY, *,
             slots: int | None = None, beams: Beams | None = None, on_text: Callable[[int, str], None] | None = None,
             memories: Sequence[Callable[[], Memory]] = (), **options: Unpack[EngineOptions]) -> list[Output]:
    """Write one `Output` per prompt: a text, texts, ids (B, T), or rows of ids of any lengths.

    sampling: for all, or one per prompt. slots: rows at a time (default: all). beams: take the likeliest texts by beam
    search, for greedy settings; a text then comes as one piece. on_text(number of the prompt, text): called with every
    piece of text. memories: one per prompt of at most `remembered` tokens, for a decoder that reads an encoder.
    options: see `Engine`. Raises InputError for prompts that do not fit the model.
    """
    rows = prompt_ids(model, prompts)
    settings = [sampling] * len(rows) if isinstance(sampling, Sampling) else list(sampling)
    if len(settings) != len(rows):
        raise InputError(f"{len(settings)} sampling settings for {len(rows)} prompts")
    for ids in rows:
        check_prompt(ids, model.spec.context, model.spec.embed.vocab)
    if beams is not None:
        return search(model, rows, settings, beams, on_text, memories, options)
    length = max(len(ids) + one.max_tokens for ids, one in zip(rows, settings, strict=True))
    if options.get("compiled"):  # a step is compiled for one length of rows: for powers of two, not for every text
        length = 1 << max(length - 1, 255).bit_length()
    engine = Engine(model, min(slots or len(rows), len(rows)), min(length, model.spec.context), **options)
    memories = memories or [None] * len(rows)
    requests = [engine.submit(ids, one, on_text=None if on_text is None else lambda piece, i=i: on_text(i, piece),
                              memory=memory)
                for i, (ids, one, memory) in enumerate(zip(rows, settings, memories, strict=True))]
    training = model.training
    model.train(False)
    try:
        engine.run()
    finally:
        model.train(training)
    return [Output(request.out, request.text, request.reason) for request in requests]


def search(model: LanguageModel, rows: list[list[int]], settings: list[Sampling], beams: Beams,
           on_text: Callable[[int, str], None] | None, memories: Sequence[Callable[[], Memory]],
           options: EngineOptions) -> list[Output]:
    """Find the likeliest texts. Raises InputError for settings that are not those of greedy decoding, one for all, and
    for options that beam search has not."""
    from mm.decode.beam import beam_search

    if unknown := options.keys() - EngineOptions.__annotations__.keys():
        raise TypeError(f"generate has no keyword {', '.join(sorted(unknown))}")
    if options.get("speculate") or options.get("cache", "full") != "full" or options.get("compiled"):
        raise InputError("beam search neither speculates nor keeps keys and values in 8 bits, nor is it compiled")
    memory = model.stack.room(len(rows), options["remembered"]) if memories else None
    for i, one in enumerate(memories):
        memory.insert(i, one())
    most = settings[0].max_tokens
    if any(one != Sampling(max_tokens=most) for one in settings):
        raise InputError("beam search takes the likeliest text: of the sampling it reads only max_tokens, one for all")
    found = beam_search(model, rows, beams=beams.count, length_penalty=beams.length_penalty, max_tokens=most,
                        eos=options.get("eos"), memory=memory)
    texts = [model.tokenizer.decode(one.ids) if model.tokenizer else "" for one in found]
    for i, text in enumerate(texts):
        if on_text is not None and text:
            on_text(i, text)
    return [Output(one.ids, text, "eos" if one.ended else "length") for one, text in zip(found, texts, strict=True)]


def stream(model: LanguageModel, prompt: str | Sequence[int] | Tensor, sampling: Sampling = GREEDY, *,
           chunk: int = 256, speculate: Proposer | None = None) -> Iterator[str]:
    """Yield the pieces of one text as they are written."""
    pieces: list[str] = []
    (ids,) = prompt_ids(model, prompt if isinstance(prompt, str) else [list(prompt)])
    check_prompt(ids, model.spec.context, model.spec.embed.vocab)
    engine = Engine(model, 1, min(len(ids) + sampling.max_tokens, model.spec.context), chunk, speculate=speculate)
    engine.submit(ids, sampling, on_text=pieces.append)
    while engine.busy:
        engine.step()
        yield from pieces
        pieces.clear()
