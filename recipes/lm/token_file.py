"""A corpus as tokens on disk: one safetensors file a tokenizer, read by memory map, written whole or not at all.

It holds `tokens` (N,) uint16 or uint32, `ends` (documents,) int64 of where each document ends, `places` (documents, 2)
int64 of its file and line, `learned` (spans, 2) int64 of the tokens that a loss may count, `files`, the names as JSON,
and in its metadata a report of unusable input.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np

from mm.checkpoint.files import replacing
from mm.errors import InputError
from mm.tokenizer.chat import template_of
from mm.tokenizer.tokenizer import Tokenizer

from ..common.progress import Bar
from ..data.corpus import Corpus, Document
from ..data.report import Account

HEADER = 1 << 18  # bytes kept for the header, which is written last
KINDS = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I64": np.int64}
SAVED = 1 << 20  # tokens that are written at a time


class Encoded(NamedTuple):
    """A document, or a part of one: its ids, the spans [a, b) of them to learn, whether it is its last part, and the
    number of its file and its line."""

    ids: Sequence[int]
    learned: Sequence[tuple[int, int]]
    ends: bool
    place: tuple[int, int]


class TokenFile:
    """An open token file. Raises InputError for one that is no such file or cut short."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            arrays, self.about = mapped(self.path)
            self.tokens, self.ends, self.places, self.learned = (
                arrays[name] for name in ("tokens", "ends", "places", "learned"))
            self.files = json.loads(arrays["files"].tobytes())
            self.account = Account.from_data(json.loads(self.about["account"]))
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise InputError(f"{path} is not a whole token file ({error}); delete it, and it is made anew") from None
        self.size = int(self.ends[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile, (self.path,)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of the tokens, the documents and what of them is learned."""
        return self.about["digest"]

    def document(self, at: int) -> int:
        """The number of the document that the token at this place belongs to."""
        return int(np.searchsorted(self.ends, at, "right"))

    def where(self, document: int) -> str:
        """The file and line of a document, for messages."""
        file, line = self.places[document].tolist()
        return f"{self.files[file]}, line {line}"

    def counted(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) bool: which of these tokens a loss may count."""
        kept = np.zeros(stop - start, bool)
        first = int(np.searchsorted(self.learned[:, 1], start, "right"))
        for a, b in self.learned[first:]:
            if a >= stop:
                break
            kept[max(a - start, 0) : b - start] = True
        return kept


def mapped(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a safetensors file, mapped and not read, and its metadata."""
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(min(length, 1 << 27)))
    about, arrays = header.pop("__metadata__"), {}
    for name, part in header.items():
        start, stop = part["data_offsets"]
        if 8 + length + stop > path.stat().st_size:
            raise ValueError("it ends early")
        empty = start == stop
        arrays[name] = (np.zeros(part["shape"], KINDS[part["dtype"]]) if empty else np.memmap(
            path, KINDS[part["dtype"]], "r", 8 + length + start, tuple(part["shape"])))
    return arrays, about


def write_tokens(path: Path, documents: Iterable[Encoded], vocab: int, files: Sequence[str],
                 account: Callable[[], Account]) -> None:
    """Writes a token file in constant memory but for 40 bytes a document. `account` is asked once `documents` end."""
    kind = "U16" if vocab <= 1 << 16 else "U32"
    ends, places, learned = array("q"), array("q"), array("q")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part, open(part, "r+b") as file:
        file.seek(HEADER)
        digest, size = hashlib.blake2b(digest_size=8), 0
        for chunk in chunks(documents, ends, places, learned, KINDS[kind]):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        size += file.write(bytes(-size % 8))
        count = size // np.dtype(KINDS[kind]).itemsize
        parts = {"tokens": (kind, [count], size)}
        names = np.frombuffer(json.dumps(list(files)).encode(), np.uint8)
        for name, (dtype, values, shape) in {
                "ends": ("I64", ends, [len(ends)]), "places": ("I64", places, [len(places) // 2, 2]),
                "learned": ("I64", learned, [len(learned) // 2, 2]), "files": ("U8", names, [len(names)])}.items():
            parts[name] = (dtype, shape, file.write(values.tobytes()))
            if name in ("ends", "learned"):
                digest.update(values.tobytes())
        about = {"format": "pt", "digest": digest.hexdigest(), "account": json.dumps(account().to_data())}
        write_header(file, parts, about)


def chunks(documents: Iterable[Encoded], ends: array, places: array, learned: array, kind: type) -> Iterator[bytes]:
    """The tokens, many at a time, while what is known of the documents is collected."""
    held, size, fresh = array("q"), 0, True
    for document in documents:
        if fresh:
            places.extend(document.place)
        for a, b in document.learned:
            if learned and learned[-1] == size + a:
                learned[-1] = size + b
            else:
                learned.extend((size + a, size + b))
        held.extend(document.ids)
        size, fresh = size + len(document.ids), document.ends
        if document.ends:
            ends.append(size)
        if len(held) >= SAVED:
            yield np.frombuffer(held, np.int64).astype(kind).tobytes()
            held = array("q")
    yield np.frombuffer(held, np.int64).astype(kind).tobytes()


def write_header(file: IO[bytes], parts: dict[str, tuple[str, list[int], int]], about: dict[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": about}
    at = 0
    for name, (kind, shape, size) in parts.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    file.seek(0)
    file.write(struct.pack("<Q", HEADER - 8) + text.ljust(HEADER - 8))


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
