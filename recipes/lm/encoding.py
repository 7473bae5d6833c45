"""A corpus made a token file, once per tokenizer."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from mm.errors import InputError
from mm.tokenizer.chat import template_of
from mm.tokenizer.tokenizer import Tokenizer

from ..common.progress import Bar
from ..data.corpus import Corpus, Document
from .token_file import Encoded, TokenFile, write_tokens

MEGABYTE = 10**6
T = TypeVar("T")


def token_file(corpus: Corpus, tokenizer: Tokenizer, folder: Path, answers: bool = True) -> TokenFile:
    """The corpus as tokens, from a file in `folder` that is written unless it is there.

    A text is surrounded as the tokenizer surrounds texts and ends with its end token; of a conversation, with
    `answers`, only what the assistant says is to be learned. Raises InputError where nothing is usable.
    """
    key = hashlib.sha256(f"{corpus.fingerprint} {tokenizer_fingerprint(tokenizer)} {answers}".encode()).hexdigest()[:16]
    path = folder / f"{key}.tokens.safetensors"
    if not path.exists():
        documents = watched(f"tokens of {corpus.where}", corpus, encoded(corpus, tokenizer, answers))
        names = [str(file) for file in corpus.files]
        write_tokens(path, documents, tokenizer.vocab_size, names, lambda: corpus.account)
    return TokenFile(path)


def watched(title: str, corpus: Corpus, items: Iterable[T]) -> Iterator[T]:
    """The items, which are made while the corpus is read, under a progress bar in its megabytes."""
    done = 0
    with Bar(f"{title}, MB", -(-corpus.size // MEGABYTE)) as bar:
        for item in items:
            yield item
            if corpus.done // MEGABYTE > done:
                bar.step(corpus.done // MEGABYTE - done)
                done = corpus.done // MEGABYTE


def encoded(corpus: Corpus, tokenizer: Tokenizer, answers: bool) -> Iterator[Encoded]:
    """Every document that can be used; the corpus' account names the others. Raises InputError where there is none."""
    found = False
    for document in corpus:
        place = (document.file, document.line)
        if not document.messages:
            ids = surrounded(document, tokenizer)
            found = found or bool(ids)
            yield Encoded(ids, [(0, len(ids))], document.ends, place)
            continue
        template_of(tokenizer.settings)  # without one, no conversation can be used
        try:
            ids, learned = tokenizer.conversation(document.messages)
            if answers and not learned:
                raise InputError("the assistant says nothing in it")
        except InputError as error:
            where = f"{corpus.files[document.file]}, line {document.line}"
            corpus.account.add("conversations that cannot be used", f"{where}: {error}")
            continue
        found = True
        yield Encoded(ids, learned if answers else [(0, len(ids))], True, place)
    if not found:
        raise InputError(f"{corpus.where} holds nothing to learn from: {'; '.join(corpus.account.sentences()[:2])}")


def surrounded(document: Document, tokenizer: Tokenizer) -> list[int]:
    ends = tokenizer.suffix or (() if tokenizer.eos_id is None else (tokenizer.eos_id,))
    ids = tokenizer.encode(document.text)
    return [*(tokenizer.prefix if document.begins else ()), *ids, *(ends if document.ends else ())]


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Sixteen hex digits of all that its files say."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        for file in sorted(Path(folder).iterdir()):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]
