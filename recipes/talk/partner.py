"""Whom a person talks to: a duplex model and the codec that it hears and speaks through."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mm.errors import InputError

from ...codecs.families import FAMILIES as CODECS

if TYPE_CHECKING:
    import torch

    from mm.duplex import DuplexLM

    from ...codecs.mimi import Mimi

CODEC = "codec"  # the folder within a model's directory where our own layout keeps it
PATTERNS = ("tokenizer-*.safetensors", "mimi*.safetensors")


@dataclass(frozen=True)
class Partner:
    """Both on one device and in evaluation mode. `name` is what the model was opened by."""

    model: DuplexLM
    codec: Mimi
    name: str

    def __post_init__(self) -> None:
        s, q = self.model.spec, self.codec.spec.quantizer
        if not s.own or not s.heard:
            raise InputError(f"{self.name} cannot talk: it says {s.own} codebooks and hears {s.heard}")
        if s.card != q.size or max(s.own, s.heard) > q.codebooks:
            raise InputError(f"{self.name} says {s.own} and hears {s.heard} codebooks of {s.card} codes, its codec has "
                             f"{q.codebooks} of {q.size}: they do not belong together")
        if self.codec.spec.seanet.channels != 1:
            raise InputError(f"{self.name}: the codec has {self.codec.spec.seanet.channels} channels, a voice has one")

    @classmethod
    def open(cls, name: str, codec: str | None = None, device: str | None = None) -> Partner:
        """A duplex model by directory, hub name or file, in float32 on a CPU and as stored elsewhere, with its codec:
        the one named, or what lies beside it. Raises InputError."""
        import torch

        from mm import DuplexLM

        from ...codecs.mimi import Mimi

        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = DuplexLM.from_pretrained(name, dtype=torch.float32 if place.type == "cpu" else None, device=place)
        found = codec or beside(name)
        return cls(model, Mimi.from_pretrained(found, dtype=torch.float32, device=place), str(name))

    def arrange(self, rows: int) -> None:
        """On a CPU, weights in the order in which a step of so many conversations is fastest."""
        from mm.arrange import arrange, arrange_for_rows
        from mm.linear import ONEDNN

        if self.device.type == "cpu" and rows == 1:
            arrange(self.model)
        elif self.device.type == "cpu" and ONEDNN:
            arrange_for_rows(self.model)
            arrange_for_rows(self.codec)

    @property
    def device(self) -> torch.device:
        return self.model.text.weight.device

    @property
    def frame(self) -> int:
        """Samples per step."""
        return self.codec.spec.frame

    @property
    def rate(self) -> int:
        return self.codec.spec.rate

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.frame / self.rate


def beside(name: str) -> Path:
    """The codec that belongs to a model: in its folder `codec`, by its config, or by the names of Kyutai's files.
    Raises InputError when there is none."""
    path = Path(name).expanduser()
    folder = path.parent if path.is_file() else CODECS.resolve(name)
    if (folder / CODEC).is_dir():
        return folder / CODEC
    if CODECS.kind_of(folder):
        return folder
    found = sorted(file for pattern in PATTERNS for file in folder.glob(pattern))
    if not found:
        raise InputError(f"{folder} holds no codec: no folder {CODEC}, no mimi_name in its config, no "
                         f"{' or '.join(PATTERNS)}; name one with --codec")
    return found[0]
