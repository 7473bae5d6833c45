"""Whisper: a spectrogram to text (Radford et al., 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.checkpoint import pretrained
from mm.errors import InputError
from mm.nn.transformer import Transformer
from mm.positions.absolute import sinusoid
from mm.spec import Stack
from mm.text.decoder import TextDecoder

from .families.whisper import FAMILIES
from .spec import WhisperSpec


class Whisper(pretrained.Pretrained):
    """spectrogram (B, mels, 2 S), ids (B, T) -> logits (B, T, V). What `encoder` hears, (B, S, D), is the memory of
    `decoder`."""

    kind, families = "whisper", FAMILIES

    def __init__(self, settings: WhisperSpec):
        super().__init__()
        self.spec = settings
        self.encoder = AudioEncoder(settings.mels, settings.frames, settings.encoder)
        self.decoder = TextDecoder(settings.decoder)

    def forward(self, mel: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: (B, T) bool, False for padding on either side. Raises InputError on wrong shapes."""
        return self.decoder(ids, mask=mask, memory=self.encoder(mel))


class AudioEncoder(nn.Module):
    """(B, mels, 2 S) -> (B, S, D): two convolutions, the second of stride 2, sinusoids and a stack."""

    def __init__(self, mels: int, frames: int, stack: Stack):
        super().__init__()
        self.mels = mels
        self.conv1 = nn.Conv1d(mels, stack.dim, 3, padding=1)
        self.conv2 = nn.Conv1d(stack.dim, stack.dim, 3, stride=2, padding=1)
        self.register_buffer("positions", sinusoid(torch.arange(frames), stack.dim, last=True))
        self.stack = Transformer(stack)

    def forward(self, mel: Tensor) -> Tensor:
        """Raises InputError for another shape: Whisper hears windows of one length."""
        wanted = (self.mels, 2 * len(self.positions))
        if mel.ndim != 3 or tuple(mel.shape[1:]) != wanted:
            raise InputError(f"spectrograms should be (B, {wanted[0]}, {wanted[1]}), not {tuple(mel.shape)}")
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)
        return self.stack(x + self.positions)
