"""Whisper: a spectrogram to text (Radford et al., 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm import pretrained
from mm.embed import Embedding, LMHead
from mm.errors import InputError
from mm.memory import Memory
from mm.positions import sinusoid
from mm.spec import Stack
from mm.state import StackState
from mm.transformer import Transformer
from mm.visibility import At, along, padded

from .families.whisper import FAMILIES
from .spec_whisper import WhisperSpec


class Whisper(pretrained.Pretrained):
    """spectrogram (B, mels, 2 S), ids (B, T) -> logits (B, T, V)."""

    kind, families = "whisper", FAMILIES

    def __init__(self, settings: WhisperSpec):
        super().__init__()
        self.spec = settings
        text = settings.decoder
        self.encoder = AudioEncoder(settings.mels, settings.frames, settings.encoder)
        self.embed = Embedding(text.stack.dim, text.embed)
        self.stack = Transformer(text.stack)
        self.head = LMHead(text.stack.dim, text.embed.vocab, text.head)

    def forward(self, mel: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: (B, T) bool, False for padding on either side. Raises InputError on wrong shapes."""
        return self.logits(self.hidden(ids, self.encoder(mel), mask=mask))

    def hidden(self, ids: Tensor, memory: Tensor | Memory, *, mask: Tensor | None = None,
               state: StackState | None = None) -> Tensor:
        """ids (B, T) and what the encoder heard -> (B, T, D). memory: (B, S, D) or `remember` of it, once for many
        steps. Raises InputError for more tokens than positions."""
        if ids.ndim != 2 or ids.is_floating_point():
            raise InputError(f"ids should be integers (B, T), not {ids.dtype} {tuple(ids.shape)}")
        if ids.shape[1] > self.spec.decoder.context:
            raise InputError(f"{ids.shape[1]} tokens are more than the context of {self.spec.decoder.context}")
        at = self.where(ids, mask, state)
        return self.stack(self.embed(ids, at), at, state=state, memory=memory)

    def where(self, ids: Tensor, mask: Tensor | None, state: StackState | None) -> At:
        at = along(*ids.shape, device=ids.device) if mask is None else padded(mask)
        if state is None:
            return at
        return At(torch.where(at.position < 0, at.position, state.offset[:, None] + at.position))

    def remember(self, heard: Tensor) -> Memory:
        """(B, S, D) of the encoder -> keys and values of every layer's cross-attention."""
        return self.stack.remember(heard)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden, self.embed.tokens.weight)

    def init_state(self, batch: int, length: int | None = None) -> StackState:
        """An empty text for `batch` rows of up to `length` tokens (default: the context)."""
        return self.stack.init_state(batch, length=length or self.spec.decoder.context)


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
