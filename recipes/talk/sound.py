"""How sound travels: as one Ogg/Opus stream for each direction, Kyutai's way, or as plain samples for pages without an
Opus encoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from mm.errors import InputError

RATES = (8000, 16000, 24000, 48000)  # Hz, of Opus
PIECE = 512  # bytes decoded at a time: a hostile packet of a few bytes can hold 0.12 s
IDLE = 1 << 17  # bytes without any sound that are taken: a hostile packet need not end


class Wire(Protocol):
    """One connection's sound, in both directions."""

    def heard(self, data: bytes) -> Iterator[np.ndarray]:
        """Bytes, cut anywhere -> waves (n,) float32, a little at a time. Raises InputError for bytes that are no
        sound."""

    def said(self, wave: np.ndarray) -> bytes:
        """(n,) float32 -> what is ready to be sent."""


class OggOpus:
    """Pages of 40 ms, by sphn, which Kyutai's own servers and clients use."""

    def __init__(self, rate: int):
        from sphn import OpusStreamReader, OpusStreamWriter

        if rate not in RATES:
            raise InputError(f"Opus has no rate of {rate} Hz, only {', '.join(map(str, RATES))}")
        self.reader, self.writer, self.idle = OpusStreamReader(rate), OpusStreamWriter(rate), 0

    def heard(self, data: bytes) -> Iterator[np.ndarray]:
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            try:
                wave = self.reader.append_bytes(piece)
            except ValueError as error:
                raise InputError(f"the sound is not an Ogg/Opus stream ({error})") from None
            self.idle = 0 if len(wave) else self.idle + len(piece)
            if self.idle > IDLE:
                raise InputError(f"{IDLE} bytes of an Ogg/Opus stream held no sound")
            yield wave

    def said(self, wave: np.ndarray) -> bytes:
        return self.writer.append_pcm(np.ascontiguousarray(wave, dtype=np.float32))


class Samples:
    """16 bits each, little endian, at the codec's rate."""

    def heard(self, data: bytes) -> Iterator[np.ndarray]:
        if len(data) % 2:
            raise InputError(f"samples have two bytes each, so {len(data)} bytes are not whole samples")
        yield np.frombuffer(data, "<i2").astype(np.float32) / 32768

    def said(self, wave: np.ndarray) -> bytes:
        return (np.clip(wave, -1, 1) * 32767).round().astype("<i2").tobytes()


def wire(name: str, rate: int) -> Wire:
    """`opus` or `pcm`."""
    return OggOpus(rate) if name == "opus" else Samples()
