"""What can be set about text to train a language model on, as plain dataclasses that import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class CorpusData:
    """Texts and conversations.

    Args:
        path: a .txt, .md, .jsonl, .csv, .tsv or .parquet file, plain or .gz, a folder of such, or wikitext-2 or
            chitchat, which come with an installed package. JSONL lines and table rows hold a text, or a conversation
            as messages of role and content.
        split: what a document of a .txt or .md file is: the file, the lines between two blank ones, or a line;
            <|endoftext|> ends a document in any case.
    """

    path: str
    split: Literal["file", "blank", "line"] = "file"


@dataclass(frozen=True, kw_only=True)
class LmData(CorpusData):
    """Texts and conversations, and how they become batches.

    Args:
        val: another source, to evaluate on (none: what is held out; of wikitext-2 its own validation part).
        holdout: the share of the tokens that is held out for evaluation where there is no `val`.
        length: tokens of a row.
        batch_size: rows of all processes together.
        tokenizer: a directory with the tokenizer to use (none: the model's own or, for a new model, one that is
            trained on the corpus).
        vocab: the entries of that trained tokenizer.
        answers: of conversations, only what the assistant says is learned.
        share: of the tokens that are hidden to be predicted, by the objectives that hide some.
        span: the mean number of tokens that span corruption hides together.
        cache: the folder that keeps the texts as tokens (none: one in the run's directory).
        workers: processes that make batches.
    """

    val: str | None = None
    holdout: float = 0.05
    length: int = 512
    batch_size: int = 8
    tokenizer: str | None = None
    vocab: int = 4096
    answers: bool = True
    share: float = 0.15
    span: float = 3.0
    cache: str | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise InputError(f"data.holdout must lie in [0, 1), not {self.holdout}")
        if not 0 < self.share < 1 or self.span < 1:
            raise InputError("data.share must lie in (0, 1) and data.span be at least 1, not "
                             f"{self.share} and {self.span}")
        for name in ("length", "batch_size", "vocab"):
            if getattr(self, name) < 1:
                raise InputError(f"data.{name} must be at least 1, not {getattr(self, name)}")
        if self.length < 2:
            raise InputError("data.length must be at least 2 tokens, so that one can be predicted")
