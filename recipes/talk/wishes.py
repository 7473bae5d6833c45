"""What a person may ask of a conversation: the query parameters of Kyutai's clients, read strictly."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mm.decode.sampling import Sampling
from mm.errors import InputError
from mm.speech.dialogue import AUDIO, TEXT

FORMATS = ("opus", "pcm")
CONTEXT = 64  # text tokens that a repetition penalty looks back at, and at most so many


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """How one session chooses its tokens, and how its sound travels. pad_mult: how much likelier the text's padding
    becomes, as a logarithm; repetition_penalty: for the text's last `context` tokens but padding."""

    text: Sampling = TEXT
    audio: Sampling = AUDIO
    pad_mult: float = 0.0
    repetition_penalty: float = 1.0
    context: int = CONTEXT
    format: str = "opus"

    @classmethod
    def of(cls, query: Mapping[str, str], plain: Wishes | None = None) -> Wishes:
        """From a query; what it leaves out is as in `plain`, names that are not known are passed over, seeds that are
        not given drawn. Raises InputError for values that make no sense."""
        plain = plain or cls()
        form = query.get("format", "opus")
        if form not in FORMATS:
            raise InputError(f"format should be {' or '.join(FORMATS)}, not {form!r}")
        return cls(
            text=sampling(query, "text", plain.text), audio=sampling(query, "audio", plain.audio), format=form,
            pad_mult=number(query, "pad_mult", 0.0, -100, 100),
            repetition_penalty=number(query, "repetition_penalty", 1.0, 0.01, 100),
            context=whole(query, "repetition_penalty_context", CONTEXT, CONTEXT))

    def told(self) -> dict[str, Any]:
        """As the clients name them."""
        return {"text_temperature": self.text.temperature, "text_topk": self.text.top_k,
                "audio_temperature": self.audio.temperature, "audio_topk": self.audio.top_k, "pad_mult": self.pad_mult,
                "repetition_penalty_context": self.context, "repetition_penalty": self.repetition_penalty}


def sampling(query: Mapping[str, str], stream: str, default: Sampling) -> Sampling:
    temperature = number(query, f"{stream}_temperature", default.temperature, 0, 100)
    top_k = whole(query, f"{stream}_topk", default.top_k, 1 << 20)
    seed = whole(query, f"{stream}_seed", None, (1 << 64) - 1)
    return Sampling(temperature=temperature, top_k=top_k if temperature else 0,
                    seed=secrets.randbits(32) if seed is None else seed)


def number(query: Mapping[str, str], name: str, default: float, least: float, most: float) -> float:
    try:
        value = float(query.get(name, default))
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise InputError(f"{name} should be a number from {least:g} to {most:g}, not {query[name]!r}")
    return value


def whole(query: Mapping[str, str], name: str, default: int | None, most: int) -> int | None:
    if name not in query:
        return default
    given = query[name]
    if not (given.isascii() and given.isdigit()) or len(given) > 20 or int(given) > most:
        raise InputError(f"{name} should be a whole number from 0 to {most}, not {given!r}")
    return int(given)
