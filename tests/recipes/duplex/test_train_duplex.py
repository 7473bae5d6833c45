"""Training a duplex model: it learns, resumes exactly, goes on from checkpoints, and stops in one sentence."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import codec
import duplex
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from mm import DuplexLM, spec
from mm.codecs import Mimi
from mm.codecs.file import Header, Writer
from mm.errors import InputError
from mm.recipes.cli import main
from mm.recipes.common.command import parse
from mm.recipes.data.dialogues import (
    Codes,
    Dialogue,
    Packed,
    check_conditions,
    encode_all,
    read_dialogues,
    read_manifest,
)
from mm.recipes.data.sampler import Order
from mm.recipes.duplex.data import Batches, Drilled, DuplexModule, batch_of
from mm.recipes.duplex.fit import fit, keep_codec, new_spec, prepare
from mm.recipes.duplex.loss import losses, losses_of
from mm.recipes.duplex.module import vectors_of
from mm.recipes.duplex.settings import DuplexData, DuplexJob, DuplexLoss, DuplexShape
from mm.recipes.talk.codec_of import Note
from mm.recipes.talk.partner import Partner
from mm.recipes.weights import codec_small
from mm.tokenizer.tokenizer import load_tokenizer, train_bpe

CONFIG = """
shape: {width: 32, depth: 2, heads: 2, deep_width: 16, deep_depth: 1, deep_heads: 1, sets: 2, context: 12, rank: 8}
data: {length: 20, batch_size: 4, holdout: 0.1}
optim: {lr: 0.01, warmup: 5, ema: 0.9}
trainer: {max_steps: 40, save: 10, evaluate: 20, log: 5, threads: 1, accelerator: cpu}
"""
OWN, HEARD, CARD = 3, 2, 16
WORDS = ("one", "two", "three")


def write_codes(path: Path, codes: torch.Tensor, **changes) -> None:
    header = Header(**{"model": "m", "weights": "w", "rate": 24000, "frame": 1920, "channels": 1,
                       "codebooks": len(codes), "size": CARD, **changes})
    with open(path, "wb") as file:
        writer = Writer(file, header)
        writer.write(codes)
        writer.finish(codes.shape[1] * 1920)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Conversations in which the model says, two frames later, the code it hears, and its number as a word."""
    folder = tmp_path_factory.mktemp("talks")
    train_bpe([" ".join(WORDS)] * 9, 520).save(folder / "tokenizer")
    draw, lines = torch.Generator().manual_seed(0), []
    for i in range(40):
        frames = int(torch.randint(15, 30, (1,), generator=draw))
        heard = torch.randint(3, (1, frames), generator=draw)
        own = torch.cat([torch.zeros(1, 2, dtype=torch.long), heard[:, :-2]], 1)
        write_codes(folder / f"{i}.heard.mimi", heard.expand(HEARD, -1))
        write_codes(folder / f"{i}.own.mimi", torch.cat([own, own + 3, own + 6]))
        words = [[WORDS[int(own[0, t])], [t * 0.08 + 0.01, t * 0.08 + 0.05], "SPEAKER_MAIN"]
                 for t in range(3, frames, 6)]
        (folder / f"{i}.json").write_text(json.dumps({"alignments": words}))
        lines.append({"own": f"{i}.own.mimi", "heard": f"{i}.heard.mimi", "alignments": f"{i}.json"})
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def options(data: Path, out: Path, *more: str) -> list[str]:
    return ["--config", str(data / "config.yaml"), "--data.path", str(data / "talks.jsonl"), "--data.tokenizer",
            str(data / "tokenizer"), "--out", str(out), *more]


def train(data: Path, out: Path, *more: str) -> Path:
    fit(parse(DuplexJob, "mm train duplex", options(data, out, *more)))
    return out


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    return train(data, tmp_path_factory.mktemp("runs") / "whole", "--trainer.max_steps", "60")


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return [{name: value for name, value in row.items() if name != "frames/s"} for row in csv.DictReader(file)]


