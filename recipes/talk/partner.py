"""Whom a person talks to: a duplex model and the codec that it hears and speaks through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mm.decode.sampling import Sampling
from mm.errors import InputError
from mm.spec import Choice

from ..common.options import choose_device
from .codec_of import Note, codec_of
from .wishes import Wishes

if TYPE_CHECKING:
    import torch

    from mm.speech.duplex import DuplexLM

    from ...codecs.mimi import Mimi

SPEAKING = "lm_gen_config"  # where a model's config says at which temperatures it speaks
BEST = "very_good"  # of the recordings that Hibiki learned from


@dataclass(frozen=True)
class Partner:
    """Both on one device and in evaluation mode. `name` is what the model was opened by; `told` are its conditions, in
    every conversation; sinks: the first so many frames of each stay in sight (`DuplexLM.init_state`)."""

    model: DuplexLM
    codec: Mimi
    name: str
    told: Mapping[str, str] = field(default_factory=dict)
    sinks: int = 0

    def __post_init__(self) -> None:
        s, q = self.model.spec, self.codec.spec.quantizer
        if not s.own or not s.heard:
            raise InputError(f"{self.name} cannot talk: it says {s.own} codebooks and hears {s.heard}")
        if s.card != q.size or max(s.own, s.heard) > q.codebooks:
            raise InputError(f"{self.name} says {s.own} and hears {s.heard} codebooks of {s.card} codes, its codec has "
                             f"{q.codebooks} of {q.size}: they do not belong together")
        if self.codec.spec.seanet.channels != 1:
            raise InputError(f"{self.name}: the codec has {self.codec.spec.seanet.channels} channels, a voice has one")
        if (note := Note.of(self.model)) is not None:
            note.check(self.name, self.codec)
        words = [one.name for one in s.conditioning.conditions if isinstance(one.of, Choice)] if s.conditioning else []
        odd = [name for name in self.told if name not in words]
        if odd:
            raise InputError(f"{self.name} cannot be told {odd[0]!r}, " + (f"only {', '.join(words)}" if words else
                                                                           "nor anything else"))
        self.model.condition(self.conditions(1))  # words that the model does not know,
        self.model.stack.windows(self.sinks)  # and frames that it cannot keep in sight, raise

    @classmethod
    def open(cls, name: str, codec: str | None = None, device: str | None = None,
             told: Mapping[str, str] | None = None, sinks: int = 0) -> Partner:
        """A duplex model by directory, hub name, file or the name of shipped weights, in float32 on a CPU and as stored
        elsewhere, with its codec: the one named, or its own. Raises InputError."""
        import torch

        from mm import DuplexLM

        from ...codecs.mimi import Mimi

        place = choose_device(device)
        dtype = torch.float32 if place.type == "cpu" else None
        model = DuplexLM.from_pretrained(name, dtype=dtype, device=place)
        found = codec or codec_of(name, model)
        told = usual(model) | dict(told or {})
        return cls(model, Mimi.from_pretrained(found, dtype=torch.float32, device=place), str(name), told, sinks)

    def arrange(self, rows: int) -> None:
        """On a CPU, weights in the order in which a step of so many conversations is fastest."""
        from mm.lowbit import arrange, arrange_for_rows
        from mm.nn.linear import ONEDNN

        if self.device.type == "cpu" and rows == 1:
            arrange(self.model)
        elif self.device.type == "cpu" and ONEDNN:
            arrange_for_rows(self.model)
            arrange_for_rows(self.codec)

    def conditions(self, rows: int) -> dict[str, list[str]]:
        """What it is told, for so many conversations."""
        return {name: [word] * rows for name, word in self.told.items()}

    @property
    def wishes(self) -> Wishes:
        """Those of a client that asks for nothing: what the checkpoint's config says of sampling, or the usual."""
        told, plain = self.model.generation.get(SPEAKING) or {}, Wishes()

        def sampling(usual: Sampling, temperature: str, top_k: str) -> Sampling:
            warm = told.get(temperature, usual.temperature) if told.get("use_sampling", True) else 0
            return Sampling(temperature=warm, top_k=told.get(top_k, usual.top_k) if warm else 0)
        return Wishes(text=sampling(plain.text, "temp_text", "top_k_text"),
                      audio=sampling(plain.audio, "temp", "top_k"))

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


def usual(model: DuplexLM) -> dict[str, str]:
    """What Kyutai's server tells Hibiki, and no other model."""
    known = model.spec.conditioning.conditions if model.spec.conditioning and model.spec.text.end is not None else ()
    return {one.name: BEST for one in known if isinstance(one.of, Choice) and BEST in one.of.values}
