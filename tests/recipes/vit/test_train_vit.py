"""Training a classifier: it learns, resumes exactly after a kill, keeps or replaces a head, and survives bad input."""

from __future__ import annotations

import csv
import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from timm.optim import param_groups_layer_decay
from trial import Trial, same_weights, weights

from mm.encoders import CLIP, ViT
from mm.encoders.vision.image import Preprocess
from mm.errors import InputError
from mm.recipes import cli
from mm.recipes.clip.settings import ImageTower, Shape, TextTower
from mm.recipes.clip.shape import new_clip
from mm.recipes.data.sampler import Order
from mm.recipes.train.optim import adamw, layer_share
from mm.recipes.train.run import read_log
from mm.recipes.train.settings import Optim
from mm.recipes.vit.confusion import confusion, most_confused, write_table
from mm.recipes.vit.data import ClassBatches, changes, seeded
from mm.recipes.vit.features import features
from mm.recipes.vit.fit import measures
from mm.recipes.vit.labelled import read_labelled
from mm.recipes.vit.module import VitRecipe
from mm.recipes.vit.settings import ClassAugment, VitOptim, VitShape
from mm.recipes.vit.start import new_spec, with_drop_path

RUNS = Trial("vit", "set")
options, train = RUNS.options, RUNS.train
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 50), "blue": (30, 60, 220), "black": (10, 10, 10)}
CONFIG = """
shape: {patch: 8, width: 32, depth: 2, heads: 2}
drop_path: 0.1
data: {batch_size: 16, size: 16}
augment: {crop: 0.6, policy: rand-m3-mstd0.5-inc1, mixup: 0.2, cutmix: 1.0, mix: 0.5}
optim: {lr: 0.003, warmup: 5, ema: 0.9, layer_decay: 0.8}
trainer: {max_steps: 40, save: 10, evaluate: 20, log: 5, threads: 1, accelerator: cpu}
"""