def test_it_learns_to_say_what_it_hears_and_tells_how_well(whole):
    log = rows(whole / "train.csv")
    first, last = (sum(float(row["loss"]) for row in part) / 5 for part in (log[:5], log[-5:]))
    assert last < first / 2 and float(log[-1]["right"]) > 0.6
    held = rows(whole / "validation.csv")[-1]
    assert float(held["codebook 1 right"]) > 0.6 and float(held["perplexity"]) < 60
    model = DuplexLM.from_pretrained(whole / "model")
    assert model.tokenizer is not None and model.spec.depth.weights == (0, 1, 1)
    state = model.init_state(1)
    heard = torch.randint(3, (1, HEARD, 30))[:, :1].expand(-1, HEARD, -1)
    said = torch.stack([model.step(heard[..., t], state).written[0, 1] for t in range(30)])
    # step t is given frame t - 1 and says frame t, which is the code of frame t - 2
    assert (said[2:] == heard[0, 0, 1:29]).float().mean() > 0.6


def test_a_killed_run_goes_on_bit_for_bit(data, whole, tmp_path):
    out = tmp_path / "killed"
    argv = options(data, out, "--trainer.max_steps", "60")
    run = subprocess.Popen([sys.executable, "-m", "mm.recipes.cli", "train", "duplex", *argv], stderr=subprocess.PIPE)
    while not (out / "last.ckpt").exists() or len((out / "train.csv").read_text().splitlines()) % 10 < 4:
        assert run.poll() is None, run.stderr.read().decode()
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert 0 < torch.load(out / "last.ckpt", weights_only=True)["global_step"] < 60 and not (out / "model").exists()
    train(data, out, "--trainer.max_steps", "60")
    assert rows(out / "train.csv") == rows(whole / "train.csv")
    assert (out / "validation.csv").read_text() == (whole / "validation.csv").read_text()
    ours, wanted = (load_file(folder / "model/model.safetensors") for folder in (out, whole))
    assert all(torch.equal(value, wanted[name]) for name, value in ours.items())


