"""Rows of picture, caption and sound from CSV, TSV and JSONL files; every complaint names the file and the line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.errors import InputError

ENDINGS = (".csv", ".tsv", ".jsonl")
IMAGE = ("image", "filepath", "path", "file_name", "image_path")
CAPTION = ("caption", "text", "title")
AUDIO = ("audio", "sound", "audio_path")
GROUP = ("group",)


@dataclass(frozen=True, kw_only=True)
class Row:
    """`image` and `audio` as written in the table; each, and `group`, is "" where there is none."""

    image: str
    captions: tuple[str, ...]
    group: str
    audio: str = ""


def read_table(path: Path) -> Iterator[Row]:
    """The rows of a table with two or three columns of these: the picture (image, filepath, path, ...), the caption
    (caption, text or title; a list of them in JSONL) and the sound (audio or sound), whose cells may be empty where
    there are three; and, if there is one, a `group`."""
    return (_row(record, where) for where, record in records(path, _columns))


def records(path: Path, check: Callable[[list[str], str], Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, fields by the lower-case name of the column) of every row; `check` is given the names of the
    columns and the line, once where there is a header."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise InputError(f"{path}, line {line}: expected UTF-8 text, found the byte 0x{byte:02x}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    return (_json_rows if path.suffix.lower() == ".jsonl" else _delimited_rows)(path, text, check)


def captions_in(record: dict[str, Any], where: str) -> tuple[str, ...]:
    """The caption or captions of a JSON record."""
    value = record[_column(list(record), CAPTION, where)]
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in values):
        raise InputError(f"{where}: expected a caption or a list of captions, found {json.dumps(value)[:60]}")
    return tuple(values)


def _delimited_rows(path: Path, text: str, check: Callable[[list[str], str], Any]
                    ) -> Iterator[tuple[str, dict[str, Any]]]:
    first = text.partition("\n")[0]
    tabs = path.suffix.lower() == ".tsv" or ("\t" in first and "," not in first)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", strict=True)
    header: list[str] | None = None
    try:
        for fields in reader:
            where = f"{path}, line {reader.line_num}"
            if not fields:
                continue
            if header is None:
                header = [name.strip().lower() for name in fields]
                check(header, where)
                continue
            if len(fields) != len(header):
                raise InputError(f"{where}: expected {len(header)} fields as in the first line, found {len(fields)}")
            yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from None
    if header is None:
        raise InputError(f"{path} is empty; expected a first line with the names of the columns")


def _json_rows(path: Path, text: str, check: Callable[[list[str], str], Any]
               ) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected a JSON object, found {line.strip()[:40]}")
        record = {str(key).lower(): value for key, value in record.items()}
        check(list(record), where)
        yield where, record


def _row(fields: dict[str, Any], where: str) -> Row:
    columns = _columns(list(fields), where)
    open_ = len(columns) == 3  # a row may lack one
    image, audio = (_path(fields, columns.get(kind), kind, open_, where) for kind in ("picture", "sound"))
    captions = captions_in(fields, where) if fields.get(columns.get("caption", "")) is not None else ()
    group = next((str(fields[name]) for name in GROUP if fields.get(name) not in (None, "")), "")
    return Row(image=image, captions=captions, group=group, audio=audio)


def _path(fields: dict[str, Any], column: str | None, kind: str, may_lack: bool, where: str) -> str:
    value = "" if column is None else fields[column]
    if column is None or (may_lack and value in (None, "")):
        return ""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: expected the path of a {kind}, found {value!r}")
    return value.strip()


def _columns(names: list[str], where: str) -> dict[str, str]:
    """The columns by what they hold. Raises InputError unless there are two."""
    wanted = {"picture": IMAGE, "caption": CAPTION, "sound": AUDIO}
    found = {kind: next((name for name in known if name in names), None) for kind, known in wanted.items()}
    if found["sound"] is None:
        _column(names, IMAGE, where), _column(names, CAPTION, where)
    elif not (found["picture"] or found["caption"]):
        _column(names, IMAGE + CAPTION, where)
    return {kind: name for kind, name in found.items() if name}


def _column(names: list[str], wanted: tuple[str, ...], where: str) -> str:
    for name in wanted:
        if name in names:
            return name
    raise InputError(f"{where}: expected a column {' or '.join(wanted)}, found {', '.join(names)[:120]}")
