"""Webdataset shards with random access: a tar file is scanned once, its pictures are read where they lie."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from mm.errors import InputError

from .pictures import ENDINGS, TarPicture
from .tables import captions_in


def read_shards(pattern: str) -> Iterator[tuple[TarPicture, list[str]]]:
    """(picture, captions) of every sample in the shards that a pattern such as "train-{0000..0007}.tar" names.

    A sample is the members whose names agree up to the first dot after the last slash; its captions come from .txt
    and from .json members. Raises InputError for a shard that is missing, truncated or compressed.
    """
    for picture, members in read_samples(pattern, ("txt", "json")):
        yield picture, [caption for member in members for caption in _captions(*member)]


Member = tuple[str, str, bytes]  # where it lies, its ending and its content


def read_samples(pattern: str, endings: Sequence[str]) -> Iterator[tuple[TarPicture, list[Member]]]:
    """Every picture and the members of its sample that have one of these endings; raises InputError as above."""
    for name in braceexpand(pattern):
        yield from _samples(Path(name).expanduser(), endings)


def _samples(shard: Path, endings: Sequence[str]) -> Iterator[tuple[TarPicture, list[Member]]]:
    pictures: dict[str, TarPicture] = {}
    members: dict[str, list[Member]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, ending = _split(member.name)
                if "." + ending.rsplit(".", 1)[-1] in ENDINGS:
                    pictures.setdefault(key, TarPicture(shard, member.name, member.offset_data, member.size))
                elif ending in endings and (file := tar.extractfile(member)):
                    members.setdefault(key, []).append((f"{shard}:{member.name}", ending, file.read()))
    except FileNotFoundError:
        raise InputError(f"{shard} does not exist") from None
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{shard} is not a whole, uncompressed tar file ({error})") from None
    return ((picture, members.get(key, [])) for key, picture in pictures.items())


def _split(member: str) -> tuple[str, str]:
    folder, _, name = member.rpartition("/")
    stem, _, ending = name.partition(".")
    return f"{folder}/{stem}", ending.lower()


def _captions(where: str, ending: str, content: bytes) -> list[str]:
    value = parsed(where, ending, content)
    if ending == "txt":
        return [value]
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object with a caption")
    return list(captions_in(value, where))


def parsed(where: str, ending: str, content: bytes) -> Any:
    """The value of a .json member, the text of any other. Raises InputError."""
    try:
        text = content.decode("utf-8-sig")
        return json.loads(text) if ending == "json" else text
    except ValueError:
        raise InputError(f"{where} is not {'valid JSON' if ending == 'json' else 'UTF-8 text'}") from None
