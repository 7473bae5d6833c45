"""`mm codec` on sounds of every kind and on damaged files: it works, or says one sentence and writes nothing."""

import json

import codec
import numpy as np
import pytest
import soundfile
import torch

from mm.codecs.file import Reader
from mm.recipes.cli import main

RATE = 24000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model, a second of sound, and its codes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("codec")
    codec.small(codec.SPEC).save_pretrained(folder / "model")
    soundfile.write(folder / "talk.wav", tone(), RATE)
    assert main(["codec", "encode", str(folder / "talk.wav"), str(folder / "talk.mimi"),
                 "--model", str(folder / "model")]) == 0
    return folder


@pytest.fixture
def room(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("talk.wav", "talk.mimi"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "model").symlink_to(folder / "model")
    capsys.readouterr()
    return tmp_path


def tone(samples=RATE, channels=1, rate=RATE):
    t = np.arange(samples)[:, None] / rate
    return 0.4 * np.sin(2 * np.pi * (200 + 90 * np.arange(channels)) * t)


def refused(room, capsys, command, *parts):
    """One sentence on stderr with all parts, status 2, and no file more or less than before."""
    before = {path: path.stat().st_size for path in room.iterdir()}
    assert main(["codec", *command.split(), "--model", "model"]) == 2
    said = capsys.readouterr().err
    sentences = [line for line in said.split("\n") if line.startswith("mm: ")]
    assert len(sentences) == 1 and all(part in sentences[0] for part in parts) and "Traceback" not in said
    assert {path: path.stat().st_size for path in room.iterdir()} == before


@pytest.mark.parametrize("name, subtype, rate, channels, samples", [
    ("a.wav", "PCM_U8", 8000, 1, 4000), ("a.wav", "PCM_24", 44100, 2, 9000), ("a.wav", "FLOAT", 192000, 1, 40000),
    ("a.wav", "DOUBLE", 24000, 8, 5000), ("a.flac", "PCM_24", 96000, 8, 20000), ("a.ogg", "VORBIS", 48000, 2, 9000),
    ("a.wav", "PCM_16", 24000, 1, 1), ("a.wav", "PCM_16", 192000, 8, 1), ("a.mp3", None, 16000, 1, 9000)])
def test_sounds_of_every_kind(room, name, subtype, rate, channels, samples):
    soundfile.write(room / name, tone(samples, channels, rate), rate, subtype=subtype)
    length = -(-soundfile.info(room / name).frames * RATE // rate)
    assert main(["codec", "encode", name, "a.mimi", "--model", "model", "--codebooks", "4"]) == 0
    header = Reader("a.mimi").header
    assert (header.samples, header.codebooks, header.frames) == (length, 4, -(-length // 1920))
    assert main(["codec", "decode", "a.mimi", "b.wav", "--model", "model"]) == 0
    assert soundfile.info("b.wav").frames == length


@pytest.mark.parametrize("command", ["encode bad.wav a.mimi", "play bad.wav --stdout"])
@pytest.mark.parametrize("spoil, said", [
    (lambda wave: wave[:0], "the sound is empty"), (lambda wave: np.where(wave > 0.39, np.nan, wave), "not finite"),
    (lambda wave: np.where(wave > 0.39, -np.inf, wave), "not finite")])
def test_sounds_without_sense(room, capsys, command, spoil, said):
    soundfile.write("bad.wav", spoil(tone()).astype(np.float32), RATE, subtype="FLOAT")
    refused(room, capsys, command, "bad.wav", said)


@pytest.mark.parametrize("name", ["cut.wav", "cut.flac", "cut.ogg"])
@pytest.mark.parametrize("share", [0.001, 0.4, 0.97])
def test_truncated_sounds(room, capsys, name, share):
    soundfile.write(name, np.random.default_rng(0).normal(size=(90000, 1)) / 9, RATE)
    content = (room / name).read_bytes()
    (room / name).write_bytes(content[: int(len(content) * share)])
    refused(room, capsys, f"encode {name} a.mimi", name)


def header(content: bytes, **fields) -> bytes:
    """The same file with these fields of its header."""
    length = int.from_bytes(content[5:9], "little")
    text = json.dumps(json.loads(content[9 : 9 + length]) | fields).encode()
    return content[:5] + len(text).to_bytes(4, "little") + text + content[9 + length :]


@pytest.mark.parametrize("command", ["decode bad.mimi out.wav", "play bad.mimi --stdout"])
@pytest.mark.parametrize("spoil, said", [
    (lambda x: b"RIFF" + x[4:], "is not a .mimi file"), (lambda x: b"", "is not a .mimi file"),
    (lambda x: x[:-3], "truncated"), (lambda x: x[:40], "it ends early"), (lambda x: x + b"00", "longer than it says"),
    (lambda x: header(x, size=60), "its size is 60, the model's 64"),
    (lambda x: header(x, size=33), "its size is 33, the model's 64"),
    (lambda x: header(x, rate=16000), "its rate is 16000, the model's 24000"),
    (lambda x: header(x, codebooks=9), "truncated"),
    (lambda x: header(x, codebooks=16, samples=6 * 1920), "longer than it says"),
    (lambda x: header(x, codebooks=26, samples=4 * 1920) + b"\0" * 2, "holds 26 codebooks, the model 8"),
    (lambda x: header(x, weights="0" * 16), "written by another model")])
def test_codes_that_are_foreign_or_damaged(room, capsys, command, spoil, said):
    (room / "bad.mimi").write_bytes(spoil((room / "talk.mimi").read_bytes()))
    refused(room, capsys, command, "bad.mimi", said)


@pytest.mark.parametrize("name, said", [("a.raw", "RAW"), ("a.txt", ".txt is not a sound format"),
                                        ("no/a.wav", "no/a.wav cannot be written (No such file or directory)")])
def test_sounds_that_cannot_be_written(room, capsys, name, said):
    refused(room, capsys, f"decode talk.mimi {name}", said)
