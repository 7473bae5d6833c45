"""Whisper as data (Radford et al., 2022)."""

from __future__ import annotations

from mm.spec import DecoderSpec, Stack, check_memory
from mm.spec.schema import require, spec


@spec
class WhisperSpec:
    """`mels` bins x 2 `frames` of spectrogram -> `frames` vectors of the encoder -> the decoder's words."""

    mels: int
    frames: int
    encoder: Stack
    decoder: DecoderSpec

    def __post_init__(self) -> None:
        require(min(self.mels, self.frames) > 0, "WhisperSpec.mels and frames must be positive")
        check_memory(self.decoder, self.encoder.dim)
        require(self.decoder.embed.positions is not None, "Whisper's decoder has learned positions")
