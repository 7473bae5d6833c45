"""Rows of picture and caption from CSV, TSV and JSONL files; every complaint names the file and the line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.errors import InputError

ENDINGS = (".csv", ".tsv", ".jsonl")
IMAGE = ("image", "filepath", "path", "file_name", "image_path")
CAPTION = ("caption", "text", "title")
GROUP = ("group",)


@dataclass(frozen=True, kw_only=True)
class Row:
    """`image` as written in the table; `group` is "" where there is none."""

    image: str
    captions: tuple[str, ...]
    group: str


def read_table(path: Path) -> Iterator[Row]:
    """The rows of a table with a column for the picture (image, filepath, path, ...), one for the caption (caption,
    text or title; a list of them in JSONL) and, if there is one, a `group`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise InputError(f"{path}, line {line}: expected UTF-8 text, found the byte 0x{byte:02x}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    return _json_rows(path, text) if path.suffix.lower() == ".jsonl" else _delimited_rows(path, text)


def captions_in(record: dict[str, Any], where: str) -> tuple[str, ...]:
    """The caption or captions of a JSON record."""
    value = record[_column(list(record), CAPTION, where)]
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in values):
        raise InputError(f"{where}: expected a caption or a list of captions, found {json.dumps(value)[:60]}")
    return tuple(values)


def _delimited_rows(path: Path, text: str) -> Iterator[Row]:
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
                image, caption = (_column(header, names, where) for names in (IMAGE, CAPTION))
                continue
            if len(fields) != len(header):
                raise InputError(f"{where}: expected {len(header)} fields as in the first line, found {len(fields)}")
            row = dict(zip(header, fields, strict=True))
            yield _row(row[image], (row[caption],), row, where)
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from None
    if header is None:
        raise InputError(f"{path} is empty; expected a first line with the columns image and caption")


def _json_rows(path: Path, text: str) -> Iterator[Row]:
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
        yield _row(record[_column(list(record), IMAGE, where)], captions_in(record, where), record, where)


def _row(image: Any, captions: tuple[str, ...], fields: dict[str, Any], where: str) -> Row:
    if not isinstance(image, str) or not image.strip():
        raise InputError(f"{where}: expected the path of a picture, found {image!r}")
    group = next((str(fields[name]) for name in GROUP if fields.get(name) not in (None, "")), "")
    return Row(image=image.strip(), captions=captions, group=group)


def _column(names: list[str], wanted: tuple[str, ...], where: str) -> str:
    for name in wanted:
        if name in names:
            return name
    raise InputError(f"{where}: expected a column {' or '.join(wanted)}, found {', '.join(names)[:120]}")
