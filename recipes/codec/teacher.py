"""What a speech encoder hears in stored sounds, once and for all, a vector for each frame of a codec."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.checkpoint.files import read_json, replacing, write_json
from mm.checkpoint.pretrained import load
from mm.errors import InputError

from ...encoders.audio.hubert import Hubert
from ...encoders.audio.spectrogram import RATE, log_mel
from ...encoders.audio.whisper import Whisper
from ..common.progress import Bar
from .data import Store

SECONDS, MARGIN = 30, 2  # what Whisper hears at a time, of which so much at either end is only context
LEAST = 1e-4


class WhisperTeacher:
    """A Whisper's encoder over windows of 30 s."""

    def __init__(self, model: Whisper, name: str) -> None:
        self.encoder, self.device = model.encoder, model.decoder.embed.tokens.weight.device
        self.bins, self.width = model.spec.mels, model.spec.encoder.dim
        self.name = f"{name} {model.fingerprint()}"

    @torch.inference_mode()
    def __call__(self, wave: Tensor) -> Tensor:
        """(30 s of samples at 16 kHz,) -> (1500, D), 50 a second."""
        return self.encoder(log_mel(wave, self.bins)[None].to(self.device))[0].cpu()


class HubertTeacher:
    """A HuBERT over the same windows."""

    def __init__(self, model: Hubert, name: str) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.width, self.name = self.model.spec.stack.dim, f"{name} {self.model.fingerprint()}"

    @torch.inference_mode()
    def __call__(self, wave: Tensor) -> Tensor:
        """(30 s of samples at 16 kHz,) -> (1500, D), 50 a second, of which the last is there twice."""
        heard = self.model(wave[None].to(self.device))[0].cpu()
        return torch.cat([heard, heard[-1:]])


Teacher = WhisperTeacher | HubertTeacher


def teacher(name: str, device: torch.device) -> Teacher:
    """The teacher that a name means, by what its files say. Raises InputError."""
    model = load(name, torch.float32, device, kinds=("hubert", "whisper"))
    return {"hubert": HubertTeacher, "whisper": WhisperTeacher}[model.kind](model, name)


def lessons(teacher: Teacher, held: Store, to: Path) -> np.ndarray:
    """(frames, D) float16, each channel with mean 0 and deviation 1, written to a file unless it is there. Raises
    InputError when the file is another teacher's."""
    index, frames = to.with_suffix(".json"), int(held.starts[-1])
    if not index.exists():
        listen(teacher, held, to)
        write_json(index, {"teacher": teacher.name, "frames": frames, "width": teacher.width})
    known = read_json(index)
    if (known["teacher"], known["frames"]) != (teacher.name, frames):
        raise InputError(f"{to} is not what {teacher.name} hears in these sounds: remove it, or choose another --out")
    return np.memmap(to, np.float16, "r", shape=(frames, teacher.width))


def listen(teacher: Teacher, held: Store, to: Path) -> None:
    from torchaudio.functional import resample

    rate, frames = held.rate / held.frame, int(held.starts[-1])
    size, step = round(SECONDS * rate), round((SECONDS - 2 * MARGIN) * rate)
    before = (size - step) // 2
    with replacing(to) as part, Bar("hearing sounds", -(-frames // step)) as bar:
        out = np.memmap(part, np.float16, "w+", shape=(frames, teacher.width))
        for first in range(0, frames, step):
            at = max(0, first - before)
            wave = resample(held.read(at * held.frame, size * held.frame), held.rate, RATE)
            heard = pooled(teacher(F.pad(wave, (0, SECONDS * RATE - len(wave)))[: SECONDS * RATE]), size)
            stop = min(first + step, frames)
            out[first:stop] = heard[first - at : stop - at].numpy()
            bar.step()
        standardise(out)
        out.flush()


def pooled(x: Tensor, frames: int) -> Tensor:
    """(T, D) -> (frames, D), each the mean of twice as much time as a frame lasts."""
    stride = len(x) / frames
    if stride != int(stride):
        return F.adaptive_avg_pool1d(x.T[None], frames)[0].T
    stride = int(stride)
    return F.avg_pool1d(x.T[None], 2 * stride, stride, padding=stride // 2, count_include_pad=False)[0].T[:frames]


def standardise(x: np.ndarray, block: int = 1 << 14) -> None:
    total = square = 0.0
    for start in range(0, len(x), block):
        part = x[start : start + block].astype(np.float64)
        total, square = total + part.sum(0), square + np.square(part).sum(0)
    mean = total / len(x)
    deviation = np.sqrt(np.maximum(square / len(x) - mean**2, LEAST**2))
    for start in range(0, len(x), block):
        x[start : start + block] = (x[start : start + block] - mean) / deviation
