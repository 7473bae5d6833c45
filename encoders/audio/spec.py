"""Whisper and HuBERT as data."""

from __future__ import annotations

from typing import Literal

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


@spec
class Samples:
    """What a model reads: samples at `rate` Hz, where `normalise` says so with mean 0 and variance 1."""

    rate: int = 16000
    normalise: bool = True


@spec
class HubertSpec:
    """Samples -> convolutions without padding (`channels`, `kernels`, `strides`) -> `stack`. `conv_norm`: of every
    channel over time after the first convolution, or of every step after each. `near`: steps that the convolution in
    `groups` which tells positions sees. `entry_norm`: a norm before the first layer."""

    channels: tuple[int, ...] = (512,) * 7
    kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    conv_norm: Literal["group", "layer"] = "group"
    project_norm: bool = True
    near: int = 128
    groups: int = 16
    entry_norm: bool = True
    stack: Stack

    def __post_init__(self) -> None:
        require(bool(self.channels) and len(self.channels) == len(self.kernels) == len(self.strides),
                "HubertSpec.channels, kernels and strides should be equally many, and at least one")
        require(min(*self.channels, *self.kernels, *self.strides, self.near, self.groups) > 0,
                "HubertSpec needs positive sizes")
        require(self.stack.dim % self.groups == 0, f"{self.groups} groups do not divide a width of {self.stack.dim}")

    @property
    def shortest(self) -> int:
        """Samples that one vector takes."""
        length = 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            length = (length - 1) * stride + kernel
        return length
