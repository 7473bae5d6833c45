"""What transformers and vLLM read when they generate: the ids around a text, and generation_config.json as it came."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mm.checkpoint import files as checkpoint
from mm.checkpoint.family import Extras, Opened
from mm.checkpoint.files import Folder
from mm.errors import InputError

GENERATION = "generation_config.json"
ENDS = "eos_token_id"


def complete(folder: Folder, opened: Opened) -> Opened:
    """With the directory's generation settings; where there are none, with the ends that the config names. Raises
    InputError for ends that are no ids."""
    file = folder / GENERATION
    found: dict[str, Any] = folder.json(GENERATION)
    if not file.is_file():
        file, found = folder / checkpoint.CONFIG, {ENDS: folder.json(checkpoint.CONFIG).get(ENDS)}
    ends = found.get(ENDS)
    if ends is not None and not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends])):
        raise InputError(f"{file}: {ENDS} should be an id or a list of ids, not {ends!r}")
    return replace(opened, extras=replace(opened.extras, generation=found))


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    """The generation settings and the config, with the ids of start, end and padding. null in a config keeps out those
    of transformers' classes."""
    t = extras.tokenizer
    bos, eos, pad = (None, None, None) if t is None else (t.bos_id, t.eos_id, t.pad_id)
    ids = {"bos_token_id": bos, ENDS: eos, "pad_token_id": pad}
    told = {name: value for name, value in (ids | extras.generation).items() if value is not None}
    return {GENERATION: told, checkpoint.CONFIG: config | ids}
