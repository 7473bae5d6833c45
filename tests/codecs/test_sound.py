"""Sound files in blocks: rates, formats, channels, and files that are damaged."""

import io

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import close
from torchaudio.functional import resample

from mm.codecs.sound import Resampler, open_sound
from mm.errors import InputError

RATES = [(44100, 24000), (16000, 24000), (192000, 24000), (24000, 24000), (8000, 24000), (22050, 16000), (11025, 24000)]


@settings(max_examples=20)
@given(st.sampled_from(RATES), st.lists(st.integers(1, 3000), min_size=1, max_size=6))
def test_blocks_resample_as_the_whole(rates, sizes):
    wave, resampler = torch.randn(2, sum(sizes)), Resampler(*rates, 2)
    out = torch.cat([*(resampler.push(block) for block in wave.split(sizes, 1)), resampler.flush()], 1)
    close(out, resample(wave, *rates))


def tone(samples=5000, channels=1):
    t = np.arange(samples)[:, None] / 44100
    return 0.5 * np.sin(2 * np.pi * (220 + 110 * np.arange(channels)) * t)


def read(path, rate=24000):
    return torch.cat(list(open_sound(path).blocks(rate, 1)), 1)


@pytest.mark.parametrize("name, subtype, rate, channels, off", [
    ("a.wav", "PCM_U8", 44100, 1, 1e-2), ("a.wav", "PCM_16", 44100, 2, 1e-4), ("a.wav", "PCM_24", 192000, 1, 1e-6),
    ("a.wav", "FLOAT", 44100, 8, 1e-6), ("a.flac", "PCM_24", 8000, 1, 1e-6), ("a.ogg", "VORBIS", 44100, 1, 0.1),
    ("a.aiff", "PCM_16", 48000, 1, 1e-4)])
def test_formats_rates_and_channels(tmp_path, name, subtype, rate, channels, off):
    wave = tone(channels=channels)
    soundfile.write(tmp_path / name, wave, rate, subtype=subtype)
    wanted = resample(torch.from_numpy(wave.mean(1)).float(), rate, 24000)
    assert (read(tmp_path / name)[0] - wanted).abs().max() < off


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_the_shortest_sounds(tmp_path, samples):
    soundfile.write(tmp_path / "a.wav", tone(samples), 44100)
    assert read(tmp_path / "a.wav").shape == (1, -(-samples * 24000 // 44100))


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
def test_truncated_files(tmp_path, name):
    soundfile.write(tmp_path / name, tone(100_000), 44100)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(InputError, match=f"{name}.*(truncated|damaged|cannot be read)"):
        read(tmp_path / name)


def test_a_wav_written_to_a_pipe_has_no_length(tmp_path):
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(), 44100, format="WAV", subtype="PCM_16")
    content = bytearray(buffer.getvalue())
    at = content.index(b"data") + 4
    content[at : at + 4] = b"\xff" * 4
    (tmp_path / "a.wav").write_bytes(content)
    assert read(tmp_path / "a.wav").shape[1] > 2000


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite(tmp_path, value):
    wave = tone().astype(np.float32)
    wave[4000] = value
    soundfile.write(tmp_path / "a.wav", wave, 44100, subtype="FLOAT")
    with pytest.raises(InputError, match="a.wav: the sound holds samples that are not finite"):
        read(tmp_path / "a.wav")


def test_no_sounds(tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 1)), 44100)
    (tmp_path / "text.wav").write_text("hello")
    for name, reason in (("empty.wav", "the sound is empty"), ("text.wav", "cannot be read"), ("no.wav", "cannot be")):
        with pytest.raises(InputError, match=f"{name}: .*{reason}"):
            open_sound(tmp_path / name)


def test_a_model_of_two_channels_needs_two(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(), 44100)
    with pytest.raises(InputError, match="has 1 channels, the model 2"):
        next(open_sound(tmp_path / "a.wav").blocks(24000, 2))
