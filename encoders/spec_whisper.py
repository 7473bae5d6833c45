"""Whisper as data (Radford et al., 2022)."""

from __future__ import annotations

from mm.schema import require, spec
from mm.spec import DecoderSpec, Stack


@spec
class WhisperSpec:
    """`mels` bins x 2 `frames` of spectrogram -> `frames` vectors of the encoder -> the decoder's words."""

    mels: int
    frames: int
    encoder: Stack
    decoder: DecoderSpec

    def __post_init__(self) -> None:
        require(min(self.mels, self.frames) > 0, "WhisperSpec.mels and frames must be positive")
        reads = self.decoder.stack.memory_dim or self.decoder.stack.dim
        require(reads == self.encoder.dim, f"the decoder reads {reads} channels, the encoder makes {self.encoder.dim}")
        crossed = all(layer.cross is not None for layer in self.decoder.stack.layers)
        require(crossed, "every layer of Whisper's decoder has cross-attention")
        require(self.decoder.embed.positions is not None, "Whisper's decoder has learned positions")
