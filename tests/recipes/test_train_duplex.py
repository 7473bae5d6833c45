"""Training a duplex model: it learns, resumes exactly, goes on from checkpoints, and stops in one sentence."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import codec
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from mm import DuplexLM
from mm.codecs.file import Header, Writer
from mm.errors import InputError
from mm.recipes.data.dialogues import Codes, Dialogue, Packed, read_dialogues, read_manifest
from mm.recipes.train.command import parse
from mm.recipes.train.duplex_settings import DuplexJob
from mm.recipes.train.fit_duplex import fit
from mm.tokenizer import train_bpe

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


@pytest.mark.full
@pytest.mark.parametrize("spread", ["true", "false"])
def test_two_processes_give_the_losses_of_one(data, whole, tmp_path, spread):
    """Spread weights (FSDP2) and a copy on each (DDP)."""
    argv = options(data, tmp_path / "two", "--trainer.max_steps", "60", "--trainer.devices", "2", "--shard", spread)
    subprocess.run([sys.executable, "-m", "mm.recipes.cli", "train", "duplex", *argv], check=True, capture_output=True)
    for name, column in (("train.csv", "loss"), ("train.csv", "gradient"), ("validation.csv", "perplexity")):
        one, two = ([float(row[column]) for row in rows(folder / name)][:8] for folder in (whole, tmp_path / "two"))
        assert two == pytest.approx(one, rel=1e-4)


# ------------------------------------------------------------------------------------------------- data
def test_a_model_may_say_and_hear_fewer_codebooks_than_there_are(data, tmp_path):
    out = train(data, tmp_path / "few", "--shape.own", "2", "--shape.heard", "1", "--loss.depth", "0.5",
                "--trainer.max_steps", "2")
    model = DuplexLM.from_pretrained(out / "model")
    assert (model.spec.own, model.spec.heard) == (2, 1)


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
    text = {"padding": 90, "word_end": 91}
    made = read_dialogues(tmp_path / "talks.jsonl", codes, lambda word: [5], 64, **text)[0].codes
    assert made.shape == (6, 12)
    for side, part in ((0, made[1:4]), (1, made[4:])):
        alone = model.encode(torch.from_numpy(wave[:, side])[None, None])[0]
        assert torch.equal(torch.from_numpy(part).long(), alone[:len(part)])
    assert made[0].tolist()[4:7] == [91, 5, 90]  # 0.05 s at 100 frames a second
    with monkeypatch.context() as patch:
        patch.setattr(Codes, "encode", lambda *_: pytest.fail("it is encoded already"))
        again = read_dialogues(tmp_path / "talks.jsonl", Codes(tmp_path / "cache", str(tmp_path / "mimi"), 3, 2),
                               lambda word: [5], 64, **text)[0].codes
    assert (again == made).all()
    torch.manual_seed(1)
    other = codec.small()
    other.save_pretrained(tmp_path / "mimi")  # another codec in its place has codes of its own
    again = read_dialogues(tmp_path / "talks.jsonl", Codes(tmp_path / "cache", str(tmp_path / "mimi"), 3, 2),
                           lambda word: [5], 64, **text)[0].codes
    assert (again != made).any()


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
    for heard, words in (("b.mimi", "made by another codec"), ("c.mimi", "different codecs"), ("a.mimi", "codebooks")):
        talks.write_text(json.dumps({"own": "a.mimi", "heard": heard, "alignments": "one.json"}))
        with pytest.raises(InputError, match=words):
            read_dialogues(talks, Codes(tmp_path, None, 3, 2 if heard != "a.mimi" else 4), lambda w: [1], 15, padding=0,
                           word_end=1)
    refused("data.tokenizer", "--data.tokenizer", str(tmp_path))
