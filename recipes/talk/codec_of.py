"""Which codec a duplex model hears and speaks through: noted when it is trained, found when it talks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.checkpoint.door import SHIPPED, resolve
from mm.errors import InputError

from ...codecs.families import FAMILIES as CODECS

if TYPE_CHECKING:
    from mm.speech.duplex import DuplexLM

    from ...codecs.file import Header
    from ...codecs.mimi import Mimi

CODEC = "codec"  # the folder within a model's directory where our own layout keeps it
NOTE = "codec_config"  # where its config says which it is
PATTERNS = ("tokenizer-*.safetensors", "mimi*.safetensors")  # Kyutai's files


@dataclass(frozen=True)
class Note:
    """What a model's config says of its codec. name: of shipped weights or on the hub; None where the codec lies in
    the folder `codec` beside the model, or is not known but by its `weights`, their fingerprint. frame_rate in Hz."""

    name: str | None
    weights: str
    frame_rate: float

    @classmethod
    def of(cls, model: DuplexLM) -> Note | None:
        """Raises InputError for a note that is none."""
        told = model.generation.get(NOTE)
        try:
            return None if told is None else cls(**told)
        except TypeError:
            raise InputError(f"the model's config should hold name, weights and frame_rate under {NOTE}, not "
                             f"{told!r}") from None

    @classmethod
    def taken(cls, header: Header) -> Note:
        """Of the codec that wrote a file of codes."""
        public = header.model in SHIPPED or (header.model.count("/") == 1 and not Path(header.model).exists())
        return cls(header.model if public else None, header.weights, header.rate / header.frame)

    def check(self, name: str, codec: Mimi) -> None:
        """Raises InputError where a codec is not the one of this note, of the model that is called `name`."""
        if self.frame_rate != codec.spec.frame_rate:
            raise InputError(f"{name} was trained with {self.frame_rate:g} frames a second, its codec has "
                             f"{codec.spec.frame_rate:g}: they do not belong together")
        if (weights := codec.fingerprint()) != self.weights:
            raise InputError(f"{name} was trained with a codec of the weights {self.weights}, not {weights}: they do "
                             "not belong together")

    def told(self) -> dict[str, Any]:
        return {NOTE: asdict(self)}


def codec_of(name: str | Path, model: DuplexLM) -> str | Path:
    """Where the codec of a model is that was opened by this name: in its folder `codec`, as its config says, or by the
    names of Kyutai's files. Raises InputError when there is none."""
    note = Note.of(model)
    folder = resolve(name, CODECS.weights) if model.origin is None else model.origin.folder
    folder = folder.parent if folder.is_file() else folder
    if (folder / CODEC).is_dir():
        return folder / CODEC
    if note is not None and note.name is not None:
        return note.name
    if CODECS.kind_of(folder):
        return folder
    if (found := kyutais(folder)) is None:
        raise InputError(f"{folder} holds no codec: no folder {CODEC}, no codec or mimi_name in its config, no "
                         f"{' or '.join(PATTERNS)}; name one with --codec")
    return found


def kyutais(folder: Path) -> Path | None:
    """The codec among Kyutai's files in a folder."""
    return min((file for pattern in PATTERNS for file in folder.glob(pattern)), default=None)
