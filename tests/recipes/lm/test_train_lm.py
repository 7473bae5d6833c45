"""Training a language model: it learns, resumes exactly after a kill, goes on from checkpoints, and stops in one
sentence."""

from __future__ import annotations

import csv
import json
import math
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from trial import Trial, same_weights, weights

from mm import TextDecoder
from mm.errors import InputError
from mm.nn.balance import balance_loss, z_loss
from mm.recipes import cli
from mm.recipes.lm.module import LmRecipe, losses
from mm.recipes.lm.objectives import NONE, LmBatch, SpanBatch
from mm.recipes.lm.settings import LmExperts, LmLoss, LmOptim, LmShape
from mm.recipes.lm.start import new_decoder, new_encoder, new_seq2seq
from mm.recipes.train.optim import rate
from mm.recipes.train.run import WholeFiles, read_log
from mm.recipes.train.settings import Optim
from mm.recipes.train.watch import Watch
from mm.text.encoder import TextEncoder
from mm.text.seq2seq import Seq2Seq

CONFIG = """
shape: {width: 32, depth: 2, heads: 4, kv_heads: 2, dropout: 0.1}
data: {vocab: 320, length: 24, batch_size: 8, holdout: 0.1, split: line}
loss: {z_loss: 0.0001}
optim: {kind: muon, lr: 0.01, warmup: 5, ema: 0.9, schedule: wsd}
trainer: {max_steps: 40, save: 10, evaluate: 20, log: 5, threads: 1, accelerator: cpu}
"""
RUNS = Trial("lm", "texts.txt")
options, train = RUNS.options, RUNS.train
ANIMALS = ("cat", "dog", "hen", "cow", "pig")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Sentences of which the last word follows from the first, and conversations."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [f"the {a} and the {b} see a {a} number {i % 7}" for i in range(20) for a in ANIMALS for b in ANIMALS]
    (folder / "texts.txt").write_text("\n".join(lines))
    talks = [[{"role": "user", "content": f"who is {i}?"}, {"role": "assistant", "content": f"{i} is a {a}"}]
             for i in range(20) for a in ANIMALS]
    (folder / "talks.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    (folder / "config.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    return train(data, tmp_path_factory.mktemp("runs") / "whole", "--trainer.max_steps", "60")


def rows(path: Path) -> list[dict[str, str]]:
    """What a log says, but for the speed."""
    with open(path, newline="") as file:
        return [{name: value for name, value in row.items() if name != "tokens/s"} for row in csv.DictReader(file)]


# ------------------------------------------------------------------------------------------------- runs
def same(out: Path, whole: Path) -> None:
    """Both runs had the same steps and made the same model."""
    assert rows(out / "train.csv") == rows(whole / "train.csv") and len(rows(out / "train.csv")) == 60
    assert (out / "validation.csv").read_text() == (whole / "validation.csv").read_text()
    assert same_weights(out, whole)


def test_a_killed_run_goes_on_bit_for_bit(data, whole, tmp_path):
    out = tmp_path / "killed"
    assert 0 < RUNS.kill(data, out, "--trainer.max_steps", "60") < 60 and not (out / "model").exists()
    train(data, out, "--trainer.max_steps", "60")
    same(out, whole)


def test_a_run_that_is_told_to_end_saves_first(data, whole, tmp_path, monkeypatch, capsys):
    out, take = tmp_path / "told", Watch.take

    def told(watch: Watch, notes: list) -> None:
        if len(watch.rows) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(Watch, "take", told)
    with pytest.raises(SystemExit) as ended:
        train(data, out, "--trainer.max_steps", "60")
    assert ended.value.code == 128 + signal.SIGTERM and "goes on from step 3" in capsys.readouterr().err
    monkeypatch.setattr(Watch, "take", take)
    train(data, out, "--trainer.max_steps", "60")
    same(out, whole)


def test_a_run_learns_and_leaves_metrics_and_a_model_that_writes(data, whole, capsys):
    log, metrics = read_log(whole / "train.csv"), json.loads((whole / "metrics.json").read_text())
    assert log["perplexity"][0] > 250 and log["perplexity"][-1] < 8 and min(log["tokens/s"]) > 0
    assert metrics["validation"]["perplexity"] == pytest.approx(math.exp(metrics["validation"]["cross-entropy"]))
    assert metrics["validation"]["perplexity"] < 8 and 256 < metrics["vocabulary"] <= 320
    assert cli.main(["generate", str(whole / "model"), "the cat and the", "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("the cat and the ")
    recipe, model = LmRecipe.load_from_checkpoint(whole / "last.ckpt", weights_only=True), weights(whole)
    assert all(torch.equal(value, model[name]) for name, value in recipe.average.state_dict().items())


def test_what_was_trained_opens_in_transformers(whole, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = TextDecoder.from_pretrained(whole / "model")
    ours.save_pretrained(tmp_path / "hf", layout="hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "hf")("the pig and the hen", return_tensors="pt").input_ids
    assert ids[0].tolist() == [*ours.tokenizer.prefix, *ours.tokenizer.encode("the pig and the hen")]
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("argv", "kind", "name"), [
    (["--objective", "masked", "--data.share", "0.4"], TextEncoder, "AutoModelForMaskedLM"),
    (["--objective", "spans", "--data.vocab", "420"], Seq2Seq, "AutoModelForSeq2SeqLM"),
    (["--shape.qk_norm", "true", "--shape.experts", "{count: 4, mlp: 0.5}"], TextDecoder, "AutoModelForCausalLM")])
def test_other_objectives_and_experts_learn_and_open_in_transformers(argv, kind, name, data, tmp_path):
    import transformers

    plain = ["--shape.kv_heads", "null"] if "--objective" in argv else []
    out = train(data, tmp_path / "run", *plain, *argv, "--trainer.max_steps", "30", "--trainer.evaluate", "15")
    log = read_log(out / "validation.csv")["perplexity"]
    assert log[-1] < 0.6 * read_log(out / "train.csv")["perplexity"][0]
    ours = kind.from_pretrained(out / "model")
    ours.save_pretrained(tmp_path / "hf", layout="hf")
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "hf").eval()
    ids = torch.randint(4, 250, (2, 9))
    if kind is Seq2Seq:
        mine, other = ours(ids, ids), theirs(input_ids=ids, decoder_input_ids=ids).logits
    else:
        mine, other = ours.logits(ours(ids)) if kind is TextEncoder else ours(ids), theirs(ids).logits
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


def test_corrections_keep_experts_busy_and_resume(data, tmp_path):
    argv = ["--shape.experts", "{count: 4, mlp: 0.5, correction: true}", "--loss.balance", "0", "--trainer.max_steps"]
    out = train(data, tmp_path / "run", *argv, "10")
    moved = weights(out)["stack.blocks.0.mlp.router.correction"]
    assert moved.abs().max() <= 0.0101 and moved.unique().numel() > 1
    train(data, out, *argv, "12")
    assert len(read_log(out / "train.csv")["loss"]) == 12


def test_a_checkpoint_is_fine_tuned_on_answers_alone(data, whole, tmp_path):
    talker = train(data, tmp_path / "talker", "--data.path", str(data / "talks.jsonl"), "--trainer.max_steps", "2")
    more = ["--model", str(talker / "model"), "--trainer.max_steps", "3", "--optim.warmup", "0"]
    out = train(data, tmp_path / "tuned", *more, "--data.path", str(data / "talks.jsonl"))
    assert weights(out).keys() == weights(talker).keys()
    assert any(not torch.equal(value, weights(talker)[name]) for name, value in weights(out).items())
    assert (out / "model" / "tokenizer.json").read_text() == (talker / "model" / "tokenizer.json").read_text()
    with pytest.raises(InputError, match="the model has no chat template"):
        train(data, tmp_path / "no", "--model", str(whole / "model"), "--data.path", str(data / "talks.jsonl"))


def test_low_rank_changes_alone_train_and_are_merged(data, whole, tmp_path):
    more = ["--model", str(whole / "model"), "--lora.rank", "2", "--optim.kind", "adamw", "--trainer.max_steps", "4"]
    out = train(data, tmp_path / "lora", *more, "--lora.layers", "[qkv,mlp.down]")
    old, new = weights(whole), weights(out)
    moved = {name.split(".", 3)[3] for name in old if not torch.equal(old[name], new[name])}
    assert old.keys() == new.keys() and moved == {"mixer.qkv.weight", "mlp.down.weight"}
    kept = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
    assert kept and all(".lora." in name for name in kept)
    train(data, out, *more, "--lora.layers", "[qkv,mlp.down]", "--trainer.max_steps", "6")
    assert len(read_log(out / "train.csv")["loss"]) == 6


def test_recomputed_activations_change_nothing(data, tmp_path):
    few = ["--trainer.max_steps", "3"]
    runs = [train(data, tmp_path / str(every), *few, "--checkpointing", str(every)) for every in (0, 1)]
    assert rows(runs[0] / "train.csv") == rows(runs[1] / "train.csv")


@pytest.mark.full
def test_compiled_blocks_give_the_same_losses(data, tmp_path):
    few = ["--trainer.max_steps", "3", "--shape.dropout", "0"]
    runs = [train(data, tmp_path / flag, *few, "--compile", flag) for flag in ("false", "true")]
    first, second = (read_log(run / "train.csv")["loss"] for run in runs)
    assert second == pytest.approx(first, abs=1e-5)


# ----------------------------------------------------------------------------------------------- losses
def test_packed_documents_do_not_see_each_other():
    model = TextDecoder(new_decoder(LmShape(width=32, depth=2, heads=4), 50, 20))
    ids, documents = torch.randint(50, (1, 20)), torch.tensor([[7] * 8 + [3] * 9 + [-1] * 3])
    targets = torch.cat([ids[:, 1:8], torch.full((1, 1), NONE), ids[:, 9:17], torch.full((1, 4), NONE)], 1)
    loss, entropy = losses(model, LmBatch(ids, targets, documents), LmLoss(z_loss=0.01, rows=3))
    apart = [model(ids[:, start:stop])[0, :-1] for start, stop in ((0, 8), (8, 17))]
    logits, wanted = torch.cat(apart), torch.cat([ids[0, 1:8], ids[0, 9:17]])
    expected = torch.nn.functional.cross_entropy(logits, wanted)
    torch.testing.assert_close(entropy, expected)
    torch.testing.assert_close(loss, expected + 0.01 * logits.logsumexp(-1).square().mean())


def test_an_encoder_is_scored_where_tokens_are_masked():
    model = TextEncoder(new_encoder(LmShape(width=32, depth=2, heads=4), 50, 20))
    ids, documents = torch.randint(50, (2, 9)), torch.tensor([[0] * 4 + [1] * 5, [2] * 7 + [-1] * 2])
    targets = torch.full((2, 9), NONE)
    targets[0, 2], targets[1, 6] = 5, 8
    _, entropy = losses(model, LmBatch(ids, targets, documents), LmLoss())
    logits = torch.stack([model.logits(model(ids[:1, :4]))[0, 2], model.logits(model(ids[1:, :7]))[0, 6]])
    torch.testing.assert_close(entropy, torch.nn.functional.cross_entropy(logits, torch.tensor([5, 8])))


def test_an_answer_reads_the_source_of_its_own_document():
    model = Seq2Seq(new_seq2seq(LmShape(width=32, depth=2, heads=4), 50, 20, 0, 1))
    ids, inputs, targets = torch.randint(50, (1, 9)), torch.randint(50, (1, 7)), torch.randint(50, (1, 7))
    targets[0, 3] = NONE
    batch = SpanBatch(ids, torch.tensor([[4] * 5 + [6] * 4]), inputs, targets, torch.tensor([[4] * 3 + [6] * 3 + [-1]]))
    targets[0, 6] = NONE
    _, entropy = losses(model, batch, LmLoss())
    logits = torch.cat([model(ids[:, :5], inputs[:, :3])[0], model(ids[:, 5:], inputs[:, 3:6])[0]])
    torch.testing.assert_close(entropy, torch.nn.functional.cross_entropy(logits, targets[0, :6]))


def test_experts_add_their_balance_to_the_loss():
    model = TextDecoder(new_decoder(LmShape(width=32, depth=2, heads=4, experts=LmExperts(count=4)), 50, 20))
    recipe = LmRecipe(model.spec, LmOptim(), LmLoss(balance=0.5, router_z_loss=0.1), module=model)
    recipe.total = lambda x: x.detach()
    routes, batch = [], LmBatch(torch.randint(50, (2, 8)), torch.randint(50, (2, 8)), torch.zeros(2, 8).long())
    losses(model, batch, recipe.loss, routes)
    expected = sum(0.5 * balance_loss(route) + 0.1 * z_loss(route) for route in routes) / 2
    torch.testing.assert_close(recipe.routing(routes, batch.documents >= 0), expected)
    assert [load.sum().item() for load in recipe.loads] == [32, 32]


def test_a_learning_rate_stays_and_then_falls():
    optim = Optim(warmup=10, schedule="wsd", decay=0.25, final=0.1)
    assert [rate(step, 100, optim) for step in (0, 9, 50, 75)] == [0.1, 1.0, 1.0, 1.0]
    assert rate(80, 100, optim) == pytest.approx(0.82) and rate(100, 100, optim) == pytest.approx(0.1)


# ------------------------------------------------------------------------------------------- bad input
def test_a_loss_that_is_not_finite_names_step_documents_and_checkpoint(data, tmp_path, capsys):
    out, argv = tmp_path / "run", ["--optim.kind", "adamw", "--optim.clip", "0"]
    train(data, out, *argv, "--trainer.max_steps", "10")
    kept = torch.load(out / "last.ckpt", weights_only=True)
    for name, value in kept["state_dict"].items():
        if name == "module.embed.tokens.weight":
            value[:] = math.inf
    torch.save(kept, out / "last.ckpt")
    assert cli.main(["train", "lm", *options(data, out, *argv, "--trainer.max_steps", "20")]) == 2
    said = capsys.readouterr().err
    assert "the loss is nan at step 11, in a batch of the documents at " in said
    assert "texts.txt, line " in said and f"{out / 'last.ckpt'} holds step 10" in said and "Traceback" not in said


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
    path, files = tmp_path / "last.ckpt", WholeFiles()
    files.save_checkpoint({"step": 1}, path)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(InputError, match=r"written \(File too large\); the previous one is still there"):
            files.save_checkpoint({"weights": torch.randn(1 << 18)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.load(path, weights_only=True) == {"step": 1} and [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(("argv", "says"), [
    (["--shape.heads", "5"], "shape.width 32 does not give 5 heads of one even width"),
    (["--shape.kv_heads", "3"], "shape.heads 4 cannot share 3 key/value heads"),
    (["--optim.decay", "0"], "optim.decay must lie in (0, 1]"),
    (["--checkpointing", "-1"], "checkpointing must not be negative"),
    (["--loss.rows", "0"], "loss.rows must be at least 1"),
    (["--objective", "guess"], "objective"),
    (["--tensor", "2"], "trainer.devices 1 is no multiple of tensor 2"),
    (["--shape.experts.chosen", "9"], "shape.experts.chosen should be 1 to 8"),
    (["--objective", "masked"], "shape.qk_norm, kv_heads and experts belong to decoders"),
    (["--model", "nowhere/at/all"], "nowhere/at/all is not a directory with a checkpoint"),
    (["--data.path", "nowhere"], "nowhere does not exist"),
    (["--lora.rank", "0"], "LoRA needs a positive rank")])
def test_wrong_settings_are_one_sentence(argv, says, data, tmp_path, capsys):
    assert cli.main(["train", "lm", *options(data, tmp_path / "o", *argv)]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("mm: ") == 1
