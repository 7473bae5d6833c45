"""Text to token ids and back: the CLIP byte-pair encoding, any `tokenizers` file and any sentencepiece model."""

from __future__ import annotations

import gzip
import html
import json
import os
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mm.errors import InputError

if TYPE_CHECKING:
    import tokenizers

BOS, EOS = "<|startoftext|>", "<|endoftext|>"  # the names in Hugging Face files; open_clip writes them as below
_OPEN_CLIP_NAMES = ("<start_of_text>", "<end_of_text>")
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_PUNCTUATION = str.maketrans("", "", string.punctuation)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of a data loader


def _mend(text: str) -> str:
    if text.isascii() and text.isprintable() and "&" not in text:  # nothing to mend, and ftfy is slow
        return text
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _squeeze(text: str) -> str:
    return " ".join(text.split())


CLEANERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "whitespace": lambda text: _squeeze(_mend(text)),
    "lower": lambda text: _squeeze(_mend(text)).lower(),
    "canonicalize": lambda text: _squeeze(_mend(text).replace("_", " ").translate(_PUNCTUATION).lower()),
}


class Pieces(Protocol):
    """What turns cleaned text into ids: `BytePairs`, `TokenizersFile` or `SentencePiece`."""

    size: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """Text to ids with the cleaning, start, end and padding ids of a checkpoint.

    `clean` is one of open_clip's cleanings or "none"; `prefix` and `suffix` surround every row that `__call__` makes;
    `settings` is what `save` writes to tokenizer_config.json.
    """

    pieces: Pieces
    clean: str = "none"
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.clean not in CLEANERS:
            raise InputError(f"tokenizer: clean is {self.clean!r}, expected one of {', '.join(CLEANERS)}")

    @property
    def vocab_size(self) -> int:
        return self.pieces.size

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without prefix and suffix."""
        if not isinstance(text, str):
            raise InputError(f"tokenizer: expected a string, got {type(text).__name__}")
        try:
            return self.pieces.encode(CLEANERS[self.clean](text))
        except (TypeError, UnicodeEncodeError):
            raise InputError(f"tokenizer: {text[:40]!r} is not valid unicode (it holds half a surrogate pair)") from None

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Ids to text, without start, end and trailing padding."""
        row = [int(i) for i in ids]
        if row and not 0 <= min(row) <= max(row) < self.vocab_size:
            raise InputError(f"tokenizer: ids run from {min(row)} to {max(row)}, the vocabulary from 0 to {self.vocab_size - 1}")
        kept = len(row)
        while kept and row[kept - 1] == self.pad_id:
            kept -= 1
        if kept and row[kept - 1] == self.eos_id:  # otherwise the last ids were text, not padding
            row = row[:kept]
        around = {self.bos_id, self.eos_id, *self.prefix, *self.suffix}
        return self.pieces.decode([i for i in row if i not in around])

    def __call__(self, texts: str | Sequence[str], context: int, *, strict: bool = False) -> Tensor:
        """Texts -> (B, context) int64: prefix, ids, suffix, padding. Longer texts lose their end, never the suffix;
        with `strict` they are an InputError."""
        room = self._room(context)
        rows = [(text, self.encode(text)) for text in ([texts] if isinstance(texts, str) else texts)]
        long = [text for text, ids in rows if len(ids) > room]
        if strict and long:
            raise InputError(f"{len(long)} of {len(rows)} texts do not fit a context of {context} tokens; the first is {long[0][:60]!r}")
        out = torch.full((len(rows), context), self.pad_id, dtype=torch.int64)
        for row, (_, ids) in zip(out, rows, strict=True):
            whole = [*self.prefix, *ids[:room], *self.suffix]
            row[: len(whole)] = torch.tensor(whole)
        return out

    def too_long(self, texts: str | Sequence[str], context: int) -> int:
        """How many texts `__call__` would cut at this context."""
        room = self._room(context)
        return sum(len(self.encode(text)) > room for text in ([texts] if isinstance(texts, str) else texts))

    def _room(self, context: int) -> int:
        around = len(self.prefix) + len(self.suffix)
        if context < max(around, 1):
            raise InputError(f"tokenizer: a context of {context} tokens has no room for the {around} that surround a text")
        return context - around

    def save(self, folder: str | Path) -> None:
        """Writes the files that `load_tokenizer` and transformers read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.pieces.save(folder)
        own = {"clean": self.clean} if self.clean != "none" else {}
        settings = {**self.settings, **own, "pad_id": self.pad_id}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def to_open_clip(self) -> dict[str, Any]:
        """The `text_cfg` entries with which open_clip reads this tokenizer from the checkpoint's own directory."""
        if self is clip_tokenizer():
            return {}
        return {"hf_tokenizer_name": "local", "tokenizer_kwargs": {"clean": self.clean if self.clean != "none" else "whitespace"}}
