"""Whisper's log-mel spectrogram (Radford et al., 2022): 25 ms windows, 10 ms apart, Slaney's mel scale."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.errors import InputError
from mm.spec.schema import require, spec

from .spectrogram import Sound, read_sound

RATE, WINDOW, HOP = 16000, 400, 160  # Hz, samples, samples
FRAMES_PER_SECOND = RATE // HOP
BLOCK = 30000  # frames transformed at a time: 5 minutes, so that an hour needs no gigabytes
KINK, STEP = 15.0, 200 / 3  # Slaney's scale is linear up to 15 mel = 1000 Hz, then 27 mel per factor of 6.4
FIXED = {"feature_extractor_type": "WhisperFeatureExtractor", "sampling_rate": RATE, "hop_length": HOP, "n_fft": WINDOW,
         "padding_value": 0.0, "dither": 0.0}


@spec
class LogMel:
    """A sound to (bins, F): `seconds` of it, cut or padded with silence, 100 frames a second."""

    bins: int = 80
    seconds: int = 30

    def __post_init__(self) -> None:
        require(min(self.bins, self.seconds) > 0, "LogMel.bins and seconds must be positive")

    def __call__(self, sound: Sound) -> Tensor:
        wave = read_sound(sound, RATE)[: self.seconds * RATE]
        return log_mel(F.pad(wave, (0, self.seconds * RATE - len(wave))), self.bins)[:, : self.seconds * RATE // HOP]

    @classmethod
    def from_files(cls, folder: str | Path, bins: int) -> Self:
        """What preprocessor_config.json says. Raises InputError for a setting that is not Whisper's."""
        path = Path(folder) / "preprocessor_config.json"
        if not path.is_file():
            return cls(bins=bins)
        try:
            given = json.loads(path.read_text("utf-8"))
            for name, value in FIXED.items():
                require(given.get(name, value) == value, f"{name} should be {value}, not {given.get(name)!r}")
            return cls(bins=given.get("feature_size", bins), seconds=given.get("chunk_length", 30))
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The preprocessor_config.json of a WhisperFeatureExtractor."""
        return {**FIXED, "feature_size": self.bins, "chunk_length": self.seconds, "n_samples": self.seconds * RATE,
                "nb_max_frames": self.seconds * RATE // HOP, "padding_side": "right", "return_attention_mask": False}


def log_mel(wave: Tensor, bins: int) -> Tensor:
    """(L,) samples at 16 kHz, at least 201 -> (bins, L // 160): log10 of the power, within 8 of the loudest, scaled."""
    frames, wave = len(wave) // HOP, F.pad(wave[None], (WINDOW // 2, WINDOW // 2), mode="reflect")[0]
    mel = torch.empty(bins, frames)
    for start in range(0, frames, BLOCK):
        stop = min(start + BLOCK, frames)
        piece = wave[start * HOP : (stop - 1) * HOP + WINDOW]
        stft = torch.stft(piece, WINDOW, HOP, window=torch.hann_window(WINDOW), center=False, return_complex=True)
        mel[:, start:stop] = (filters(bins) @ (stft.real.square() + stft.imag.square())).clamp(min=1e-10).log10()
    return (torch.maximum(mel, mel.amax() - 8.0) + 4.0) / 4.0


def open_ended(wave: Tensor, bins: int) -> Tensor:
    """`log_mel` of a sound that silence follows: (bins, F), its L // 160 frames, then some of silence."""
    return log_mel(F.pad(wave, (0, WINDOW + 2 * HOP)), bins)


@lru_cache
def filters(bins: int) -> Tensor:
    """(bins, 201) triangles of area 1 over 0 to 8000 Hz, evenly spaced in mel (Slaney, 1998)."""
    bands = torch.arange(WINDOW // 2 + 1, dtype=torch.float64) * RATE / WINDOW
    log_step = torch.tensor(6.4, dtype=torch.float64).log() / 27
    top = KINK + torch.tensor(RATE / 2 / (KINK * STEP), dtype=torch.float64).log() / log_step
    mels = torch.linspace(0, float(top), bins + 2, dtype=torch.float64)
    edges = torch.where(mels < KINK, mels * STEP, KINK * STEP * (log_step * (mels - KINK)).exp())
    low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = torch.minimum((bands - low) / (mid - low), (high - bands) / (high - mid)).clamp(min=0)
    return (triangles * 2 / (high - low)).float()
