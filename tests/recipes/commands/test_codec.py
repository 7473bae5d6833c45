"""`mm codec`, as a user runs it."""

import subprocess
import sys
from pathlib import Path

import codec
import numpy as np
import pytest
import soundfile
import torch

from mm.codecs.file import Reader
from mm.recipes.cli import main
from mm.recipes.weights import codec_small

CLIP = Path(__file__).parents[2] / "encoders/audio/clips/ljspeech/wavs/LJ001-0011.flac"


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A folder with a small model in two layouts and a stereo sound of 1.3 s at 44.1 kHz."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = codec.small(codec.SPEC)
    model.save_pretrained("model")
    model.save_pretrained("hf", "hf")
    t = np.arange(57000) / 44100
    soundfile.write("talk.flac", 0.4 * np.sin(np.stack([900 * t, 1300 * t], 1)), 44100)
    return model


def test_encode_and_decode(room, capsys):
    assert main(["codec", "encode", "talk.flac", "talk.mimi", "--model", "model"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("talk.mimi: 1.3 s of sound in ") and "0.60 kbit/s" in said and "real-time factor" in said
    assert main(["codec", "decode", "talk.mimi", "out.wav", "--model", "hf"]) == 0
    wave, rate = soundfile.read("out.wav", dtype="float32")
    assert (rate, len(wave)) == (24000, -(-57000 * 24000 // 44100))
    from mm.codecs.sound import open_sound

    sound = torch.cat(list(open_sound("talk.flac").blocks(24000, 1)), 1)
    codes = torch.cat(list(Reader("talk.mimi").blocks(7)), 1)
    assert torch.equal(codes, room.encode(sound[None])[0])
    wanted = room.decode(codes[None])[0, 0, : len(wave)].clamp(-1, 1)
    assert (torch.from_numpy(wave) - wanted).abs().max() < 1e-4


def test_fewer_codebooks_and_8_bits(room, capsys):
    main(["codec", "encode", "talk.flac", "few.mimi", "--model", "model", "--codebooks", "4", "--int8"])
    assert Reader("few.mimi").header.codebooks == 4 and "0.30 kbit/s" in capsys.readouterr().out
    assert main(["codec", "decode", "few.mimi", "out.flac", "--model", "model", "--int8"]) == 0


@pytest.mark.parametrize("name", ["talk.mimi", "talk.flac"])
def test_play_through_the_stream(room, capfdbinary, name):
    main(["codec", "encode", "talk.flac", "talk.mimi", "--model", "model"])
    capfdbinary.readouterr()
    assert main(["codec", "play", name, "--model", "model", "--stdout"]) == 0
    samples = torch.frombuffer(bytearray(capfdbinary.readouterr().out), dtype=torch.int16)
    codes = torch.cat(list(Reader("talk.mimi").blocks(7)), 1)
    wanted = room.decode(codes[None])[0, 0].clamp(-1, 1) * 32767
    assert len(samples) == 17 * 1920 and (samples - wanted).abs().max() < 1.5


@pytest.mark.parametrize("command, message", [
    ("encode no.wav a.mimi --model model", "no.wav: the sound cannot be read"),
    ("encode talk.flac a.mimi --model nowhere/at/all", "nowhere/at/all is not a directory"),
    ("encode talk.flac a.mimi --model model --codebooks 9", "--codebooks 9: the model has 8"),
    ("encode talk.flac no/a.mimi --model model", "no/"),
    ("decode talk.flac a.wav --model model", "talk.flac is not a .mimi file"),
    ("decode talk.mimi a.xyz --model model", "a.xyz: .xyz is not a sound format"),
    ("decode talk.mimi a.wav --model other", "talk.mimi was written by another model"),
    ("play talk.mimi --model other --stdout", "talk.mimi was written by another model"),
])
def test_mistakes_are_one_sentence_and_write_nothing(room, capsys, tmp_path, command, message):
    main(["codec", "encode", "talk.flac", "talk.mimi", "--model", "model"])
    torch.manual_seed(1)
    codec.small(codec.SPEC).save_pretrained("other")
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert main(["codec", *command.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("mm: ") and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_sound_that_breaks_off_leaves_no_file(room, tmp_path):
    wave = np.zeros(400_000, np.float32)
    wave[-5] = np.nan
    soundfile.write("bad.wav", wave, 24000, subtype="FLOAT")
    assert main(["codec", "encode", "bad.wav", "bad.mimi", "--model", "model"]) == 2
    assert not [path for path in tmp_path.iterdir() if "mimi" in path.name]


@pytest.mark.full
def test_an_hour_takes_no_more_memory_than_a_minute(room, tmp_path):
    codec.small(codec.TINY).save_pretrained("tiny")
    script = ("import sys, resource\nfrom mm.recipes.cli import main\nassert main(sys.argv[1:]) == 0\n"
              "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)")
    peaks = []
    for seconds in (60, 3600):
        soundfile.write("long.wav", np.random.default_rng(0).normal(size=1600 * seconds) / 9, 1600)
        runs = (["encode", "long.wav", "long.mimi"], ["decode", "long.mimi", "long.out.wav"])
        found = [subprocess.run([sys.executable, "-c", script, "codec", *run, "--model", "tiny"], check=True,
                                capture_output=True, text=True).stderr for run in runs]
        peaks.append([int(text.split()[-1]) for text in found])
    assert all(long < 1.1 * short for short, long in zip(*peaks, strict=True)), peaks


def test_help_names_the_three(capsys):
    assert main(["codec", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("encode", "decode", "play"))


def test_the_codec_that_ships_is_the_default_and_carries_speech(tmp_path, monkeypatch, capsys):
    from mm.encoders.audio.spectrogram import read_sound
    from mm.recipes.codec.loss import MelDistance

    monkeypatch.chdir(tmp_path)
    assert main(["codec", "encode", str(CLIP), "talk.mimi"]) == 0 and "1.00 kbit/s" in capsys.readouterr().out
    assert main(["codec", "decode", "talk.mimi", "out.wav"]) == 0
    original, wave = (read_sound(path, 24000)[None, None] for path in (CLIP, "out.wav"))
    assert wave.shape == original.shape
    distance = MelDistance(24000)
    assert distance(wave, original) < 0.5 * distance(0.1 * torch.randn_like(wave), original)
    loud = [part.unfold(-1, 4800, 4800).square().mean(-1).flatten() for part in (wave, original)]
    assert torch.corrcoef(torch.stack(loud))[0, 1] > 0.9
    assert sum(path.stat().st_size for path in codec_small().iterdir()) < 16e6
