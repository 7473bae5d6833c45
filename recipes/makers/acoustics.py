"""What lies between a mouth and a microphone: a room, noise, a narrow line, the loudness of the whole."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .voices import LEVEL, RATE

SECONDS = 60  # of each noise, of which pieces are taken
VOICES = 6  # that babble at the same time
ECHO = 10 ** (-30 / 20)  # of the model's own voice
SNR = (10.0, 40.0)  # dB
GAIN = (-12.0, 3.0)  # dB
LINE = (300.0, 3400.0)  # Hz, of a telephone
DULL = (2000.0, 8000.0)  # Hz, above which some microphones hear little
REFLECTIONS = 8


def noises(speech: Sequence[np.ndarray], random: np.random.Generator) -> list[np.ndarray]:
    """White, pink, the hum of mains of 50 and 60 Hz, and the babble of some speech: (n,) float32 each, of power 1."""
    size = SECONDS * RATE
    spectrum = np.fft.rfft(random.standard_normal(size))
    pink = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 20 * SECONDS)), size)
    time = np.arange(size) / RATE
    hums = [sum(np.sin(2 * np.pi * (mains * k * time + random.random())) / k for k in (1, 2, 3, 5, 7))
            for mains in (50, 60)]
    babble = sum(stream(speech, size, random) for _ in range(VOICES))
    return [(one / np.sqrt(np.square(one).mean())).astype(np.float32)
            for one in (random.standard_normal(size), pink, *hums, babble)]


def stream(speech: Sequence[np.ndarray], size: int, random: np.random.Generator) -> np.ndarray:
    """One after the other, as they come."""
    parts, length = [], 0
    while length < size:
        parts.append(speech[random.integers(len(speech))])
        length += len(parts[-1])
    return np.concatenate(parts)[:size].astype(np.float64)


def heard(wave: np.ndarray, own: np.ndarray, noise: Sequence[np.ndarray], random: np.random.Generator) -> np.ndarray:
    """(n,) float32, as a microphone hears the speech `wave` while a loudspeaker plays `own`; each thing at times."""
    if random.random() < 0.25:
        wave = room(wave, random)
    if random.random() < 0.1:
        wave = wave + ECHO * late(own, int(random.uniform(0.03, 0.2) * RATE))
    if random.random() < 0.8:
        wave = wave + noisy(noise[random.integers(len(noise))], len(wave), random)
    kind = random.random()
    if kind < 0.15:
        wave = band(wave, *LINE)
    elif kind < 0.35:
        wave = band(wave, 20.0, random.uniform(*DULL))
    gain = 10 ** (random.uniform(*GAIN) / 20)
    return np.clip(wave * gain, -1, 1).astype(np.float32)


def noisy(noise: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    start = random.integers(len(noise) - size)
    return LEVEL * 10 ** (-random.uniform(*SNR) / 20) * noise[start:start + size]


def late(wave: np.ndarray, samples: int) -> np.ndarray:
    return np.concatenate([np.zeros(samples, wave.dtype), wave[:len(wave) - samples]])


def room(wave: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The first reflections, up to 80 ms late, weaker the later."""
    out = wave.copy()
    for delay in random.uniform(0.003, 0.08, REFLECTIONS):
        out += random.uniform(-0.5, 0.5) * np.exp(-delay / 0.04) * late(wave, int(delay * RATE))
    return out


def band(wave: np.ndarray, low: float, high: float) -> np.ndarray:
    """What lies between two frequencies, with slopes of 24 dB an octave."""
    spectrum = np.fft.rfft(wave)
    f = np.arange(len(spectrum), dtype=np.float32) * (RATE / len(wave))
    gain = 1 / np.sqrt((1 + (low / np.maximum(f, 1)) ** 8) * (1 + (f / high) ** 8))
    return np.fft.irfft(spectrum * gain, len(wave))