def draw_classes(root: Path, count: int, start: int = 0) -> None:
    for name, rgb in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(start, start + count):
            image = Image.new("RGB", (24 + i, 24), "white")
            ImageDraw.Draw(image).ellipse((2, 2, 18, 18), fill=rgb)
            image.save(root / name / f"{i}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Coloured discs in folders of classes, split."""
    folder = tmp_path_factory.mktemp("discs")
    draw_classes(folder / "set" / "train", 8)
    draw_classes(folder / "set" / "val", 2, start=20)
    (folder / "config.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    return train(data, tmp_path_factory.mktemp("runs") / "whole", "--trainer.max_steps", "100")


# ------------------------------------------------------------------------------------------------- runs
def test_a_killed_run_goes_on_bit_for_bit(data, whole, tmp_path):
    out = tmp_path / "killed"
    assert 0 < RUNS.kill(data, out, "--trainer.max_steps", "100") < 100 and not (out / "model").exists()
    train(data, out, "--trainer.max_steps", "100")
    for name in ("train.csv", "validation.csv", "confusion.csv"):
        assert (out / name).read_text() == (whole / name).read_text()
    assert len(read_log(out / "train.csv")["loss"]) == 100
    assert same_weights(out, whole)


def test_a_run_learns_and_leaves_metrics_a_confusion_matrix_and_a_model(data, whole):
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["validation"]["top-1"] == 100 and metrics["classes"] == 4 and metrics["pictures"] == 32
    assert metrics["validation_pictures"] == 8 and not metrics["frozen"] and not metrics["most_confused"]
    rows = list(csv.reader((whole / "confusion.csv").read_text().splitlines()))
    assert rows[0][1:] == ["black", "blue", "green", "red"]
    assert [row[1 + i] for i, row in enumerate(rows[1:])] == ["2"] * 4
    assert Image.open(whole / "confusion.png").width > 300 and Image.open(whole / "curves.png").width > 500
    vit = ViT.from_pretrained(whole / "model")
    assert vit.labels == ("black", "blue", "green", "red") and vit.preprocessing.size == (16, 16)
    best = vit.encode(vit.preprocess([data / "set" / "val" / name / "20.png" for name in vit.labels])).argmax(1)
    assert best.tolist() == [0, 1, 2, 3]
    recipe = VitRecipe.load_from_checkpoint(whole / "last.ckpt", weights_only=True)
    assert recipe.optim == VitOptim(lr=0.003, warmup=5, ema=0.9, layer_decay=0.8)
    assert all(torch.equal(value, vit.state_dict()[name]) for name, value in recipe.average.state_dict().items())


def test_a_trained_classifier_sorts_pictures_by_its_own_labels(data, whole, capsys):
    argv = ["classify", str(data / "set" / "val"), "--model", str(whole / "model"), "--json"]
    assert cli.main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["labels"] == ["black", "blue", "green", "red"] and len(found["pictures"]) == 8
    assert all(row["labels"][0]["label"] == row["path"].split("/")[0] for row in found["pictures"])
    assert cli.main(argv[:2]) == 2
    assert "--labels FILE is needed" in capsys.readouterr().err


@pytest.mark.parametrize(("pool", "layout"), [("token", "timm"), ("mean", "timm"), ("token", "hf")])
def test_what_was_trained_opens_in_timm_and_transformers(pool, layout, tmp_path):
    settings = new_spec(VitShape(patch=8, width=32, depth=2, heads=2, pool=pool), 16, 3)
    vit = ViT(settings).eval()
    vit.labels, vit.preprocessing = ("a", "b", "c"), Preprocess(size=(16, 16))
    torch.nn.init.normal_(vit.head.proj.weight)
    vit.save_pretrained(tmp_path / "m", layout=layout)
    pixels = torch.randn(2, 3, 16, 16)
    if layout == "timm":
        theirs = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()(pixels)
    else:
        from transformers import AutoModelForImageClassification
        theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "m").eval()(pixels).logits
    torch.testing.assert_close(vit.encode(pixels), theirs, atol=1e-5, rtol=0)


def test_a_frozen_backbone_is_read_once_and_only_its_head_moves(data, whole, tmp_path, monkeypatch, capsys):
    more = ["--model", str(whole / "model"), "--freeze", "backbone", "--head", "new", "--augment.mixup", "0",
            "--augment.cutmix", "0", "--optim.lr", "0.05"]
    out = train(data, tmp_path / "probe", *more)
    assert "0.00 trained" in capsys.readouterr().err
    old, new = weights(whole), weights(out)
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved == {"head.proj.weight", "head.proj.bias"}
    assert json.loads((out / "metrics.json").read_text())["validation"]["top-1"] == 100
    vit = ViT.from_pretrained(out / "model")
    assert measures(vit.encode(vit.preprocess([data / "set/val/blue/20.png"])), torch.tensor([1]))["top-1"] == 100
    monkeypatch.setattr("mm.recipes.vit.features.read_pictures", None)  # nothing is read a second time
    train(data, out, *more, "--trainer.max_steps", "60")
    assert len(read_log(out / "train.csv")["loss"]) == 60


def test_features_are_computed_again_for_other_weights_or_pictures(data, whole, tmp_path):
    vit, sets = ViT.from_pretrained(whole / "model"), read_labelled(str(data / "set"))
    ask = lambda source: features(source, vit, tmp_path / "f.safetensors", {}, torch.device("cpu"))  # noqa: E731
    first, labels = ask(sets.val)
    with torch.inference_mode():
        pixels = vit.preprocess([picture.open() for picture in sets.val.pictures])
        torch.testing.assert_close(first, vit.pool(vit(pixels)))
    assert labels.tolist() == sets.val.labels
    assert torch.equal(ask(sets.val)[0], first) and len(ask(sets.train)[0]) == 32
    torch.nn.init.zeros_(vit.patchify.weight)
    assert not torch.equal(ask(sets.val)[0], first)
    (tmp_path / "f.safetensors").write_bytes(b"cut")
    assert len(ask(sets.val)[0]) == 8


def test_a_head_stays_where_its_classes_are_those_of_the_data(data, whole, tmp_path):
    small = ["--optim.lr", "1e-9", "--optim.warmup", "0", "--trainer.max_steps", "2", "--model", str(whole / "model")]
    out = train(data, tmp_path / "same", *small)
    torch.testing.assert_close(weights(out), weights(whole), atol=1e-6, rtol=1e-5)
    other = tmp_path / "other"
    draw_classes(other, 3)
    (other / "red").rename(other / "pink")
    with pytest.raises(InputError, match="'pink' is one that only the data has: --head new replaces its head"):
        train(data, tmp_path / "no", *small, "--data.path", str(other))
    out = train(data, tmp_path / "new", *small, "--data.path", str(other), "--head", "new")
    vit = ViT.from_pretrained(out / "model")
    assert vit.labels == ("black", "blue", "green", "pink") and vit.head.proj.weight.abs().max() < 1e-6
    assert torch.allclose(vit.patchify.weight, ViT.from_pretrained(whole / "model").patchify.weight, atol=1e-6)


def test_the_image_tower_of_a_clip_gets_a_head(data, tmp_path):
    tower = ImageTower(size=16, patch=8, width=32, depth=1, heads=2)
    shape = Shape(dim=16, image=tower, text=TextTower(vocab=560, context=10, width=32, depth=1, heads=2))
    clip = new_clip(shape, ["a red disc", "a blue disc"])
    clip.save_pretrained(tmp_path / "clip")
    out = train(data, tmp_path / "run", "--model", str(tmp_path / "clip"), "--trainer.max_steps", "2")
    vit = ViT.from_pretrained(out / "model")
    assert vit.labels == ("black", "blue", "green", "red") and vit.spec.head.proj.dim == 4
    assert vit.preprocessing == CLIP.from_pretrained(tmp_path / "clip").preprocessing


# ------------------------------------------------------------------------------------------- bad input
def test_bad_pictures_are_counted_and_stop_nothing(data, tmp_path, capsys):
    draw_classes(tmp_path / "set", 4)
    for place in (tmp_path / "set" / "red" / "0.png", tmp_path / "set" / "blue" / "1.png"):
        place.write_bytes(place.read_bytes()[:60])
    out = train(data, tmp_path / "run", "--data.path", str(tmp_path / "set"), "--trainer.max_steps", "10",
                "--data.holdout", "0")
    said = capsys.readouterr().err
    assert said.count("red/0.png: the picture cannot be decoded") >= 1 and "2 pictures could not be read" in said
    assert len(json.loads((out / "metrics.json").read_text())["unreadable"]) == 2
    assert all(map(math.isfinite, read_log(out / "train.csv")["loss"])) and not (out / "confusion.csv").exists()


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, capsys):
    argv = options(data, tmp_path / "run", "--optim.lr", "1e30", "--optim.clip", "0", "--optim.warmup", "0")
    assert cli.main(["train", "vit", *argv]) == 2
    assert "the loss is nan at step" in capsys.readouterr().err and not (tmp_path / "run" / "last.ckpt").exists()


