"""Fine-tuning parts of a CLIP and the losses of large batches: locks, LoRA, chunks, siglip, Matryoshka, and all at once
across a kill."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import CLIP_RUNS, options, shapes, train
from trial import same_weights, weights

from mm.encoders import CLIP
from mm.errors import InputError
from mm.nn.lora import Adapted
from mm.recipes import cli
from mm.recipes.clip.data import Batch
from mm.recipes.clip.fit import starting_model
from mm.recipes.clip.module import ClipRecipe
from mm.recipes.clip.pairs import read_pairs
from mm.recipes.clip.settings import ClipJob, Lock, Loss, TowerLora
from mm.recipes.common.command import parse
from mm.recipes.train.run import read_log
from mm.recipes.train.settings import Optim

EVERYTHING = ["--loss.kind", "siglip", "--loss.chunk", "4", "--loss.matryoshka", "[4, 8]", "--loss.positives", "group",
              "--lora", "{rank: 2, layers: [qkv, up]}", "--patch_dropout", "0.5", "--shape.text.dropout", "0.1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def model(data, tmp_path_factory) -> Path:
    """A small model that learned for 20 steps."""
    return train(data, tmp_path_factory.mktemp("model") / "run", "--trainer.max_steps", "20") / "model"


def a_recipe(data: Path, loss: Loss = Loss(), lock: Lock = Lock(), lora: TowerLora | None = None,  # noqa: B008
             *more: str) -> ClipRecipe:
    torch.manual_seed(0)
    job = parse(ClipJob, "mm", options(data, Path("unused"), "--loss.kind", loss.kind, *more))
    clip = starting_model(job, read_pairs(job.data.path))
    return ClipRecipe(clip.spec, Optim(), loss, 0, clip, lock, lora)


def a_batch(recipe: ClipRecipe, rows: int = 12) -> Batch:
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 500, (rows, 8), generator=random)
    return Batch(torch.randn(rows, 3, 16, 16, generator=random), ids, torch.arange(rows) // 2, [])


def gradients(recipe: ClipRecipe, batch: Batch, seeds: list[int] | None = None) -> dict[str, torch.Tensor]:
    recipe.zero_grad()
    torch.manual_seed(5)
    features = {name: recipe.encode(name, x) for name, x in batch.inputs().items()}
    recipe.objective(features, batch.group).backward()
    return {name: p.grad.clone() for name, p in recipe.clip.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------- everything at once
def test_a_killed_run_with_everything_on_goes_on_bit_for_bit(data, model, tmp_path):
    more = ["--model", str(model), "--trainer.max_steps", "80", *EVERYTHING]
    out = tmp_path / "killed"
    assert 0 < CLIP_RUNS.kill(data, out, *more) < 80
    train(data, out, *more)
    whole = train(data, tmp_path / "whole", *more)
    assert (out / "train.csv").read_text() == (whole / "train.csv").read_text()
    assert same_weights(out, whole)
    log = read_log(out / "train.csv")
    assert len(log["loss"]) == 80 and sum(log["loss"][-10:]) < sum(log["loss"][:10])
    clip = CLIP.from_pretrained(out / "model")
    assert clip.spec.logit_bias == -10.0 and clip.logit_bias.item() != -10.0
    assert not any(isinstance(layer, Adapted) for layer in clip.modules())


def test_two_processes_with_spread_weights_train_as_one_with_everything_on(data, model, tmp_path):
    more = ["--model", str(model), *EVERYTHING, "--patch_dropout", "0",
            "--lora.towers", "[image]"]
    still = CLIP.from_pretrained(model)
    image = still.spec.image
    stack = replace(image.stack, layers=tuple(replace(layer, drop_path=0.0) for layer in image.stack.layers))
    still.spec = replace(still.spec, image=replace(image, stack=stack))
    still.save_pretrained(tmp_path / "still")
    more[1] = str(tmp_path / "still")
    more += ["--shard", "true", "--data.val", str(data / "pairs.csv")]
    for steps in ("3", "6"):  # the second run goes on with the first
        argv = options(data, tmp_path / "two", *more, "--trainer.max_steps", steps, "--trainer.devices", "2")
        done = subprocess.run([sys.executable, "-m", "mm.recipes.cli", "train", "clip", *argv], capture_output=True,
                              timeout=300)
        assert done.returncode == 0, done.stderr.decode()
        train(data, tmp_path / "one", *more, "--trainer.max_steps", steps)
    two, one = (read_log(tmp_path / name / "train.csv") for name in ("two", "one"))
    assert two["step"] == list(range(1, 7))
    for name in ("loss", "gradient", "scale"):
        torch.testing.assert_close(torch.tensor(two[name]), torch.tensor(one[name]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------- locks
def test_a_locked_tower_keeps_still_and_costs_nothing(data, model, tmp_path):
    out = train(data, tmp_path / "lit", "--model", str(model), "--lock.image", "true", "--trainer.max_steps", "10")
    old, new = CLIP.from_pretrained(model).state_dict(), weights(out)
    assert all(torch.equal(new[name], value) for name, value in old.items() if name.startswith("image."))
    assert any(not torch.equal(new[name], value) for name, value in old.items() if name.startswith("text."))
    last = torch.load(out / "last.ckpt", weights_only=True)
    assert not any(".image." in name for name in last["state_dict"])
    trained = sum(p.numel() for name, p in old.items() if name.startswith("text.")) + 1
    assert json.loads((out / "metrics.json").read_text())["trained"] == trained
    moments = last["optimizer_states"][0]["state"].values()
    assert sum(state["exp_avg"].numel() for state in moments) == trained


def test_a_locked_tower_saves_no_activation_and_drops_nothing(data):
    recipe = a_recipe(data, lock=Lock(image=True))
    assert recipe.average.image.patchify.weight is recipe.clip.image.patchify.weight
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        features = recipe.encode("image", torch.randn(4, 3, 16, 16))
    assert not saved and not features.requires_grad
    pixels = torch.randn(4, 3, 16, 16)
    assert torch.equal(recipe.encode("image", pixels), recipe.encode("image", pixels))


def test_a_trained_image_tower_takes_the_place_of_a_new_one(data, model, tmp_path):
    old = CLIP.from_pretrained(model)
    old.image.save_pretrained(tmp_path / "vit")
    out = train(data, tmp_path / "run", "--shape.image_backbone", str(tmp_path / "vit"), "--lock.image", "0",
                "--shape.dim", "24", "--trainer.max_steps", "4")
    new = CLIP.from_pretrained(out / "model")
    assert new.spec.dim == 24 and new.preprocessing == old.preprocessing
    same = {name: torch.equal(value, new.image.state_dict()[name]) for name, value in old.image.state_dict().items()
            if not name.startswith("head.proj")}
    assert {name for name, kept in same.items() if not kept} == {"stack.final_norm.weight", "stack.final_norm.bias"}


def test_a_model_of_timm_is_an_image_tower(data, tmp_path):
    more = ["--shape.image_backbone", "resnet10t", "--trainer.max_steps", "2", "--data.batch_size", "4"]
    free, locked = (CLIP.from_pretrained(train(data, tmp_path / str(lock), *more, "--lock.image", str(lock)) / "model")
                    for lock in ("false", 0))
    assert free.spec.image.name == "resnet10t" and free.preprocessing.size == tuple(free.spec.image.image)
    still = a_recipe(data, Loss(), Lock(), None, *more).clip.state_dict()  # the same seed
    moved = {name for name, value in locked.state_dict().items() if not torch.equal(value, still[name])}
    assert not any("trunk" in name for name in moved) and "image.head.proj.weight" in moved
    means = {name for name, value in free.state_dict().items() if "running_mean" in name and bool(value.any())}
    assert means  # of batch norms, which the average takes over


def test_the_last_blocks_alone_train(data):
    recipe = a_recipe(data, Loss(), Lock(image=2), None, "--shape.image.depth", "3")
    trained = {name for name, p in recipe.clip.image.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in trained if name.startswith("stack.blocks")} == {"1", "2"}
    assert "head.proj.weight" in trained and "stack.final_norm.weight" in trained
    assert "patchify.weight" not in trained and "cls" not in trained
    assert set(gradients(recipe, a_batch(recipe))) > {f"image.{name}" for name in trained}


@pytest.mark.parametrize(("lock", "lora", "says"), [
    (Lock(image=9), None, "lock.image should leave 0 to 1 blocks, not 9"),
    (Lock(audio=True), None, "lock names the audio tower: the model has none"),
    (Lock(image=True, text=True), None, "lock leaves no tower that trains"),
    (Lock(image=1), TowerLora(), "leave out lock.image"),
    (Lock(), TowerLora(layers=("queries",)), "no linear layer is called 'queries'")])
def test_locks_that_cannot_be(data, lock, lora, says):
    with pytest.raises(InputError, match=says):
        a_recipe(data, lock=lock, lora=lora)


# ------------------------------------------------------------------------------------------------- LoRA
def test_lora_trains_little_is_merged_and_resumes(data, model, tmp_path):
    more = ["--model", str(model), "--lora.towers", "[text]", "--lock.image", "true", "--optim.ema", "0"]
    out = train(data, tmp_path / "lora", *more, "--trainer.max_steps", "10")
    old, new = CLIP.from_pretrained(model).state_dict(), weights(out)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert old.keys() == new.keys() and "text.stack.blocks.0.mixer.qkv.weight" in changed
    assert all(name.startswith("text.") and name.endswith("weight") for name in changed - {"logit_scale"})
    kept = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
    assert all(".lora." in name or "logit_scale" in name for name in kept)
    recipe = ClipRecipe.load_from_checkpoint(out / "last.ckpt", weights_only=True, clip=CLIP.from_pretrained(model))
    ids = torch.randint(0, 500, (3, 8))
    merged = CLIP.from_pretrained(out / "model")
    torch.testing.assert_close(recipe.average.eval().encode_text(ids), merged.encode_text(ids), atol=1e-6, rtol=1e-6)
    train(data, out, *more, "--trainer.max_steps", "15")
    assert read_log(out / "train.csv")["step"] == list(range(1, 16))
    with pytest.raises(InputError, match="leaves out the locked weights"):
        ClipRecipe.load_from_checkpoint(out / "last.ckpt", weights_only=True)


# ------------------------------------------------------------------------------------------------ losses
@pytest.mark.parametrize("loss", [Loss(), Loss(kind="siglip", matryoshka=(4, 8)), Loss(positives="group")],
                         ids=["softmax", "siglip matryoshka", "groups"])
def test_chunks_have_the_gradient_of_the_whole_batch(data, loss):
    """Without dropout it is the plain gradient; with it, that of the very features that the chunks gave."""
    recipe = a_recipe(data, loss, Lock(), None, "--shape.image.drop_path", "0", "--patch_dropout", "0")
    batch = a_batch(recipe)
    whole = gradients(recipe, batch)
    recipe.loss = replace(loss, chunk=5)
    chunked = gradients(recipe, batch)
    assert whole.keys() == chunked.keys() and "logit_scale" in whole
    assert ("logit_bias" in whole) == (loss.kind == "siglip")
    for name, value in whole.items():
        torch.testing.assert_close(chunked[name], value, atol=1e-5, rtol=1e-5, msg=name)


def test_chunks_replay_what_was_dropped(data):
    """The reference keeps every chunk's graph, so nothing has to be replayed."""
    recipe = a_recipe(data, Loss(chunk=5), Lock(), None, "--patch_dropout", "0.5", "--shape.text.dropout", "0.2")
    batch = a_batch(recipe)
    chunked = gradients(recipe, batch)
    recipe.zero_grad()
    torch.manual_seed(5)
    features = {name: torch.cat([getattr(recipe.clip, f"encode_{name}")(part) for part in x.split(5)])
                for name, x in batch.inputs().items()}
    recipe.objective(features, batch.group).backward()
    for name, p in recipe.clip.named_parameters():
        torch.testing.assert_close(chunked[name], p.grad, atol=1e-5, rtol=1e-5, msg=name)


