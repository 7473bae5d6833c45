"""A third tower: pairs of any two of pictures, captions and sounds train one space."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image

from mm.encoders import CLIP
from mm.errors import InputError
from mm.recipes import cli
from mm.recipes.clip.data import Turns, by_kinds
from mm.recipes.clip.pairs import read_pairs
from mm.recipes.train.run import read_log

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 50), "blue": (30, 60, 220), "black": (10, 10, 10)}
CONFIG = """
shape:
  dim: 16
  image: {size: 16, patch: 8, width: 32, depth: 1, heads: 2}
  text: {vocab: 520, context: 8, width: 32, depth: 1, heads: 2}
  audio: {seconds: 0.3, mels: 32, patch: 8, width: 32, depth: 1, heads: 2}
data: {batch_size: 8}
augment: {crop: 1.0, colour: {hue: 0, saturation: 0, brightness: 0}}
loss: {positives: group, chunk: 3}
optim: {lr: 0.003, warmup: 5, ema: 0.9}
trainer: {max_steps: 90, save: 60, evaluate: 60, log: 5, threads: 1, accelerator: cpu}
"""


def tone(path: Path, hertz: float, seconds: float, seed: int) -> str:
    noise = np.random.default_rng(seed).normal(0, 0.02, int(8000 * seconds))
    soundfile.write(path, 0.4 * np.sin(2 * np.pi * hertz * np.arange(len(noise)) / 8000) + noise, 8000)
    return path.name


def square(path: Path, rgb: tuple[int, int, int], seed: int) -> str:
    shift = np.random.default_rng(seed).integers(-25, 25, 3)
    Image.new("RGB", (20, 20), tuple(int(c) for c in np.clip(np.array(rgb) + shift, 0, 255))).save(path)
    return path.name


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Every colour has its tone; a third of the rows lacks the sound, a third the picture, a third the words."""
    folder = tmp_path_factory.mktemp("sounds")
    with open(folder / "pairs.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["audio", "image", "caption", "group"])
        for i in range(36):
            colour, lacks = list(COLOURS)[i % 4], i // 4 % 3
            sound = tone(folder / f"{i}.wav", 300 * 1.8 ** (i % 4), 0.2 + 0.01 * i, i) if lacks != 0 else ""
            picture = square(folder / f"{i}.png", COLOURS[colour], i) if lacks != 1 else ""
            rows.writerow([sound, picture, f"a {colour} square" if lacks != 2 else "", colour])
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def options(data: Path, out: Path, *more: str) -> list[str]:
    return ["train", "clip", "--config", str(data / "config.yaml"), "--data.path", str(data / "pairs.csv"),
            "--out", str(out), *more]


def found(queries: torch.Tensor, gallery: torch.Tensor) -> float:
    """The share of rows whose nearest row of the gallery has the same place."""
    nearest = (F.normalize(queries, dim=-1) @ F.normalize(gallery, dim=-1).T).argmax(1)
    return (nearest == torch.arange(len(queries))).float().mean().item()


def test_pairs_of_any_two_train_one_space(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(options(data, out, "--data.val", str(data / "pairs.csv"))) == 0
    assert "24 pictures, 24 captions, 24 sounds" in capsys.readouterr().err
    log = read_log(out / "train.csv")
    assert np.mean(log["loss"][-15:]) < 0.6 * np.mean(log["loss"][:15])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["unreadable_sounds"] == 0 and metrics["validation"]["a2i R@1"] >= 75
    assert {name.split()[0] for name in metrics["validation"]} == {"i2t", "t2i", "i2a", "a2i", "t2a", "a2t"}
    clip = CLIP.from_pretrained(out / "model")
    tones = [tone(tmp_path / f"{i}.wav", 300 * 1.8**i, 0.25, 100 + i) for i in range(4)]
    squares = [square(tmp_path / f"{i}.png", rgb, 100 + i) for i, rgb in enumerate(COLOURS.values())]
    with torch.no_grad():
        sounds = clip.encode_audio(clip.spectrograms([tmp_path / name for name in tones]))
        pictures = clip.encode_image(clip.preprocess([tmp_path / name for name in squares]))
        words = clip.encode_text(clip.tokenize([f"a {colour} square" for colour in COLOURS]))
    assert found(sounds, pictures) >= 0.75 and found(sounds, words) >= 0.75 and found(pictures, words) >= 0.75
    clip.save_pretrained(tmp_path / "again")
    again = CLIP.from_pretrained(tmp_path / "again")
    assert again.spec == clip.spec and again.fingerprint() == clip.fingerprint()
    with torch.no_grad():
        one = again.encode_audio(clip.spectrograms(tmp_path / tones[0]))
    torch.testing.assert_close(one, sounds[:1], atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="audio"):
        clip.save_pretrained(tmp_path / "hf", layout="hf")


def test_two_processes_share_batches_of_several_kinds(data, tmp_path):
    more = ["--trainer.max_steps", "8", "--loss.kind", "siglip"]
    assert cli.main(options(data, tmp_path / "one", *more)) == 0
    argv = options(data, tmp_path / "two", *more, "--trainer.devices", "2")
    command = [sys.executable, "-m", "mm.recipes.cli", *argv]
    done = subprocess.run(command, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    one, two = (read_log(tmp_path / name / "train.csv") for name in ("one", "two"))
    assert one["step"] == two["step"] == list(range(1, 9))
    for name in ("loss", "gradient", "scale"):
        torch.testing.assert_close(torch.tensor(two[name]), torch.tensor(one[name]), rtol=1e-4, atol=1e-5)


def test_sounds_and_captions_alone_leave_the_image_tower_as_it_was(data, tmp_path):
    lines = [line.split(",") for line in (data / "pairs.csv").read_text().splitlines()]
    rows = ["audio,caption"] + [f"{data / line[0]},{line[2]}" for line in lines[1:] if line[0] and line[2]]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    argv = options(data, tmp_path / "run", "--data.path", str(tmp_path / "pairs.csv"), "--trainer.max_steps", "3")
    assert cli.main(argv) == 0
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    assert any(name.startswith("clip.audio.") for name in saved)
    assert not any(name.startswith("clip.image.") for name in saved)


def test_sounds_need_an_audio_tower_and_whole_files(data, tmp_path, capsys):
    assert cli.main(options(data, tmp_path / "run", "--shape.audio", "null")) == 2
    assert "holds sounds, but the model has no audio tower: give it one with shape.audio" in capsys.readouterr().err
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    text = (data / "pairs.csv").read_text().replace("4.wav", str(tmp_path / "bad.wav"), 1)
    rows = [text.splitlines()[0]] + [",".join(str(data / part) if part.endswith(("png", ".wav")) else part
                                              for part in line.split(",")) for line in text.splitlines()[1:]]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    argv = options(data, tmp_path / "run", "--data.path", str(tmp_path / "pairs.csv"), "--trainer.max_steps", "12")
    assert cli.main(argv) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["unreadable_sounds"] == 1
    assert "bad.wav: the sound cannot be read" in capsys.readouterr().err
    plain = CLIP.from_pretrained(tmp_path / "run" / "model")
    plain.audio = None
    with pytest.raises(InputError, match="no audio tower"):
        plain.encode_audio(torch.zeros(1, 1, 32, 30))


# ------------------------------------------------------------------------------------------------- parts
def test_items_are_told_apart_by_what_they_hold(data):
    pairs = read_pairs(str(data / "pairs.csv"))
    parts = {part.items[0].kinds: len(part) for part in by_kinds(pairs)}
    assert parts == {("image", "text"): 12, ("text", "audio"): 12, ("image", "audio"): 12}
    assert len({pair.group for pair in pairs.items}) == 4


@pytest.mark.parametrize(("content", "says"), [
    ("audio,group\na.wav,1\n", "expected a column image .* or caption"),
    ("audio,caption\n,words\n", "expected the path of a sound"),
    ("audio,caption,image\na.wav,,\n", "holds no sound with a picture or caption")])
def test_bad_tables_of_sounds_are_one_sentence(tmp_path, content, says):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(InputError, match=says):
        read_pairs(str(tmp_path / "a.csv"))


def test_sources_take_turns_in_proportion():
    turns = Turns([30, 10, 21])
    at = [turns.at(step) for step in range(60)]
    assert [sum(source == k for source, _ in at) for k in range(3)] == [30, 10, 20]
    for k in range(3):
        assert [time for source, time in at if source == k] == list(range(sum(source == k for source, _ in at)))
    assert Turns([7]).at(5) == (0, 5)
