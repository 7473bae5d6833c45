"""Sounds of any kind to the spectrogram that an audio encoder was trained on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
from torch import Tensor

from mm.errors import InputError
from mm.spec.schema import require, spec

Sound = str | os.PathLike | IO[bytes] | np.ndarray | Tensor
HF_SILENT = {"feature_extractor_type", "feature_size", "padding_side", "padding_value", "return_attention_mask",
             "processor_class"}
SHORTEST = 400 / 16000  # seconds: one window of the filter bank


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
        bank = torch.nn.functional.pad(bank[: self.frames], (0, 0, 0, max(0, self.frames - len(bank))))
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


NAMES = {"rate": "sampling_rate", "bins": "num_mel_bins", "frames": "max_length", "mean": "mean", "std": "std",
         "normalise": "do_normalize"}
