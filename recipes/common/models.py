"""A model of whatever kind, by what its files say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mm.checkpoint.pretrained import Pretrained

LANGUAGE = {"decoder": "TextDecoder", "encoder": "TextEncoder", "seq2seq": "Seq2Seq"}
SPEECH = {"duplex": "DuplexLM", "csm": "CSM"}


def open_any(name: str | Path, *, allow_pickle: bool = False) -> Pretrained:
    """A language model (a directory, a hub name, a .gguf or llama2.c file), a duplex model (or a .safetensors file of
    Moshi's), a codec (or Kyutai's file of one), a CLIP or a ViT. Raises InputError."""
    import mm
    from mm.checkpoint import files as checkpoint
    from mm.speech.families.duplex import FAMILIES as SPEAKING
    from mm.text.families import FAMILIES

    from ...codecs.families import FAMILIES as CODECS
    from ...codecs.families import is_codec
    from ...codecs.mimi import Mimi
    from ...encoders.any import open_model

    path = Path(name).expanduser()
    if path.is_file():
        kind = "decoder" if path.suffix != ".safetensors" else "mimi" if is_codec(path) else "duplex"
    else:
        folder = checkpoint.resolve(name, (checkpoint.CONFIG,))
        kind = FAMILIES.kind_of(folder) or SPEAKING.kind_of(folder) or CODECS.kind_of(folder)
    if kind is None:
        return open_model(name, allow_pickle=allow_pickle)
    if kind == "mimi":
        return Mimi.from_pretrained(name, allow_pickle=allow_pickle)
    return getattr(mm, (LANGUAGE | SPEECH)[kind]).from_pretrained(name, allow_pickle=allow_pickle)


def is_language(model: Pretrained) -> bool:
    return model.kind in LANGUAGE


def speaks(model: Pretrained) -> bool:
    return model.kind in SPEECH
