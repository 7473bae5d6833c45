"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from mm.tokenizer.tokenizer import Tokenizer

CONTEXT = 6  # tokens before the new ones that a tokenizer may need to see, for example to know that a space is due


class TextStream:
    """Feed ids with `push`, end with `flush`; `text` is all that was given out, `stopped` whether a stop string came.

    Holds back half characters and what may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int] = (), stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.ids = self.known(prompt)[-CONTEXT:]
        self.start, self.read = 0, len(self.ids)  # ids[start:read] is context whose text was given out
        self.text, self.held, self.stopped = "", "", False

    def push(self, token: int) -> str:
        """The text that is now certain, often empty."""
        if self.tokenizer is None or self.stopped:
            return ""
        self.ids += self.known([token])
        before, after = self.decode(self.start, self.read), self.decode(self.start, len(self.ids))
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return ""
        self.start, self.read = max(self.start, self.read - CONTEXT), len(self.ids)
        return self.give(after[len(before):])

    def flush(self) -> str:
        """What was held back, at the end of a text that no stop string ended."""
        if self.tokenizer is None or self.stopped:
            return ""
        rest = self.decode(self.start, len(self.ids))[len(self.decode(self.start, self.read)):]
        self.read = len(self.ids)
        piece = self.give(rest)
        if not self.stopped:
            piece, self.text, self.held = piece + self.held, self.text + self.held, ""
        return piece

    def give(self, new: str) -> str:
        """New text, after which all is certain but a possible beginning of a stop string."""
        text = self.held + new
        ends = [at for at in (text.find(s) for s in self.stop) if at >= 0]
        if ends:
            self.stopped, self.held, piece = True, "", text[:min(ends)]
        else:
            hold = max((beginning(text, s) for s in self.stop), default=0)
            piece, self.held = text[:len(text) - hold], text[len(text) - hold:]
        self.text += piece
        return piece

    def decode(self, start: int, stop: int) -> str:
        return self.tokenizer.decode(self.ids[start:stop])

    def known(self, ids: Sequence[int]) -> list[int]:
        """Ids that the tokenizer has; an embedding may be padded to more rows."""
        return [] if self.tokenizer is None else [i for i in ids if i < self.tokenizer.vocab_size]


def beginning(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