def test_a_new_siglip_starts_at_ten_and_minus_ten(data, tmp_path):
    out = train(data, tmp_path / "run", "--loss.kind", "siglip", "--trainer.max_steps", "40", "--loss.positives",
                "group")
    log = read_log(out / "train.csv")
    assert log["scale"][0] == pytest.approx(10.0) and log["loss"][-1] < 0.8 * log["loss"][0]
    assert weights(out)["logit_bias"].item() != -10.0


def test_equal_captions_in_a_batch_are_told_or_right_answers(data, tmp_path, capsys):
    told = train(data, tmp_path / "pair", "--trainer.max_steps", "4")
    said = capsys.readouterr().err
    assert json.loads((told / "metrics.json").read_text())["repeated_captions"] > 3
    assert "rows of a batch, which count as wrong answers to each other" in said
    assert "captions stood more than once in a batch" in said
    grouped = train(data, tmp_path / "group", "--trainer.max_steps", "4", "--loss.positives", "group")
    assert json.loads((grouped / "metrics.json").read_text())["repeated_captions"] == 0
    apart, together = (read_log(out / "train.csv")["loss"][0] for out in (told, grouped))
    assert apart != pytest.approx(together)


@pytest.mark.parametrize(("argv", "says"), [
    (["--data.batch_size", "1"], "a contrastive loss compares the rows of a batch and needs two"),
    (["--loss.matryoshka", "[16]"], "loss.matryoshka 16: expected 1 to 15 of the model's 16 dimensions"),
    (["--loss.kind", "siglip", "--loss.smoothing", "0.1"], "loss.smoothing belongs to the softmax loss"),
    (["--loss.chunk", "0"], "loss.chunk must be at least 1"),
    (["--lora.towers", "[video]"], "some of image, text and audio, not video"),
    (["--patch_dropout", "1.0"], "patch_dropout must lie in"),
    (["--shape.scale", "-1"], "shape.scale must be positive")])
def test_wrong_settings_are_one_sentence(data, tmp_path, argv, says, capsys):
    assert cli.main(["train", "clip", *options(data, tmp_path / "run", *argv)]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_help_tells_what_the_docstrings_tell(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "clip", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "rows that go through the towers at a time" in said and "true locks the whole tower (LiT)" in said
    assert "folder, .tar shards or emojicross" in said
