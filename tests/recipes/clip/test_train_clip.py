"""Training a small CLIP: it learns, resumes exactly after a kill, shares a batch exactly, and survives bad input."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from runs import CLIP_RUNS, options, shapes, train
from trial import same_weights, weights

from mm.encoders import CLIP
from mm.errors import InputError
from mm.recipes import cli
from mm.recipes.clip.captions import LooseTokenizer
from mm.recipes.clip.data import by_group, crop_box, word
from mm.recipes.clip.fit import fit, starting_model
from mm.recipes.clip.loss import clip_loss
from mm.recipes.clip.module import ClipRecipe
from mm.recipes.clip.pairs import read_pairs
from mm.recipes.clip.settings import ClipJob, Loss, Words
from mm.recipes.common.command import parse
from mm.recipes.data.sampler import generator
from mm.recipes.train.optim import adamw, rate, update_average
from mm.recipes.train.run import read_log
from mm.recipes.train.settings import Optim
from mm.tokenizer.tokenizer import train_bpe


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return shapes(tmp_path_factory.mktemp("shapes"))


# ------------------------------------------------------------------------------------------------- runs
def test_a_killed_run_goes_on_bit_for_bit(data, tmp_path):
    val = ["--data.val", str(data / "pairs.csv"), "--trainer.max_steps", "160"]
    out = tmp_path / "killed"
    assert 0 < CLIP_RUNS.kill(data, out, *val) < 160 and not (out / "model").exists()
    train(data, out, *val)
    whole = train(data, tmp_path / "whole", *val)
    for name in ("train.csv", "validation.csv"):
        assert (out / name).read_text() == (whole / name).read_text()
    assert len(read_log(out / "train.csv")["loss"]) == 160
    assert same_weights(out, whole)
    assert json.loads((out / "metrics.json").read_text())["validation"]["i2t R@1"] > 50


def test_two_processes_train_as_one(data, tmp_path):
    out = tmp_path / "two"
    more = ["--trainer.max_steps", "8", "--shape.image.drop_path", "0", "--shape.image.patch_dropout", "0"]
    command = [sys.executable, "-m", "mm.recipes.cli", "train", "clip", *options(data, out, *more)]
    subprocess.run([*command, "--trainer.devices", "2"], check=True, capture_output=True, timeout=300)
    two, one = read_log(out / "train.csv"), read_log(train(data, tmp_path / "one", *more) / "train.csv")
    for name in ("loss", "gradient", "scale"):
        torch.testing.assert_close(torch.tensor(two[name]), torch.tensor(one[name]), rtol=1e-4, atol=1e-5)


def test_a_run_leaves_logs_curves_metrics_and_a_model(data, tmp_path, capsys):
    out = tmp_path / "run"
    argv = options(data, out, "--data.val", str(data / "pairs.csv"), "--data.words", "{drop: 0.3}",
                   "--data.workers=1", "--data.bpe_dropout", "0.2")
    assert cli.main(["train", "clip", *argv]) == 0
    said = capsys.readouterr().err
    assert "24 pictures, 48 captions" in said and "step 40 of 40: i2t R@1" in said
    log, metrics = read_log(out / "train.csv"), json.loads((out / "metrics.json").read_text())
    assert log["step"] == list(range(1, 41)) and log["loss"][-1] < log["loss"][0]
    assert read_log(out / "validation.csv")["step"] == [20, 40]
    assert metrics["steps"] == 40 and metrics["unreadable_pictures"] == 0 and metrics["seconds"] > 0
    assert Image.open(out / "curves.png").width > 500 and list((out / "tensorboard").iterdir())
    clip = CLIP.from_pretrained(out / "model")
    assert clip.similarity([data / "0.png"], ["a red circle", "a blue square"]).shape == (1, 2)
    average = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, average[f"average.{name}"]) for name, value in clip.state_dict().items())
    assert any(not torch.equal(value, average[f"clip.{name}"]) for name, value in clip.state_dict().items())


def test_a_finished_run_is_exported_again_and_other_settings_are_refused(data, tmp_path):
    out = train(data, tmp_path / "run", "--trainer.max_steps", "10")
    before = (out / "train.csv").read_text()
    train(data, out, "--trainer.max_steps", "10", "--export.dtype", "float16")
    assert (out / "train.csv").read_text() == before
    assert weights(out)["logit_scale"].dtype == torch.float16
    with pytest.raises(InputError, match=r"optim.lr 0.003, not 0.1"):
        train(data, out, "--optim.lr", "0.1")
    train(data, out, "--trainer.max_steps", "15")
    assert read_log(out / "train.csv")["step"] == list(range(1, 16))
    with pytest.raises(InputError, match="holds no run"):
        train(data, data)


def test_the_checkpoint_alone_gives_the_recipe_back(data, tmp_path):
    out = train(data, tmp_path / "run", "--trainer.max_steps", "10", "--loss.smoothing", "0.1")
    recipe = ClipRecipe.load_from_checkpoint(out / "last.ckpt", weights_only=True)
    assert recipe.optim == Optim(lr=0.003, warmup=5, ema=0.9) and recipe.loss == Loss(smoothing=0.1)
    assert all(torch.equal(value, weights(out)[name]) for name, value in recipe.average.state_dict().items())


def test_fine_tuning_starts_from_a_model_with_its_own_tokenizer_and_pictures(data, tmp_path):
    first = train(data, tmp_path / "first", "--trainer.max_steps", "10")
    out = tmp_path / "tuned"
    fit(parse(ClipJob, "mm", ["--model", str(first / "model"), "--data.path", str(data / "pairs.csv"),
                              "--out", str(out), "--data.batch_size", "8", "--trainer.max_steps", "2",
                              "--optim.lr", "1e-9",
                              "--optim.warmup", "0", "--trainer.accelerator", "cpu"]))
    old, new = CLIP.from_pretrained(first / "model"), CLIP.from_pretrained(out / "model")
    assert new.spec == old.spec and new.preprocessing == old.preprocessing
    assert torch.equal(new.tokenize("a red circle"), old.tokenize("a red circle"))
    torch.testing.assert_close(new.state_dict(), old.state_dict(), atol=1e-6, rtol=1e-5)


def test_bad_pictures_and_long_captions_are_counted_and_stop_nothing(data, tmp_path, capsys):
    lines = (data / "pairs.csv").read_text().splitlines()
    (tmp_path / "cut.png").write_bytes((data / "0.png").read_bytes()[:60])
    for i in range(24):
        (tmp_path / f"{i}.png").write_bytes((data / f"{i}.png").read_bytes())
    odd = ["cut.png,a broken one", "absent.png,gone", f"0.png,{'very ' * 40}red", "1.png,"]
    (tmp_path / "pairs.csv").write_text("\n".join(lines + odd))
    out = train(data, tmp_path / "run", "--data.path", str(tmp_path / "pairs.csv"), "--trainer.max_steps", "20")
    metrics, said = json.loads((out / "metrics.json").read_text()), capsys.readouterr().err
    assert (metrics["unreadable_pictures"], metrics["cut_captions"]) == (2, 1)
    assert "1 empty captions were skipped" in said and "2 pictures could not be read and were replaced" in said
    assert said.count("cut.png: the picture cannot be decoded") == 1
    assert all(map(math.isfinite, read_log(out / "train.csv")["loss"]))


def test_a_source_of_nothing_but_bad_pictures_is_given_up(data, tmp_path):
    (tmp_path / "pairs.csv").write_text("image,caption\nnowhere.png,some words\n")
    with pytest.raises(InputError, match="cannot be read"):
        train(data, tmp_path / "run", "--data.path", str(tmp_path / "pairs.csv"))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(data, tmp_path, capsys):
    out = tmp_path / "run"
    argv = options(data, out, "--optim.lr", "1e30", "--optim.clip", "0", "--optim.warmup", "0")
    assert cli.main(["train", "clip", *argv]) == 2
    assert "the loss is nan at step 2" in capsys.readouterr().err
    assert not (out / "last.ckpt").exists() and read_log(out / "train.csv")["step"] == [1]


# ------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(("argv", "says"), [
    (["--data.path", "x", "--optim.lr", "much"], "optim.lr"),
    (["--data.path", "x", "--data.pth", "y"], "--data.pth"),
    (["--config", "nowhere.yaml"], "nowhere.yaml"),
    (["--data.path", "x", "--optim.ema", "1.0"], "optim.ema must lie"),
    (["--data.path", "x", "--trainer.max_steps", "0"], "trainer.max_steps must be at least 1"),
    ([], "data.path")])
def test_wrong_settings_are_one_sentence(argv, says, capsys):
    assert cli.main(["train", "clip", *argv]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_a_shipped_configuration_is_found_by_name_and_overridden():
    job = parse(ClipJob, "mm", ["--config", "clip_emoji", "--optim.lr=0.25"])
    assert job.data.path == "emojicross" and job.optim.lr == 0.25


def test_a_tower_that_cannot_be_split_over_its_heads_is_refused(data):
    job = parse(ClipJob, "mm", options(data, Path("unused"), "--shape.image.heads", "3"))
    with pytest.raises(InputError, match="32 cannot be split over 3 heads"):
        starting_model(job, read_pairs(job.data.path))


# ---------------------------------------------------------------------------------------------- parts
def test_loss_with_groups_of_one_is_cross_entropy_with_the_diagonal():
    image, text, scale = torch.randn(6, 4), torch.randn(6, 4), torch.tensor(1.5)
    logits = scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    wanted = (F.cross_entropy(logits, torch.arange(6), label_smoothing=0.2)
              + F.cross_entropy(logits.T, torch.arange(6), label_smoothing=0.2)) / 2
    torch.testing.assert_close(clip_loss(image, text, scale, torch.arange(6), 0.2), wanted)


def test_rows_of_one_group_share_their_targets():
    image, text, scale = torch.randn(4, 5), torch.randn(4, 5), torch.tensor(0.7)
    logits = scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    rights = [(0, 2), (1,), (0, 2), (3,)]
    rows, columns = logits.log_softmax(1), logits.log_softmax(0)
    wanted = -sum((rows[i, j] + columns[j, i]) / len(right) for i, right in enumerate(rights) for j in right) / 8
    torch.testing.assert_close(clip_loss(image, text, scale, torch.tensor([7, 1, 7, 2])), wanted)


def test_weight_decay_falls_on_matrices_only(data):
    clip = starting_model(parse(ClipJob, "mm", options(data, Path("unused"))), read_pairs(str(data / "pairs.csv")))
    decayed, free = adamw(clip, Optim()).param_groups
    names = {id(parameter): name for name, parameter in clip.named_parameters()}
    kept = {names[id(parameter)] for parameter in free["params"]}
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0
    assert {"logit_scale", "text.tokens", "text.positions", "image.cls", "image.positions.weight"} <= kept
    assert all(name in kept for name in names.values() if name.endswith("bias") or "norm" in name)
    matrices = {names[id(parameter)] for parameter in decayed["params"]}
    assert {"image.patchify.weight", "image.head.proj.weight", "text.stack.blocks.0.mlp.down.weight"} <= matrices
    assert len(matrices) + len(kept) == len(names)


def test_warm_up_and_cosine():
    optim = Optim(warmup=4, final=0.1)
    assert [rate(step, 104, optim) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rate(4, 104, optim) == 1.0 and rate(54, 104, optim) == pytest.approx(0.55)
    assert rate(104, 104, optim) == rate(200, 104, optim) == pytest.approx(0.1)
    assert rate(0, 10, replace(optim, warmup=0)) == 1.0


def test_the_average_follows_quickly_at_first_and_slowly_later():
    average, module = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        average.weight.fill_(0.0)
        module.weight.fill_(1.0)
    update_average(average, module, 0.99, step=1)
    assert average.weight.item() == pytest.approx(0.9)
    update_average(average, module, 0.99, step=10_000)
    assert average.weight.item() == pytest.approx(0.901)
    update_average(average, module, 0.0, step=5)
    assert average.weight.item() == 1.0


def test_logit_scale_is_held_at_a_hundred(data, tmp_path):
    out = train(data, tmp_path / "run", "--trainer.max_steps", "10", "--shape.scale", "200")
    scales = read_log(out / "train.csv")["scale"]
    assert scales[0] == pytest.approx(200) and scales[1] == pytest.approx(100) and max(scales[1:]) < 100.01


def test_wordings_of_a_name_and_its_tags():
    captions, seen = ("smiling cat", "happy", "pet", "face"), []
    for seed in range(300):
        seen.append(word(captions, Words(name=0.5, tags=0.25), generator(seed)))
    alone = sum(text == "smiling cat" for text in seen) / 300
    tags = sum("smiling cat" not in text for text in seen) / 300
    assert 0.4 < alone < 0.6 and 0.15 < tags < 0.35
    assert any(text.startswith("pet smiling cat") for text in seen)
    assert max(len(text.split()) for text in seen) == 5
    assert {word(captions, None, generator(seed)) for seed in range(60)} == set(captions)
    dropped = [word(("one two three",), Words(drop=0.5), generator(seed)) for seed in range(50)]
    assert len(set(dropped)) > 4 and all(dropped)


def test_crops_lie_inside_and_keep_enough():
    areas = []
    for seed in range(200):
        left, upper, right, lower = crop_box(100, 50, 0.3, generator(seed))
        assert 0 <= left < right <= 100.0001 and 0 <= upper < lower <= 50.0001
        areas.append((right - left) * (lower - upper) / 5000)
    assert min(areas) > 0.25 and max(areas) > 0.85 and max(areas) <= 1.0001


def test_items_by_group(data):
    pairs = read_pairs(str(data / "pairs.csv"))
    groups = by_group(pairs)
    assert len(groups) == 8 and sorted(sum(groups, [])) == list(range(24))
    assert all(len({pairs.items[i].captions for i in members}) == 1 for members in groups)


def test_bpe_dropout_breaks_words_at_random_but_loses_nothing():
    tokenizer = train_bpe(["smiling cat with smiling eyes", "cats smile"] * 3, 600)
    texts = ["Smiling cat", "caf\u00e9 eyes!"]
    none, half, all_ = (LooseTokenizer(tokenizer, rate) for rate in (0.0, 0.5, 1.0))
    assert torch.equal(none(texts, 40, [generator(1), generator(2)]), tokenizer(texts, 40))
    first, again, other = (half(texts, 40, [generator(seed), generator(seed, 1)]) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert tokenizer.decode(first[0]) == tokenizer.decode(other[0]) == "smiling cat"
    letters = (all_(texts, 40, [generator(1), generator(2)]) != tokenizer.pad_id).sum(dim=1)
    assert letters.tolist() == [1 + len("smilingcat"), 1 + len("caf\u00e9eyes!".encode())]
    with pytest.raises(InputError, match="bpe_dropout"):
        LooseTokenizer(replace(tokenizer, pieces=none.pieces), 0.1)
