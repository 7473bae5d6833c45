"""Sounds of any kind to the spectrogram that an audio encoder was trained on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.errors import InputError
from mm.spec.schema import require, spec

Sound = str | os.PathLike | IO[bytes] | np.ndarray | Tensor
HF_SILENT = {"feature_extractor_type", "feature_size", "padding_side", "padding_value", "return_attention_mask",
             "processor_class"}
SHORTEST = 400 / 16000  # seconds: one window of the filter bank
NAMES = {"rate": "sampling_rate", "bins": "num_mel_bins", "frames": "max_length", "mean": "mean", "std": "std",
         "normalise": "do_normalize"}
RATE, WINDOW, HOP = 16000, 400, 160  # Hz, samples, samples
FRAMES_PER_SECOND = RATE // HOP
BLOCK = 30000  # frames transformed at a time: 5 minutes, so that an hour needs no gigabytes
KINK, STEP = 15.0, 200 / 3  # Slaney's scale is linear up to 15 mel = 1000 Hz, then 27 mel per factor of 6.4
FIXED = {"feature_extractor_type": "WhisperFeatureExtractor", "sampling_rate": RATE, "hop_length": HOP, "n_fft": WINDOW,
         "padding_value": 0.0, "dither": 0.0}


def read_sound(source: Sound, rate: int) -> Tensor:
    """A sound -> (L,) float32 samples at `rate` Hz, the mean of its channels.

    source: whatever libsndfile reads, or samples (L,) or (L, C) that are at this rate already. Raises InputError that
    names the file for a sound that is empty, damaged or not finite.
    """
    name = str(getattr(source, "name", source)) if not isinstance(source, np.ndarray | Tensor) else "the sound"
    samples, own = (torch.as_tensor(source), rate) if isinstance(source, np.ndarray | Tensor) else decoded(source, name)
    if samples.ndim not in (1, 2) or not samples.is_floating_point():
        raise InputError(f"{name}: samples should be floating-point (L,) or (L, C), not {samples.dtype} "
                         f"{tuple(samples.shape)}")
    wave = (samples.mean(1) if samples.ndim == 2 else samples).float()
    if not len(wave) or not bool(torch.isfinite(wave).all()):
        raise InputError(f"{name}: the sound {'is empty' if not len(wave) else 'holds samples that are not finite'}")
    if own != rate:
        from torchaudio.functional import resample

        wave = resample(wave, own, rate)
    return wave


def decoded(source: str | os.PathLike | IO[bytes], name: str) -> tuple[Tensor, int]:
    import soundfile

    try:
        samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        raise InputError(f"{name}: the sound cannot be read ({error})") from None
    return torch.from_numpy(samples), rate


@spec
class Spectrogram:
    """A sound to (1, F, T): Kaldi's log-mel filter bank of `bins` mel bins, 10 ms apart, cut or padded with zeros to
    `frames`, normalised to half a standard deviation (Gong et al., 2021, AST). `rate` is in Hz."""

    rate: int = 16000
    bins: int = 128
    frames: int = 1024
    mean: float = -4.2677393
    std: float = 4.5689974
    normalise: bool = True

    def __post_init__(self) -> None:
        require(min(self.rate, self.bins, self.frames) > 0, "Spectrogram.rate, bins and frames must be positive")
        require(self.std > 0 and math.isfinite(self.mean), "Spectrogram.mean and std must be finite, std positive")

    def __call__(self, sound: Sound) -> Tensor:
        """One sound, whatever `read_sound` takes -> (1, F, T)."""
        from torchaudio.compliance.kaldi import fbank

        wave = read_sound(sound, self.rate)
        if len(wave) < SHORTEST * self.rate:
            raise InputError(f"a sound of {len(wave)} samples is shorter than one window of {SHORTEST * 1000:.0f} ms")
        bank = fbank(wave[None], sample_frequency=self.rate, window_type="hanning", num_mel_bins=self.bins)
        bank = F.pad(bank[: self.frames], (0, 0, 0, max(0, self.frames - len(bank))))
        return ((bank - self.mean) / (2 * self.std) if self.normalise else bank).T[None]

    def batch(self, sounds: Iterable[Sound]) -> Tensor:
        """Sounds -> (B, 1, F, T)."""
        rows = [self(sound) for sound in sounds]
        return torch.stack(rows) if rows else torch.empty(0, 1, self.bins, self.frames)

    @classmethod
    def from_files(cls, folder: str | Path, size: tuple[int, ...]) -> Self:
        """What a directory says, for spectrograms of `size` (bins, frames). Raises InputError for a broken file."""
        path = Path(folder) / "preprocessor_config.json"
        default = cls(bins=size[0], frames=size[1])
        if not path.is_file():
            return default
        try:
            given = json.loads(path.read_text("utf-8"))
            unknown = sorted(set(given) - HF_SILENT - set(NAMES.values()))
            require(not unknown, f"{unknown and unknown[0]!r} is not a setting of ASTFeatureExtractor")
            return cls(**asdict(default) | {ours: given[theirs] for ours, theirs in NAMES.items() if theirs in given})
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: {error}") from None

    def to_mm(self) -> dict[str, Any]:
        return asdict(self)

    def to_hf(self) -> dict[str, Any]:
        """The preprocessor_config.json of an ASTFeatureExtractor."""
        return {"feature_extractor_type": "ASTFeatureExtractor", "feature_size": 1, "padding_side": "right",
                "padding_value": 0.0, "return_attention_mask": False,
                **{theirs: getattr(self, ours) for ours, theirs in NAMES.items()}}


# ----------------------------------------------------------------------------- Whisper
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
