"""Noise, rooms, lines: levels and bands."""

import numpy as np
import pytest

from mm.recipes.makers import acoustics
from mm.recipes.makers.acoustics import band, heard, late, noises, room
from mm.recipes.makers.voices import LEVEL, RATE

TIME = np.arange(2 * RATE) / RATE
TONE = LEVEL * np.sqrt(2) * np.sin(2 * np.pi * 1000 * TIME)


def power(wave):
    return float(np.square(wave).mean())


def test_noises_have_one_power_and_their_own_spectra():
    white, pink, hum, other, babble = noises([TONE.astype(np.float32)], np.random.default_rng(0))
    assert all(power(one) == pytest.approx(1, rel=1e-3) and len(one) == 60 * RATE
               for one in (white, pink, hum, other, babble))
    assert np.abs(np.fft.rfft(pink))[60 * 100:60 * 200].mean() > 5 * np.abs(np.fft.rfft(pink))[60 * 5000:].mean()
    assert np.argmax(np.abs(np.fft.rfft(hum))) == 60 * 50 and np.argmax(np.abs(np.fft.rfft(other))) == 60 * 60


def test_a_line_passes_its_band():
    assert power(band(TONE, *acoustics.LINE)) == pytest.approx(power(TONE), rel=0.02)
    for outside in (80, 8000):
        tone = np.sin(2 * np.pi * outside * TIME)
        assert power(band(tone, *acoustics.LINE)) < 2e-3 * power(tone)


def test_later_and_reflected():
    assert np.array_equal(late(np.arange(5), 2), [0, 0, 0, 1, 2])
    click = np.zeros(RATE)
    click[0] = 1
    out = room(click, np.random.default_rng(0))
    assert out[0] == 1 and np.count_nonzero(out) > 3
    assert not out[int(0.08 * RATE) + 1:].any() and np.abs(out[1:]).max() < 1


def test_what_is_heard_is_bounded_and_varies():
    noise = [np.random.default_rng(1).standard_normal(60 * RATE).astype(np.float32)]
    waves = [heard(TONE, np.zeros_like(TONE), noise, np.random.default_rng(seed)) for seed in range(40)]
    levels = 10 * np.log10([power(one) / LEVEL**2 for one in waves])
    assert all(one.dtype == np.float32 and np.abs(one).max() <= 1 for one in waves)
    assert -16 < levels.min() < -8 and -1 < levels.max() < 6
    silent = np.zeros_like(TONE)
    background = [10 * np.log10(max(power(heard(silent, silent, noise, np.random.default_rng(seed))) / LEVEL**2, 1e-9))
                  for seed in range(40)]
    assert max(background) < -10 + 3.1 and min(background) == -90
