"""Lines of text files whose bytes are not trusted, and the documents that they make up."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from .report import Account

END = "<|endoftext|>"
PART = 1 << 20  # bytes of a text that are held at a time; longer documents are cut after a line
HEADING = re.compile(r" = [^=].* = ?\n?")  # of an article of WikiText
CUTS: dict[str, Callable[[str, str], bool]] = {  # whether a document ends between two lines
    "file": lambda before, line: False, "blank": lambda before, line: not line.strip(),
    "line": lambda before, line: True,
    "article": lambda before, line: not before.strip() and HEADING.fullmatch(line) is not None}


class Lines:
    """The lines of a file, plain or .gz, with their numbers; bytes that are not UTF-8 become U+FFFD and are counted.
    Raises ValueError for a binary file."""

    def __init__(self, file: Path, raw: IO[bytes], account: Account) -> None:
        self.file, self.account = file, account
        self.raw = gzip.GzipFile(fileobj=raw) if file.suffix.lower() == ".gz" else raw
        if b"\0" in self.raw.peek(4096)[:4096]:
            raise ValueError("it holds NUL bytes, so that it is binary or not UTF-8")

    def whole(self) -> Iterator[tuple[int, str]]:
        for number, line in enumerate(self.raw, 1):
            yield number, self.decode(line, number)

    def parts(self) -> Iterator[tuple[int, str]]:
        """The same, but a very long line comes in several parts of one number."""
        number, rest = 1, b""
        while line := self.raw.readline(PART):
            line, rest = cut_character(rest + line)
            yield number, self.decode(line, number)
            number += line.endswith(b"\n")
        if rest:
            yield number, self.decode(rest, number)

    def decode(self, line: bytes, number: int) -> str:
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            self.account.add("lines with bytes that are not UTF-8, which were replaced",
                             f"{self.file}, line {number}: the byte 0x{line[error.start]:02x}")
            return line.decode(errors="replace")


def cut_character(line: bytes) -> tuple[bytes, bytes]:
    """The line without the beginning of a UTF-8 character at its end, and that beginning."""
    for back in range(1, min(4, len(line) + 1)):
        byte = line[-back]
        if byte >= 0xC0:
            whole = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return (line[:-back], line[-back:]) if whole > back else (line, b"")
        if byte < 0x80:
            break
    return line, b""


def units(lines: Lines, split: str) -> Iterator[dict[str, Any]]:
    """The documents of a plain text, as the fields of `Document`: line, text, begins, ends."""
    held: list[str] = []
    size, first, last, begins, before = 0, 1, 0, True, ""

    def flush(ends: bool) -> Iterator[dict[str, Any]]:
        nonlocal size, begins
        text = "".join(held)
        held.clear()
        size = 0
        if text.strip() or (ends and not begins):
            yield {"line": first, "text": text, "begins": begins, "ends": ends}
            begins = ends
    for number, line in lines.parts():
        if number != last and CUTS[split](before, line):
            yield from flush(True)
        last, before = number, line
        for i, piece in enumerate(line.split(END)):
            if i:
                yield from flush(True)
            elif size + len(piece) > PART:
                yield from flush(False)
            if not held:
                first = number
            held.append(piece)
            size += len(piece)
    yield from flush(True)
