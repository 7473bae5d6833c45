"""Webdataset shards with random access: a tar file is scanned once, its pictures are read where they lie."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from braceexpand import braceexpand

from mm.errors import InputError

from .pictures import ENDINGS, TarPicture
from .tables import captions_in


def read_shards(pattern: str) -> Iterator[tuple[TarPicture, list[str]]]:
    """(picture, captions) of every sample in the shards that a pattern such as "train-{0000..0007}.tar" names.

    A sample is the members whose names agree up to the first dot after the last slash; its captions come from .txt
    and from .json members. Raises InputError for a shard that is missing, truncated or compressed.
    """
    for name in braceexpand(pattern):
        yield from _samples(Path(name).expanduser())


def _samples(shard: Path) -> Iterator[tuple[TarPicture, list[str]]]:
    pictures: dict[str, TarPicture] = {}
    captions: dict[str, list[str]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, ending = _split(member.name)
                if "." + ending.rsplit(".", 1)[-1] in ENDINGS:
                    pictures.setdefault(key, TarPicture(shard, member.name, member.offset_data, member.size))
                elif ending in ("txt", "json") and (file := tar.extractfile(member)):
                    captions.setdefault(key, []).extend(_captions(f"{shard}:{member.name}", ending, file.read()))
    except FileNotFoundError:
        raise InputError(f"{shard} does not exist") from None
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{shard} is not a whole, uncompressed tar file ({error})") from None
    return ((picture, captions.get(key, [])) for key, picture in pictures.items())


def _split(member: str) -> tuple[str, str]:
    folder, _, name = member.rpartition("/")
    stem, _, ending = name.partition(".")
    return f"{folder}/{stem}", ending.lower()


def _captions(where: str, ending: str, content: bytes) -> list[str]:
    try:
        text = content.decode("utf-8-sig")
        if ending == "txt":
            return [text]
        record = json.loads(text)
    except ValueError:
        raise InputError(f"{where} is not {'UTF-8 text' if ending == 'txt' else 'valid JSON'}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object with a caption")
    return list(captions_in(record, where))