@pytest.mark.parametrize(("argv", "says"), [
    (["--data.path", "x", "--optim.layer_decay", "0"], "optim.layer_decay must lie in (0, 1]"),
    (["--data.path", "x", "--data.holdout", "1"], "data.holdout must lie in [0, 1)"),
    (["--data.path", "x", "--augment.cutmix", "1", "--data.batch_size", "9"], "must be even"),
    (["--data.path", "x", "--augment.cutmix", "1", "--freeze", "backbone"], "with freeze backbone"),
    (["--data.path", "x", "--shape.patch", "much"], "shape.patch"),
    (["--data.path", "nowhere", "--out", "{tmp}/o"], "nowhere does not exist"),
    (["--data.path", "{data}/set", "--out", "{tmp}/o", "--augment.policy", "nothing"], "nothing that timm knows"),
    (["--data.path", "{data}/set", "--out", "{tmp}/o", "--data.size", "20"], "20 is not a multiple of the patch, 16"),
    (["--data.path", "{data}/set", "--out", "{tmp}/o", "--shape.heads", "5"], "cannot be split over 5 heads")])
def test_wrong_settings_are_one_sentence(argv, says, data, tmp_path, capsys):
    assert cli.main(["train", "vit", *(part.format(tmp=tmp_path, data=data) for part in argv)]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("mm: ") == 1


# ------------------------------------------------------------------------------------------------ data
def test_folders_without_a_split_are_split_by_class_and_thin_classes_are_told(tmp_path):
    draw_classes(tmp_path, 10)
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "red" / "0.png").rename(tmp_path / "one" / "0.png")
    (tmp_path / "blue" / "0.png").rename(tmp_path / "loose.png")
    sets = read_labelled(str(tmp_path), holdout=0.2)
    assert sets.train.classes == ("black", "blue", "green", "one", "red")
    assert [sets.val.labels.count(i) for i in range(5)] == [2, 2, 2, 0, 2]
    assert not {p.path for p in sets.val.pictures} & {p.path for p in sets.train.pictures}
    told = " ".join(sets.notes)
    for words in ("'empty') without a picture", "('one') with one training picture", "('one') without a validation",
                  "1 pictures beside the class folders"):
        assert words in told
    assert read_labelled(str(tmp_path), holdout=0.2).val.pictures == sets.val.pictures
    assert read_labelled(str(tmp_path), holdout=0).val is None


