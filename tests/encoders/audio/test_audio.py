"""Spectrograms equal to transformers' AST features, from any file; what is no sound is refused in a sentence."""

import io

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import close, redraw

from mm.encoders import ViT
from mm.encoders.audio.spectrogram import Spectrogram, read_sound
from mm.errors import InputError
from mm.spec.schema import from_json, to_json

RATE = 16000


def tone(seconds=1.0, rate=RATE, channels=1):
    t = torch.arange(int(seconds * rate)) / rate
    waves = [0.3 * torch.sin(2 * torch.pi * (300 + 200 * c) * t) + 0.01 * torch.randn(len(t)) for c in range(channels)]
    return torch.stack(waves, 1)


@pytest.fixture(scope="module")
def extractor():
    return pytest.importorskip("transformers").ASTFeatureExtractor


@pytest.mark.parametrize("settings", [{}, {"num_mel_bins": 64, "max_length": 50, "mean": -3.0, "std": 2.0},
                                      {"do_normalize": False, "max_length": 130}])
def test_equals_the_reference(settings, extractor, tmp_path):
    reference = extractor(**settings)
    reference.save_pretrained(tmp_path)
    ours = Spectrogram.from_files(tmp_path, (128, 1024))
    wave = tone()[:, 0].numpy()
    expected = reference(wave, sampling_rate=RATE, return_tensors="pt").input_values[0].T
    close(ours(wave)[0], expected)
    (tmp_path / "preprocessor_config.json").unlink()
    assert extractor.from_dict(ours.to_hf()).to_dict() == reference.to_dict()


@pytest.mark.parametrize("ending, subtype", [("wav", "PCM_16"), ("wav", "PCM_U8"), ("wav", "PCM_24"), ("wav", "FLOAT"),
                                             ("flac", "PCM_16"), ("ogg", "VORBIS")])
def test_files_of_any_kind(ending, subtype, tmp_path):
    path, wave = tmp_path / f"a.{ending}", tone(channels=2)
    soundfile.write(path, wave.numpy(), RATE, subtype=subtype)
    tolerance = {"PCM_U8": 2e-2, "VORBIS": 0.1}.get(subtype, 1e-4)
    close(read_sound(path, RATE), wave.mean(1), tolerance)
    with open(path, "rb") as file:
        close(read_sound(file, RATE), wave.mean(1), tolerance)


@given(rate=st.sampled_from([8000, 22050, 44100, 48000, 192000]))
def test_other_rates_are_resampled(rate):
    file = io.BytesIO()
    soundfile.write(file, tone(0.5, rate).numpy(), rate, format="WAV")
    file.seek(0)
    wave = read_sound(file, RATE)
    assert abs(len(wave) - RATE // 2) <= 1 and 0.15 < wave[100:-100].std() < 0.3


@pytest.mark.parametrize(("sound", "sentence"), [
    (np.zeros(0, np.float32), "is empty"), (np.zeros(399, np.float32), "shorter than one window"),
    (np.full(1000, np.nan, np.float32), "not finite"), (np.zeros((2, 3, 4), np.float32), "samples should be"),
    (np.zeros(1000, np.int16), "samples should be floating-point"), ("/nowhere.wav", "/nowhere.wav: the sound cannot")])
def test_what_is_no_sound(sound, sentence):
    with pytest.raises(InputError, match=sentence):
        Spectrogram()(sound)


def test_a_truncated_file(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, tone().numpy(), RATE)
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(InputError, match="a.flac"):
        read_sound(path, RATE)


def test_settings_go_through_json():
    settings = Spectrogram(bins=64, frames=100)
    assert from_json(to_json(settings)) == settings
    with pytest.raises(InputError, match="std positive"):
        Spectrogram(std=0.0)


def test_an_audio_model_reads_sounds(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ASTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                                    max_length=64, num_mel_bins=32, num_labels=3)
    model = redraw(transformers.ASTForAudioClassification(config))
    model.save_pretrained(tmp_path / "hf")
    reference = transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=64)
    reference.save_pretrained(tmp_path / "hf")
    ours = ViT.from_pretrained(tmp_path / "hf")
    sounds = [tone(0.3)[:, 0].numpy(), tone(0.9)[:, 0].numpy()]
    with torch.no_grad():
        expected = model(**reference(sounds, sampling_rate=RATE, return_tensors="pt")).logits
        close(ours.encode(ours.preprocess(sounds)), expected)
        ours.save_pretrained(tmp_path / "mm")
        again = ViT.from_pretrained(tmp_path / "mm")
        assert again.preprocessing == ours.preprocessing
        close(again.encode(again.preprocess(sounds)), expected)
        ours.save_pretrained(tmp_path / "back", layout="hf")
        assert ViT.from_pretrained(tmp_path / "back").preprocessing == ours.preprocessing
