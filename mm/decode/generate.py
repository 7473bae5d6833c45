"""Prompts in, texts out: the plain way to use an `Engine`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from mm.decode.beam import Beams, beam_search
from mm.decode.engine import Cache, Engine, Reason, check_prompt
from mm.decode.sampling import GREEDY, Sampling
from mm.errors import InputError
from mm.nn.memory import Memory

if TYPE_CHECKING:
    from mm.decode.speculate import Proposer
    from mm.text.decoder import TextDecoder

Prompts = str | Sequence[str] | Tensor | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Output:
    """What was made after a prompt: ids without the end token, their text, and why it ended ("eos", "stop" by a stop
    string, "length" by max_tokens, "context" full)."""

    ids: list[int]
    text: str
    reason: Reason


def generate(model: TextDecoder, prompts: Prompts, sampling: Sampling | Sequence[Sampling] = GREEDY, *,
             slots: int | None = None, chunk: int = 256, speculate: Proposer | None = None, beams: Beams | None = None,
             cache: Cache = "full", on_text: Callable[[int, str], None] | None = None, eos: Sequence[int] | None = None,
             memories: Sequence[Callable[[], Memory]] = (), remembered: int = 0, compiled: bool = False
             ) -> list[Output]:
    """One `Output` per prompt: a text, texts, ids (B, T), or rows of ids of any lengths.

    sampling: for all, or one per prompt. slots: rows at a time (default: all). on_text(prompt's number, text) is called
    with every piece of text. beams: the likeliest texts by beam search, for greedy settings; a text then comes as one
    piece. cache, eos, compiled: see `Engine`. memories: one per prompt of at most `remembered` tokens, for a decoder
    that reads an encoder. Raises InputError for prompts that do not fit the model.
    """
    rows = prompt_ids(model, prompts)
    settings = [sampling] * len(rows) if isinstance(sampling, Sampling) else list(sampling)
    if len(settings) != len(rows):
        raise InputError(f"{len(settings)} sampling settings for {len(rows)} prompts")
    for ids in rows:
        check_prompt(ids, model.spec.context, model.spec.embed.vocab)
    if beams is not None:
        if speculate is not None or cache != "full" or compiled:
            raise InputError("beam search neither speculates nor keeps keys and values in 8 bits, nor is it compiled")
        memory = model.stack.room(len(rows), remembered) if memories else None
        for i, one in enumerate(memories):
            memory.insert(i, one())
        return searched(model, rows, settings, beams, on_text, eos, memory)
    length = max(len(ids) + one.max_tokens for ids, one in zip(rows, settings, strict=True))
    if compiled:  # a step is compiled for one length of rows: for powers of two, not for every text
        length = 1 << max(length - 1, 255).bit_length()
    engine = Engine(model, min(slots or len(rows), len(rows)), min(length, model.spec.context), chunk,
                    speculate=speculate, eos=eos, cache=cache, compiled=compiled, remembered=remembered)
    memories = memories or [None] * len(rows)
    requests = [engine.submit(ids, one, on_text=None if on_text is None else lambda piece, i=i: on_text(i, piece),
                              memory=memory)
                for i, (ids, one, memory) in enumerate(zip(rows, settings, memories, strict=True))]
    training = model.training
    model.eval()
    try:
        engine.run()
    finally:
        model.train(training)
    return [Output(request.out, request.text, request.reason) for request in requests]


def searched(model: TextDecoder, rows: list[list[int]], settings: list[Sampling], beams: Beams,
             on_text: Callable[[int, str], None] | None, eos: Sequence[int] | None, memory: Memory | None
             ) -> list[Output]:
    """The likeliest texts. Raises InputError for settings that are not those of greedy decoding, one for all."""
    most = settings[0].max_tokens
    if any(one != Sampling(max_tokens=most) for one in settings):
        raise InputError("beam search takes the likeliest text: of the sampling it reads only max_tokens, one for all")
    found = beam_search(model, rows, beams=beams.count, length_penalty=beams.length_penalty, max_tokens=most, eos=eos,
                        memory=memory)
    texts = [model.tokenizer.decode(one.ids) if model.tokenizer else "" for one in found]
    for i, text in enumerate(texts):
        if on_text is not None and text:
            on_text(i, text)
    return [Output(one.ids, text, "eos" if one.ended else "length") for one, text in zip(found, texts, strict=True)]


def stream(model: TextDecoder, prompt: str | Sequence[int] | Tensor, sampling: Sampling = GREEDY, *,
           chunk: int = 256, speculate: Proposer | None = None) -> Iterator[str]:
    """The pieces of one text as they are made."""
    pieces: list[str] = []
    (ids,) = prompt_ids(model, prompt if isinstance(prompt, str) else [list(prompt)])
    check_prompt(ids, model.spec.context, model.spec.embed.vocab)
    engine = Engine(model, 1, min(len(ids) + sampling.max_tokens, model.spec.context), chunk, speculate=speculate)
    engine.submit(ids, sampling, on_text=pieces.append)
    while engine.busy:
        engine.step()
        yield from pieces
        pieces.clear()


def prompt_ids(model: TextDecoder, prompts: Prompts, *, whole: bool = False) -> list[list[int]]:
    """Prompts as rows of ids; texts get the start token that their tokenizer puts before a text, and where they are
    `whole`, not to be gone on with, also the end token."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2 or prompts.is_floating_point():
            raise InputError(f"prompts should be integers (B, T), not {prompts.dtype} {tuple(prompts.shape)}")
        return prompts.tolist()
    prompts = list(prompts)
    if not prompts:
        raise InputError("there are no prompts")
    if not all(isinstance(prompt, str) for prompt in prompts):
        if any(isinstance(prompt, (str, int)) for prompt in prompts):
            raise InputError("prompts should be a text, texts, ids (B, T), or a list of rows of ids")
        return [[int(i) for i in row] for row in prompts]
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError("the model has no tokenizer: give it ids in place of text")
    tokenizer.check_fits(model.spec.embed.vocab, "generate")
    if any(not text for text in prompts):
        raise InputError("the prompt is empty")
    suffix = tokenizer.suffix if whole else ()
    return [[*tokenizer.prefix, *tokenizer.encode(text), *suffix] for text in prompts]