def test_tables_have_splits_and_names_for_numbers(data, tmp_path):
    (tmp_path / "jpg").mkdir()
    for i in range(6):
        (tmp_path / "jpg" / f"{i}.png").write_bytes((data / "set/train/red/0.png").read_bytes())
    rows = [("file", "split", "class_id"), ("0.png", "train", 0), ("1.png", "train", 10), ("2.png", "val", 10),
            ("3.png", "test", 0), ("4.png", "train", ""), ("5.png", "train", 2)]
    (tmp_path / "items.tsv").write_text("\n".join("\t".join(map(str, row)) for row in rows))
    (tmp_path / "classes.tsv").write_text("class_id\tname\n0\tPear\n2\tFig\n10\tApple\n")
    sets = read_labelled(str(tmp_path))
    assert sets.train.classes == ("Apple", "Fig", "Pear") and sets.train.labels == [2, 0, 1]
    assert sets.train.pictures[0].path == tmp_path / "jpg" / "0.png" and sets.val.labels == [0]
    assert "1 pictures without a label were skipped" in " ".join(sets.notes)
    assert "1 pictures of a test split" in " ".join(sets.notes)
    (tmp_path / "classes.tsv").unlink()
    assert read_labelled(str(tmp_path / "items.tsv")).train.classes == ("0", "2", "10")
    kept = read_labelled(str(tmp_path), classes=("2", "10", "0")).train
    assert kept.classes == ("2", "10", "0") and kept.labels == [2, 1, 0]
    lines = [json.dumps({"image": f"jpg/{i}.png", "label": i % 2}) for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert read_labelled(str(tmp_path / "rows.jsonl"), holdout=0.5).val.labels == [0, 1]


def test_shards_carry_labels(data, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, name in enumerate(["cat", "dog", "cat", ""]):
            label = ("cls", name.encode()) if i % 2 else ("json", json.dumps({"label": name}).encode())
            for ending, content in (("png", (data / "set/train/red/0.png").read_bytes()), label):
                info = tarfile.TarInfo(f"{i}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    sets = read_labelled(str(tmp_path / "a.tar"), holdout=0)
    assert sets.train.classes == ("cat", "dog") and sets.train.labels == [0, 1, 0]
    assert "1 pictures without a label" in sets.notes[0]


def test_a_class_that_only_validation_has_is_left_out_and_told(data, tmp_path):
    draw_classes(tmp_path / "val", 1)
    (tmp_path / "val" / "red").rename(tmp_path / "val" / "pink")
    sets = read_labelled(str(data / "set" / "train"), str(tmp_path / "val"))
    assert len(sets.val) == 3 and "1 validation pictures are left out, their classes are not trained: 'pink'" in \
        " ".join(sets.notes)
    for name in ("black", "blue", "green"):
        (tmp_path / "val" / name).rename(tmp_path / "val" / f"un{name}")
    with pytest.raises(InputError, match="no validation picture has a class that training has"):
        read_labelled(str(data / "set" / "train"), str(tmp_path / "val"))


@pytest.mark.parametrize(("content", "says"), [
    ("image,label\na.png,x\nb.png,x\n", "holds one class only, 'x'"),
    ("image\na.png\n", r"line 1: expected a column label"),
    ("image,label,split\na.png,x,sometimes\n", r"line 2: expected the split train, val or test, found 'sometimes'"),
    ("image,label\n,x\n", "line 2: expected the path of a picture"),
    ("image,label,split\na.png,x,val\n", "no picture with a class to train on")])
def test_wrong_tables_are_refused(content, says, tmp_path):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(InputError, match=says):
        read_labelled(str(tmp_path / "t.csv"))


# ---------------------------------------------------------------------------------------------- parts
def test_augmentation_depends_on_seed_epoch_and_item_alone(data):
    sets, wanted = read_labelled(str(data / "set")), Preprocess(size=(16, 16))
    change = changes(wanted, ClassAugment(erase=0.5))
    one, two = (ClassBatches(sets.train, change, Order(count=32, batch=8, seed=seed)) for seed in (0, 1))
    first = one[3].inputs
    state = torch.get_rng_state()
    np.random.rand(3), torch.rand(2)
    assert torch.equal(one[3].inputs, first) and not torch.equal(one[3 + 4].inputs, first)
    assert not torch.equal(two[3].inputs, first)
    with seeded(5):
        torch.rand(1)
    torch.set_rng_state(state)


def test_training_pictures_are_normalised_as_the_model_wants():
    wanted = Preprocess(size=(8, 8), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), rescale=1 / 127.5)
    image = Image.new("RGB", (20, 10), (200, 100, 50))
    plain = changes(wanted, ClassAugment(crop=1.0, flip=0.0, policy="", jitter=0.0))
    torch.testing.assert_close(plain(image), wanted(image), atol=1e-5, rtol=0)
    cropped = changes(wanted, ClassAugment(crop=0.3, flip=0.0, policy="", jitter=0.0))
    torch.testing.assert_close(cropped(image), wanted(image), atol=1e-5, rtol=0)


def test_layer_decay_is_timms():
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=2,
                               num_classes=5)
    scales: dict[float, int] = {}
    for group in param_groups_layer_decay(theirs, layer_decay=0.7):
        scales[round(group["lr_scale"], 6)] = scales.get(round(group["lr_scale"], 6), 0) + sum(
            p.numel() for p in group["params"])
    ours = ViT(new_spec(VitShape(patch=8, width=32, depth=3, heads=2), 16, 5))
    optim = Optim(lr=1.0, weight_decay=0.1)
    groups = adamw(ours, optim, lambda name: layer_share(name, 3, 0.7)).param_groups
    found: dict[float, int] = {}
    for group in groups:
        found[round(group["lr"], 6)] = found.get(round(group["lr"], 6), 0) + sum(p.numel() for p in group["params"])
    assert found == scales and groups[0]["lr"] == 1.0


def test_drop_path_grows_and_everything_else_stays():
    settings = new_spec(VitShape(patch=8, width=32, depth=3, heads=2), 16, 5)
    made = with_drop_path(settings, 0.2)
    assert [layer.drop_path for layer in made.stack.layers] == [0.0, 0.1, 0.2]
    assert with_drop_path(made, 0.0) == settings


def test_confusion_counts_and_names_the_worst(tmp_path):
    matrix = confusion([0, 0, 0, 1, 2, 2], [0, 1, 1, 1, 0, 2], 3)
    assert matrix.tolist() == [[1, 2, 0], [0, 1, 0], [1, 0, 1]]
    assert most_confused(matrix, ["a", "b", "c"]) == [
        {"true": "a", "predicted": "b", "count": 2, "of": 3}, {"true": "c", "predicted": "a", "count": 1, "of": 2}]
    write_table(matrix, ["a", "b", "c"], tmp_path / "c.csv")
    assert (tmp_path / "c.csv").read_text() == "true \\ predicted,a,b,c\na,1,2,0\nb,0,1,0\nc,1,0,1\n"


def test_accuracy_of_the_best_and_of_the_five_best():
    logits = torch.eye(6) * 5 + torch.arange(6) * 0.1
    assert measures(logits, torch.arange(6))["top-1"] == 100
    found = measures(logits, torch.tensor([0, 1, 2, 3, 4, 0]))
    assert found["top-1"] == pytest.approx(500 / 6) and found["top-5"] == pytest.approx(500 / 6)
    assert measures(torch.eye(2), torch.tensor([0, 1]))["top-5"] == 100


def test_the_strongest_augmentation_never_asks_for_pictures_of_no_bits():
    from PIL import Image
    from timm.data.auto_augment import rand_augment_transform

    from mm.recipes.vit.data import bounded

    picture = Image.new("RGB", (8, 8))
    change = rand_augment_transform(bounded("rand-m10-n2-mstd2-inc1"), {})
    for _ in range(400):
        change(picture)
    assert bounded("original-mstd0.5") == "original-mstd0.5" and bounded("rand-m9-mmax8") == "rand-m9-mmax8"
