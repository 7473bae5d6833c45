"""The surroundings of decoding: the interface of a language model, prompts, requests, and text as it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from mm.decode.sampling import Sampling
from mm.errors import InputError
from mm.nn.embed import Embedding
from mm.nn.memory import Memory
from mm.nn.multi_token import AheadHead
from mm.nn.state import StackState
from mm.nn.transformer import Transformer
from mm.spec import DecoderSpec
from mm.tokenizer.tokenizer import Tokenizer

Prompts = str | Sequence[str] | Tensor | Sequence[Sequence[int]]
Reason = Literal["eos", "stop", "length", "context"]
Cache = Literal["full", "int8"]
CONTEXT = 6  # tokens before the new ones that a tokenizer may need to see, for example to know that a space is due


class LanguageModel(Protocol):
    """A decoder that this room can run; `mm.TextDecoder` is one."""

    spec: DecoderSpec
    embed: Embedding
    stack: Transformer
    tokenizer: Tokenizer | None
    generation: Mapping[str, Any]
    ahead: Iterable[AheadHead]
    training: bool

    def train(self, mode: bool = True) -> Any: ...

    def init_state(self, batch: int, *, length: int | None = None, chunk: int = 1, cache: Cache = "full") -> StackState:
        """Make an empty stream of `batch` rows of up to `length` tokens."""

    def hidden(self, ids: Tensor, *, mask: Tensor | None = None, state: StackState | None = None,
               rows: Tensor | None = None, memory: Memory | None = None, within: int | None = None) -> Tensor:
        """ids (B, T) -> (B, T, D), continuing the state of the rows (B,) bool; see `TextDecoder.hidden`."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""


# ------------------------------------------------------------------------------------------------ prompts
def prompt_ids(model: LanguageModel, prompts: Prompts, *, whole: bool = False) -> list[list[int]]:
    """Turn prompts into rows of ids. Texts get the start token that their tokenizer puts before a text, and `whole`
    ones, which are not to be continued, also the end token. Raises InputError for prompts of another form."""
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


def check_prompt(ids: Sequence[int], context: int, vocab: int) -> None:
    """Raises InputError for a prompt that is empty, too long, or not of this vocabulary."""
    if not len(ids):
        raise InputError("the prompt is empty")
    if len(ids) > context:
        raise InputError(f"the prompt has {len(ids)} tokens, which do not fit a context of {context}")
    if not 0 <= min(ids) <= max(ids) < vocab:
        raise InputError(f"the prompt's ids run from {min(ids)} to {max(ids)}, the vocabulary has {vocab}")


def default_eos(model: LanguageModel) -> tuple[int, ...]:
    """The ids that end a text by the model's generation settings (Llama 3 and Gemma 3 have several), and the
    tokenizer's."""
    ends = model.generation.get("eos_token_id")
    ends = [*ends] if isinstance(ends, list) else [ends]
    ends.append(None if model.tokenizer is None else model.tokenizer.eos_id)
    return tuple(dict.fromkeys(end for end in ends if end is not None))


# ------------------------------------------------------------------------------------- requests and their text
class TextStream:
    """Tokens to text as they come: whole characters only, and nothing of a stop string.

    Feed ids with `push`, end with `flush`; `text` is all that was given out, `stopped` whether a stop string came. Half
    characters are held back, and so is the possible beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int] = (), stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.ids = self.known(prompt)[-CONTEXT:]
        self.start, self.read = 0, len(self.ids)  # ids[start:read] is context whose text was given out
        self.text, self.held, self.stopped = "", "", False

    def push(self, token: int) -> str:
        """Add a token and return the text that is now certain, often empty."""
        if self.tokenizer is None or self.stopped:
            return ""
        self.ids += self.known([token])
        before, after = self.decode(self.start, self.read), self.decode(self.start, len(self.ids))
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return ""
        self.start, self.read = max(self.start, self.read - CONTEXT), len(self.ids)
        return self.give(after[len(before):])

    def flush(self) -> str:
        """Return the text that was held back, at the end of a text that no stop string ended."""
        if self.tokenizer is None or self.stopped:
            return ""
        rest = self.decode(self.start, len(self.ids))[len(self.decode(self.start, self.read)):]
        self.read = len(self.ids)
        piece = self.give(rest)
        if not self.stopped:
            piece, self.text, self.held = piece + self.held, self.text + self.held, ""
        return piece

    def give(self, new: str) -> str:
        """Add new text and return the part of it that is certain: all but a possible beginning of a stop string."""
        text = self.held + new
        ends = [at for at in (text.find(s) for s in self.stop) if at >= 0]
        if ends:
            self.stopped, self.held, piece = True, "", text[:min(ends)]
        else:
            hold = max((overlap(text, s) for s in self.stop), default=0)
            piece, self.held = text[:len(text) - hold], text[len(text) - hold:]
        self.text += piece
        return piece

    def decode(self, start: int, stop: int) -> str:
        return self.tokenizer.decode(self.ids[start:stop])

    def known(self, ids: Sequence[int]) -> list[int]:
        """Drop ids that the tokenizer lacks; an embedding may be padded to more rows."""
        return [] if self.tokenizer is None else [i for i in ids if i < self.tokenizer.vocab_size]


def overlap(text: str, stop: str) -> int:
    """Count the characters at the end of the text that begin the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class Prefix:
    """The beginning of prompts, read once: its ids and the state (one row) after them."""

    ids: tuple[int, ...]
    state: StackState

    def save(self, path: str | Path) -> None:
        self.state.save(path)


@dataclass(eq=False)
class Request:
    """A prompt in an engine: `out` grows with every step, `reason` is None until it has ended."""

    prompt: list[int]
    sampling: Sampling
    stream: TextStream
    on_text: Callable[[str], None] | None = None
    prefix: Prefix | None = None
    memory: Callable[[], Memory] | None = None
    out: list[int] = field(default_factory=list)
    reason: Reason | None = None

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.out

    @property
    def text(self) -> str:
        return self.stream.text

    def take(self, token: int, eos: set[int], length: int) -> bool:
        """Add a token; True where the request ends by it, with its `reason`. length: the longest row in tokens."""
        if token in eos and self.sampling.eos:
            return self.end("eos")
        self.out.append(token)
        self.give_text(self.stream.push(token))
        if self.stream.stopped:
            return self.end("stop")
        if len(self.out) >= self.sampling.max_tokens:
            return self.end("length")
        return len(self.prompt) + len(self.out) > length and self.end("context")

    def end(self, reason: Reason) -> bool:
        """Give out the rest of the text, which may still complete a stop string."""
        self.reason = reason
        if reason != "stop":
            self.give_text(self.stream.flush())
            self.reason = "stop" if self.stream.stopped else reason
        return True

    def give_text(self, piece: str) -> None:
        if piece and self.on_text is not None:
            self.on_text(piece)