def test_low_rank_changes_of_a_checkpoint_train_alone(data, whole, tmp_path):
    out = train(data, tmp_path / "lora", "--model", str(whole / "model"), "--lora.rank", "2", "--trainer.max_steps",
                "10")
    before, after = (load_file(folder / "model/model.safetensors") for folder in (whole, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "depth.stack.blocks.0.mixer.qkv.weight" in changed and "stack.blocks.1.mlp.up.weight" in changed
    assert "codes.weight" not in changed and "stack.final_norm.weight" not in changed
    held = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
    assert not any(name.endswith("codes.weight") for name in held)


@torch.no_grad()
def test_the_official_package_reads_what_was_trained(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_TORCH_COMPILE", "1")
    loaders = pytest.importorskip("moshi.models.loaders", reason="the official package")
    model = DuplexLM.from_pretrained(whole / "model")
    model.save_pretrained(tmp_path, layout="kyutai")
    told = json.loads((tmp_path / "config.json").read_text())
    theirs = loaders.get_moshi_lm(tmp_path / told.pop("moshi_name"), told, dtype=torch.float32)
    codes = duplex.random_codes(model, 2, 20)
    made, wanted = model(codes), theirs(codes)
    torch.testing.assert_close(made.text, wanted.text_logits[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.audio, wanted.logits, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_what_is_written_talks_with_the_codec_that_it_was_trained_with(data, whole, tmp_path):
    """Sound files are encoded by it, and a codec of one's own is kept beside the model; weights at half their size."""
    draw, model, lines = np.random.default_rng(0), codec.small(), []
    model.save_pretrained(tmp_path / "mimi")
    for i in range(3):
        wave = 0.1 * draw.normal(size=(model.spec.frame * 30, 2))
        soundfile.write(tmp_path / f"{i}.wav", wave, model.spec.rate, subtype="FLOAT")
        (tmp_path / f"{i}.json").write_text('{"alignments": [["one", [0.1, 0.2], "SPEAKER_MAIN"]]}')
        lines.append(json.dumps({"path": f"{i}.wav"}))
    talks = str(tmp_path / "talks.jsonl")
    Path(talks).write_text("\n".join(lines))
    turn = {"kind": "greeting", "expect": "hello", "asked": [0.05, 0.1]}
    (tmp_path / "1.json").write_text(json.dumps({"alignments": [], "turns": [turn]}))  # held by itself, when evaluated
    told = ("--data.path", talks, "--data.val", talks, "--data.codec", str(tmp_path / "mimi"))
    out = train(data, tmp_path / "run", *told, "--trainer.max_steps", "2", "--export.dtype", "float16")
    measured = json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)["validation"]
    assert measured["written right"] == 0 and 0 <= measured["silence kept"] <= 100 and "median delay" in measured
    assert [float(measured[name]) for name in ("overlap", "loss")] == [
        pytest.approx(float(rows(out / "validation.csv")[-1][name])) for name in ("overlap", "loss")]
    partner = Partner.open(str(out / "model"))
    assert partner.model.tokenizer is not None and partner.model.head.weight.dtype == torch.float32
    assert partner.codec.fingerprint() == Codes(tmp_path, str(tmp_path / "mimi"), 3, 2).opened().fingerprint()
    parameters = sum(p.numel() for p in partner.model.parameters())
    assert (out / "model" / "model.safetensors").stat().st_size < 2 * parameters + 8000
    torch.manual_seed(1)
    codec.small().save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="they do not belong together"):
        Partner.open(str(out / "model"), str(tmp_path / "other"))
    again = ("--model", str(out / "model"), "--trainer.max_steps", "1")
    assert (train(data, tmp_path / "more", *told, *again) / "model" / "codec").is_dir()
    with pytest.raises(InputError, match="encoded by a codec of other weights than .*run.model was trained with"):
        train(data, tmp_path / "other_run", *told, *again, "--data.codec", str(tmp_path / "other"))
    assert json.loads((whole / "model" / "config.json").read_text())["generation"] == {"codec_config": {
        "name": None, "weights": "w", "frame_rate": 12.5}}


def test_a_model_says_how_it_is_to_speak(data, whole, tmp_path):
    def told(out: Path) -> dict:
        return json.loads((out / "model" / "config.json").read_text())["generation"].get("lm_gen_config")
    still = ["--trainer.max_steps", "1"]
    first = train(data, tmp_path / "first", "--export.temp", "0", "--export.temp_text", "0.5", *still)
    again = train(data, tmp_path / "again", "--model", str(first / "model"), "--export.temp_text", "0", *still)
    assert told(whole) is None and told(first) == {"temp": 0, "temp_text": 0.5} and told(again) == {
        "temp": 0, "temp_text": 0}
    with pytest.raises(InputError, match="export.temp must be 0 or more, not -1"):
        train(data, tmp_path / "bad", "--export.temp", "-1")


@pytest.fixture
def sounds(tmp_path) -> tuple[str, ...]:
    """Options of a run whose conversations are sound files, and whose model hears the vectors of their codec."""
    model, draw = codec.small(), np.random.default_rng(0)
    model.save_pretrained(tmp_path / "mimi")
    for i in range(4):
        wave = 0.1 * draw.normal(size=(model.spec.frame * 30, 2))
        soundfile.write(tmp_path / f"{i}.wav", wave, model.spec.rate, subtype="FLOAT")
        (tmp_path / f"{i}.json").write_text('{"alignments": [["one", [0.1, 0.2], "SPEAKER_MAIN"]]}')
    (tmp_path / "talks.jsonl").write_text("\n".join(json.dumps({"path": f"{i}.wav"}) for i in range(4)))
    return ("--data.path", str(tmp_path / "talks.jsonl"), "--data.codec", str(tmp_path / "mimi"), "--data.cache",
            str(tmp_path / "codes"), "--shape.hears", "vectors", "--shape.own", "3", "--shape.heard", "2")


def test_codes_may_be_heard_as_the_vectors_they_stand_for(data, sounds, tmp_path):
    """What is left is a plain model; of what it hears, each table is a projection of the codec's vectors, which went
    on where the run was stopped."""
    for steps in ("3", "6"):
        out = train(data, tmp_path / "stopped", *sounds, "--trainer.max_steps", steps)
    whole = train(data, tmp_path / "run", *sounds, "--trainer.max_steps", "6")
    assert rows(out / "train.csv") == rows(whole / "train.csv")
    model, mimi = DuplexLM.from_pretrained(whole / "model"), Mimi.from_pretrained(tmp_path / "mimi")
    begun = prepare(parse(DuplexJob, "mm train duplex", options(data, tmp_path / "new", *sounds)))[0]
    vectors, tables = vectors_of(mimi, 2), model.codes.weight.detach()
    assert tables.shape == (5, mimi.spec.quantizer.size + 1, 32) and tables.shape == begun.codes.weight.shape
    for k in (0, 1):
        table, before = tables[3 + k, :-1], begun.codes.weight[3 + k, :-1].detach()
        projection = torch.linalg.lstsq(vectors[k], table).solution
        torch.testing.assert_close(vectors[k] @ projection, table, atol=1e-5, rtol=0)
        assert (table - before).abs().max() > 0.01
    assert (tables - begun.codes.weight).abs().amax(2)[:3].max() > 0.01  # of its own voice


def test_vectors_of_a_codec_that_is_not_there_cannot_be_heard(data, sounds, tmp_path):
    with pytest.raises(InputError, match="shape.hears vectors needs data.codec"):
        train(data, tmp_path / "run", "--shape.hears", "vectors")
    with pytest.raises(InputError, match="talks.jsonl was encoded by a codec of other weights than data.codec"):
        train(data, tmp_path / "run", "--shape.hears", "vectors", "--data.codec", str(tmp_path / "mimi"))


@pytest.mark.full
@pytest.mark.parametrize("spread", ["true", "false"])
def test_two_processes_give_the_losses_of_one(data, whole, tmp_path, spread):
    """Spread weights (FSDP2) and a copy on each (DDP)."""
    argv = options(data, tmp_path / "two", "--trainer.max_steps", "60", "--trainer.devices", "2", "--shard", spread)
    subprocess.run([sys.executable, "-m", "mm.recipes.cli", "train", "duplex", *argv], check=True, capture_output=True)
    for name, column in (("train.csv", "loss"), ("train.csv", "gradient"), ("validation.csv", "perplexity")):
        one, two = ([float(row[column]) for row in rows(folder / name)][:8] for folder in (whole, tmp_path / "two"))
        assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("spread", ["true", "false"])
def test_two_processes_hear_vectors_as_one_does(data, sounds, tmp_path, spread):
    argv = [*sounds, "--trainer.max_steps", "6", "--data.batch_size", "2"]
    one = train(data, tmp_path / "one", *argv)
    argv = options(data, tmp_path / "two", *argv, "--trainer.devices", "2", "--shard", spread)
    subprocess.run([sys.executable, "-m", "mm.recipes.cli", "train", "duplex", *argv], check=True, capture_output=True)
    wanted, found = ([float(row["loss"]) for row in rows(run / "train.csv")] for run in (one, tmp_path / "two"))
    assert found == pytest.approx(wanted, rel=1e-4)
    wanted, found = (load_file(run / "model" / "model.safetensors") for run in (one, tmp_path / "two"))
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=0)


@pytest.mark.full
def test_compiled_blocks_give_the_same_losses(data, whole, tmp_path):
    out = train(data, tmp_path / "run", "--trainer.max_steps", "3", "--compile", "true")
    wanted, found = ([float(row["loss"]) for row in rows(run / "train.csv")][:3] for run in (whole, out))
    assert found == pytest.approx(wanted, abs=1e-4)


def test_every_option_says_what_it_is(capsys):
    with pytest.raises(SystemExit):
        main(["train", "duplex", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert re.findall(r"(--[\w.]+) \S+ \(type", said) == [] and "(*, " not in said
    assert "--shape.heads HEADS query heads of the temporal stack." in said  # one of several that share a sentence
    assert "--optim.beta1 BETA1 AdamW's decay of the mean of gradients." in said  # of the class that it inherits from


# ------------------------------------------------------------------------------------------------- data
@pytest.mark.parametrize("name", ["heads", "deep_heads", "kv_heads", "depth", "sets"])
def test_a_shape_has_some_of_everything(name):
    with pytest.raises(InputError, match=f"shape.{name} must be at least 1, not 0"):
        DuplexShape(**{name: 0})


def test_a_model_may_say_and_hear_fewer_codebooks_than_there_are(data, tmp_path):
    out = train(data, tmp_path / "few", "--shape.own", "2", "--shape.heard", "1", "--loss.depth", "0.5",
                "--trainer.max_steps", "2")
    model = DuplexLM.from_pretrained(out / "model")
    assert (model.spec.own, model.spec.heard) == (2, 1)


def test_conversations_are_read_once(data, tmp_path):
    words, settings = load_tokenizer(data / "tokenizer"), DuplexData(path=str(data / "talks.jsonl"))
    module = DuplexModule(settings, new_spec(DuplexShape(), words, OWN, HEARD, CARD), words, 0, tmp_path)
    module.setup()
    held = module.training
    module.setup()
    assert module.training is held


def test_rows_hold_every_frame_once_a_pass():
    talks = [Dialogue(str(i), np.arange(n) + np.full((3, 1), 100 * i)) for i, n in enumerate((7, 3, 12, 1))]
    packed = Packed(talks, 5, seed=2)
    assert len(packed) == 5 and packed.frames == 23
    for epoch in range(2):
        made = [packed.row(epoch, i) for i in range(5)]
        codes, documents = (np.concatenate([row[k] for row in made], -1) for k in range(2))
        assert sorted(codes[0, documents >= 0].tolist()) == sorted(np.concatenate([t.codes[0] for t in talks]).tolist())
        assert (codes[0, documents >= 0] // 100 == documents[documents >= 0]).all() and (documents < 0).sum() == 2
    assert packed.row(0, 1)[0].tolist() == Packed(talks, 5, seed=2).row(0, 1)[0].tolist()
    orders = [[packed.row(epoch, i)[1].tolist() for i in range(5)] for epoch in range(4)]
    assert any(one != orders[0] for one in orders)


def test_heard_codes_are_hidden_at_random_and_the_same_after_a_restart():
    talks = [Dialogue(str(i), np.arange(60).reshape(4, 15) + i) for i in range(8)]
    packed, order = Packed(talks, 20, seed=1), Order(count=6, batch=3, seed=1)
    plain, some = Batches(packed, order), Batches(packed, order, 2, 0.4)
    hidden = [some[step].codes < 0 for step in range(8)]
    assert not any(part[:, :2].any() for part in hidden)
    assert 0.3 < torch.stack(hidden)[:, :, 2:].float().mean() < 0.5
    assert not torch.equal(hidden[0], hidden[2])  # the next pass
    for step, part in enumerate(hidden):
        assert torch.equal(some[step].codes, Batches(packed, order, 2, 0.4)[step].codes)
        assert torch.equal(some[step].codes[~part], plain[step].codes[~part])


def test_a_drill_comes_first():
    """Then all else from its beginning, as it would come without one."""
    talks = [Dialogue(str(i), np.full((3, 10), i)) for i in range(8)]
    order = Order(count=4, batch=2, seed=1)
    drill, then = (Batches(Packed(part, 10, seed=1), order) for part in (talks[:4], talks[4:]))
    both = Drilled(drill, 3, then)
    for step, (batches, place) in enumerate([(drill, 0), (drill, 1), (drill, 2), (then, 0), (then, 1)]):
        assert torch.equal(both[step].codes, batches[place].codes)
    assert both[2].codes.max() < 4 <= both[3].codes.min()


def test_a_run_begins_with_its_drill(data, tmp_path):
    (data / "drill.jsonl").write_text("\n".join((data / "talks.jsonl").read_text().splitlines()[:4]))
    drill = "--data.drill", str(data / "drill.jsonl"), "--data.drill_steps"
    found = prepare(parse(DuplexJob, "mm train duplex", options(data, tmp_path, *drill, "2")))[1]
    assert [{Path(place.rsplit(":")[0]).name for place in found.where(step)} for step in range(4)] == (
        [{"drill.jsonl"}] * 2 + [{"talks.jsonl"}] * 2)
    train(data, tmp_path / "out", *drill, "2", "--trainer.max_steps", "3", "--trainer.save", "1")
    (data / "drill.jsonl").write_text((data / "talks.jsonl").read_text().splitlines()[5])
    with pytest.raises(InputError, match="talks.jsonl and .*drill.jsonl are not those"):
        train(data, tmp_path / "out", *drill, "2", "--trainer.max_steps", "4")
    with pytest.raises(InputError, match="data.drill_steps go together"):
        train(data, tmp_path / "out", *drill, "0")


def test_sound_files_are_encoded_once(tmp_path, monkeypatch):
    """Left is the model's voice; the codes are those of each voice alone."""
    model = codec.small()
    model.save_pretrained(tmp_path / "mimi")
    draw = np.random.default_rng(0)
    wave = draw.normal(size=(16 * 11 + 5, 2)).astype(np.float32) * 0.1
    soundfile.write(tmp_path / "a.wav", wave, model.spec.rate, subtype="FLOAT")
    (tmp_path / "a.json").write_text(json.dumps({"alignments": [["hi", [0.05, 0.1], "SPEAKER_MAIN"]]}))
    (tmp_path / "talks.jsonl").write_text(json.dumps({"path": "a.wav"}))
    codes = Codes(tmp_path / "cache", str(tmp_path / "mimi"), 3, 2)
    for_ = duplex.small(card=model.spec.quantizer.size, text=spec.TextStream(vocab=92, padding=90, word_end=91)).spec
    made = read_dialogues(tmp_path / "talks.jsonl", codes, lambda word: [5], for_)[0].codes
    assert made.shape == (6, 12)
    for side, part in ((0, made[1:4]), (1, made[4:])):
        alone = model.encode(torch.from_numpy(wave[:, side])[None, None])[0]
        assert torch.equal(torch.from_numpy(part).long(), alone[:len(part)])
    assert made[0].tolist()[4:7] == [91, 5, 90]  # 0.05 s at 100 frames a second
    with monkeypatch.context() as patch:
        patch.setattr(Codes, "encode", lambda *_: pytest.fail("it is encoded already"))
        again = read_dialogues(tmp_path / "talks.jsonl", Codes(tmp_path / "cache", str(tmp_path / "mimi"), 3, 2),
                               lambda word: [5], for_)[0].codes
    assert (again == made).all()
    torch.manual_seed(1)
    other = codec.small()
    other.save_pretrained(tmp_path / "mimi")  # another codec in its place has codes of its own
    again = read_dialogues(tmp_path / "talks.jsonl", Codes(tmp_path / "cache", str(tmp_path / "mimi"), 3, 2),
                           lambda word: [5], for_)[0].codes
    assert (again != made).any()


def test_silence_is_encoded_once(tmp_path, monkeypatch):
    """The longest that was needed, whose beginning serves for shorter ones."""
    model = codec.small()
    codes = Codes(tmp_path / "cache", None, 3, 2)
    codes.model = model
    made = [codes.of(torch.zeros(length)) for length in (160, 100, 330)]
    for one, length in zip(made, (160, 100, 330), strict=True):
        assert torch.equal(one, model.encode(torch.zeros(1, 1, length))[0, :3])
    monkeypatch.setattr(model, "encode", lambda *_, **__: pytest.fail("it is known already"))
    assert torch.equal(codes.of(torch.zeros(329)), made[2])


def test_sound_files_are_encoded_by_several_processes(tmp_path):
    model = codec.small()
    model.save_pretrained(tmp_path / "mimi")
    for name in "abc":
        wave = np.random.default_rng(ord(name)).normal(size=(160, 2)).astype(np.float32) * 0.1
        soundfile.write(tmp_path / f"{name}.wav", wave, model.spec.rate, subtype="FLOAT")
        (tmp_path / f"{name}.json").write_text(json.dumps({"alignments": []}))
    manifest = tmp_path / "talks.jsonl"
    manifest.write_text("\n".join(json.dumps({"path": f"{name}.wav"}) for name in "abc"))
    found = []
    for jobs in (1, 2):
        codes = Codes(tmp_path / str(jobs), str(tmp_path / "mimi"), 3, 2)
        encode_all(codes, read_manifest(manifest), jobs)
        found.append({path.name: path.read_bytes() for path in codes.cache.iterdir()})
    assert len(found[0]) == 6 and found[0] == found[1]
    (tmp_path / "b.wav").unlink()
    with pytest.raises(InputError, match=r"b\.wav"):
        encode_all(Codes(tmp_path / "3", str(tmp_path / "mimi"), 3, 2), read_manifest(manifest), 2)


MOOD = spec.Condition(name="mood", of=spec.Choice(bins=3, dim=4, values=("good", "bad")), into="sum")


def told(data: Path, folder: Path, *lines: dict) -> Path:
    """A manifest of the first conversations, with more in their lines."""
    known = [json.loads(line) for line in (data / "talks.jsonl").read_text().splitlines()]
    full = [{name: str(data / path) for name, path in one.items()} | more
            for one, more in zip(known, lines, strict=False)]
    (folder / "told.jsonl").write_text("\n".join(map(json.dumps, full)))
    return folder / "told.jsonl"


@torch.no_grad()
def test_conversations_are_told_their_conditions(data, tmp_path):
    """By the manifest or beside the alignments; packed, each has its own."""
    beside = tmp_path / "words.json"
    beside.write_text(json.dumps({"alignments": [["one", [0.1, 0.3], "SPEAKER_MAIN"]], "text_conditions":
                                  {"mood": "bad"}}))
    path = told(data, tmp_path, {"conditions": {"mood": "good"}}, {"alignments": str(beside)}, {},
                {"alignments": str(beside), "conditions": {"mood": "good"}})
    model = duplex.small(card=CARD, delays=(0, 0, 1, 1, 0, 1), depth=spec.Depth(
        stack=spec.Stack(dim=16, layers=(duplex.layer(heads=2, hidden=24),)), weights=(0, 1, 1)),
        conditioning=spec.Conditioning(conditions=(MOOD,)))
    talks = read_dialogues(path, Codes(tmp_path, None, OWN, HEARD), lambda word: [7], model.spec)
    assert [talk.told.get("mood") for talk in talks] == ["good", "bad", None, "good"]
    packed = Packed(talks, sum(talk.codes.shape[1] for talk in talks) + 2, None)
    made = losses_of(model, batch_of(packed, [(0, 0)]), DuplexLoss())
    alone = [losses(model, torch.from_numpy(talk.codes)[None].long(), DuplexLoss(), None,
                    model.condition({"mood": [talk.told.get("mood")]})) for talk in talks]
    for name in ("text", "audio", "weight", "right"):
        torch.testing.assert_close(getattr(made, name), sum(getattr(one, name) for one in alone))


def test_a_model_that_is_told_conditions_trains(data, whole, tmp_path):
    model = DuplexLM.from_pretrained(whole / "model")
    model.spec = replace(model.spec, conditioning=spec.Conditioning(conditions=(MOOD,)))
    DuplexLM(model.spec).save_pretrained(tmp_path / "told")
    path = told(data, tmp_path, *[{"conditions": {"mood": "bad"}}] * 4)
    out = train(data, tmp_path / "out", "--model", str(tmp_path / "told"), "--data.path", str(path),
                "--trainer.max_steps", "2", "--trainer.evaluate", "2")
    before, after = (load_file(folder / "model.safetensors")["conditions.of.mood.table"]
                     for folder in (tmp_path / "told", out / "model"))
    assert (before != after).any(1).tolist() == [False, True, False, False]  # good, bad, a word to come, none


@pytest.mark.full
@pytest.mark.parametrize("spread", ["true", "false"])
def test_two_processes_tell_conditions_as_one_does(data, whole, tmp_path, spread):
    model = DuplexLM.from_pretrained(whole / "model")
    DuplexLM(replace(model.spec, conditioning=spec.Conditioning(conditions=(MOOD,)))).save_pretrained(tmp_path / "told")
    path = told(data, tmp_path, *[{"conditions": {"mood": MOOD.of.values[i % 2]}} if i % 3 else {} for i in range(40)])
    argv = ["--model", str(tmp_path / "told"), "--data.path", str(path), "--trainer.max_steps", "12"]
    train(data, tmp_path / "one", *argv)
    argv = options(data, tmp_path / "two", *argv, "--trainer.devices", "2", "--shard", spread)
    subprocess.run([sys.executable, "-m", "mm.recipes.cli", "train", "duplex", *argv], check=True, capture_output=True)
    one, two = ([float(row["loss"]) for row in rows(tmp_path / name / "train.csv")] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(("line", "words"), [
    ({"conditions": {"tone": "good"}}, r"told.jsonl:1: the model has no condition 'tone', only mood"),
    ({"conditions": {"mood": "sad"}}, "told.jsonl:1: mood should be one of good, bad, not 'sad'"),
    ({"conditions": ["good"]}, "told.jsonl:1: conditions should be words by name"),
    ({"conditions": {"mood": 3}}, "told.jsonl:1: conditions should be words by name")])
def test_conditions_that_the_model_does_not_know(data, tmp_path, line, words):
    model = duplex.small(card=CARD, conditioning=spec.Conditioning(conditions=(MOOD,)))
    with pytest.raises(InputError, match=words):
        read_dialogues(told(data, tmp_path, line), Codes(tmp_path, None, 3, 2), lambda word: [7], model.spec)


def test_conditions_that_cannot_be_trained(data, tmp_path):
    with pytest.raises(InputError, match="the model has no condition 'mood', it is told nothing"):
        read_dialogues(told(data, tmp_path, {"conditions": {"mood": "good"}}), Codes(tmp_path, None, 3, 2),
                       lambda word: [7], duplex.small(card=CARD).spec)
    for one in (spec.Condition(name="voice", of=spec.Vectors(dim=4), into="sum"),
                spec.Condition(name="voice", of=MOOD.of, into="prepend")):
        with pytest.raises(InputError, match="a model with the condition 'voice' cannot be trained"):
            check_conditions(spec.Conditioning(conditions=(one,)))


def test_a_shipped_codec_is_kept_where_the_codes_call_it_otherwise(tmp_path):
    model, job = duplex.small(), SimpleNamespace(data=SimpleNamespace(codec="codec_small"))
    shipped = Mimi.from_pretrained(codec_small(), dtype=torch.float32)
    model.generation = Note(None, shipped.fingerprint(), shipped.spec.frame_rate).told()
    keep_codec(job, model, tmp_path)
    kept = Mimi.from_pretrained(tmp_path / "codec", dtype=torch.float32)
    assert kept.fingerprint() == Note.of(model).weights


def test_what_cannot_be_trained_on_is_named(data, tmp_path):
    def refused(words, *more):
        with pytest.raises(InputError, match=words):
            train(data, tmp_path / "out", *more)
    soundfile.write(tmp_path / "one.wav", np.zeros(100, np.float32), 24000)
    (tmp_path / "one.json").write_text('{"alignments": []}')
    talks = tmp_path / "talks.jsonl"
    codec.small().save_pretrained(tmp_path / "mimi")
    codes = Codes(tmp_path / "cache", str(tmp_path / "mimi"), 2, 2)
    talks.write_text('{"path": "one.wav"}')
    with pytest.raises(InputError, match="has 1 channel, a conversation has two"):
        codes.read(read_manifest(talks)[0])
    for line, words in (("{}", "should name a path"), ("[]", "JSON object"), ('{"own": "a", "heard": "b"}', "no align"),
                        ("", "lists no conversation")):
        talks.write_text(line)
        with pytest.raises(InputError, match=words):
            read_manifest(talks)
    write_codes(tmp_path / "a.mimi", torch.full((3, 4), 15))
    write_codes(tmp_path / "b.mimi", torch.zeros(2, 4, dtype=torch.long))
    write_codes(tmp_path / "c.mimi", torch.zeros(2, 4, dtype=torch.long), weights="other")
    first = {"own": "a.mimi", "heard": "b.mimi", "alignments": "one.json"}
    for line, words in ((first, "made by another codec"), (first | {"heard": "c.mimi"}, "different codecs"),
                        (first | {"heard": "a.mimi"}, "holds 3 codebooks, 4 are needed")):
        talks.write_text(json.dumps(line))
        with pytest.raises(InputError, match=words):
            read_dialogues(talks, Codes(tmp_path, None, 3, 2 if line["heard"] != "a.mimi" else 4), lambda w: [1],
                           duplex.small(card=CARD - 1).spec)
    write_codes(tmp_path / "d.mimi", torch.zeros(3, 4, dtype=torch.long), weights="other")
    talks.write_text("\n".join(map(json.dumps, (first, first | {"own": "d.mimi", "heard": "c.mimi"}))))
    with pytest.raises(InputError, match="a.mimi and .*d.mimi were encoded by different codecs"):
        read_dialogues(talks, Codes(tmp_path, None, 3, 2), lambda w: [1], duplex.small(card=CARD).spec)
    others = [["hi", [0, 0.1], name] for name in ("B", "A")]
    (tmp_path / "others.json").write_text(json.dumps({"alignments": others}))
    talks.write_text(json.dumps(first | {"alignments": "others.json"}))
    with pytest.raises(InputError, match="no word is by SPEAKER_MAIN, only by A, B"):
        read_dialogues(talks, Codes(tmp_path, None, 3, 2), lambda w: [1], duplex.small(card=CARD).spec)
    talks.write_bytes(b"RIFF\xff")
    with pytest.raises(InputError, match="talks.jsonl is no text"):
        read_manifest(talks)
    refused("data.workers must not be negative", "--data.workers", "-1")
    refused("data.tokenizer", "--data.tokenizer", str(tmp_path))
    duplex.small(card=CARD).save_pretrained(tmp_path / "few")
    refused("520 entries, the model writes 20: it is not this model's tokenizer", "--model", str(tmp_path / "few"))
    duplex.small(text=spec.TextStream(vocab=900, outputs=30)).save_pretrained(tmp_path / "few")
    refused("520 entries, the model writes 30", "--model", str(tmp_path / "few"))
    (tmp_path / "few/config.json").write_text('{"model_type": "csm"}')
    refused("holds no duplex model checkpoint: config.json is of the kind csm", "--model", str(tmp_path / "few"))
