"""Training a codec: it learns, resumes exactly after a kill, hears a teacher, and survives bad input."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from fits import WORLD
from safetensors.torch import load_file
from support import close
from train_two import process

from mm.codecs import Mimi
from mm.errors import InputError
from mm.recipes.codec.data import Sounds, changed, listing, parts, split, store
from mm.recipes.codec.evaluation import si_sdr, used
from mm.recipes.codec.fit import fit
from mm.recipes.codec.loss import Jury, MelDistance
from mm.recipes.codec.module import CodecRecipe
from mm.recipes.codec.settings import CodecJob, CodecLoss, SoundData
from mm.recipes.codec.teacher import pooled, standardise, teacher
from mm.recipes.common.command import parse
from mm.recipes.data.sampler import Order
from mm.recipes.train.run import read_log

RATE = 1600
CONFIG = """
shape: {rate: 1600, filters: 4, ratios: [4, 2], width: 16, depth: 1, heads: 2, hidden: 32, window: 40, codebooks: 3,
        size: 16, dim: 4}
data: {seconds: 1.0, batch_size: 4, holdout: 0.2}
loss: {adversarial_from: 25}
critics: {windows: [128, 64], filters: 2}
optim: {lr: 0.01, warmup: 5, ema: 0.9}
trainer: {max_steps: 40, save: 10, evaluate: 20, log: 5, threads: 1, accelerator: cpu}
"""


SHORT = ("--trainer.max_steps", "6", "--loss.adversarial_from", "3", "--optim.lr", "0.001")


def tone(seconds: float, pitch: float, rate: int = RATE) -> np.ndarray:
    t = np.arange(int(seconds * rate)) / rate
    return 0.3 * np.sin(2 * np.pi * pitch * t) * (1 + np.sin(9 * t)) / 2


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten sounds of several lengths and rates in two folders."""
    folder = tmp_path_factory.mktemp("tones")
    for part in ("a", "b/deep"):
        (folder / part).mkdir(parents=True)
    for i in range(8):
        soundfile.write(folder / "a" / f"{i}.wav", tone(0.7 + 0.4 * i, 100 + 60 * i), RATE)
    soundfile.write(folder / "b" / "deep" / "x.flac", np.stack([tone(3, 300, 8000)] * 2, 1), 8000)
    soundfile.write(folder / "b" / "y.ogg", tone(2, 200, 16000), 16000)
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def options(data: Path, out: Path, *more: str) -> list[str]:
    return ["--config", str(data / "config.yaml"), "--data.path", f"[{data / 'a'},{data / 'b'}]", "--out", str(out),
            *more]


def train(data: Path, out: Path, *more: str) -> Path:
    fit(parse(CodecJob, "mm train codec", options(data, out, *more)))
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    return train(data, tmp_path_factory.mktemp("runs") / "whole", "--trainer.max_steps", "60")


# ------------------------------------------------------------------------------------------------- runs
def test_a_killed_run_goes_on_bit_for_bit(data, whole, tmp_path):
    out = tmp_path / "killed"
    argv = options(data, out, "--trainer.max_steps", "60")
    run = subprocess.Popen([sys.executable, "-m", "mm.recipes.cli", "train", "codec", *argv], stderr=subprocess.PIPE)
    while not (out / "last.ckpt").exists() or len((out / "train.csv").read_text().splitlines()) < 34:
        assert run.poll() is None, run.stderr.read().decode()
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert 0 < torch.load(out / "last.ckpt", weights_only=True)["global_step"] < 60 and not (out / "model").exists()
    train(data, out, "--trainer.max_steps", "60")
    for name in ("train.csv", "validation.csv"):
        assert (out / name).read_text() == (whole / name).read_text()
    killed, uncut = weights(out), weights(whole)
    assert all(torch.equal(killed[name], uncut[name]) for name in uncut)


def test_a_run_learns_and_leaves_sounds_pictures_and_a_plain_codec(whole, capsys, tmp_path):
    log, measured = read_log(whole / "train.csv"), read_log(whole / "validation.csv")
    assert np.mean(log["mel"][-5:]) < 0.8 * np.mean(log["mel"][:5]) and measured["mel"][-1] < measured["mel"][0]
    assert not any(log["critics"][:25]) and all(log["critics"][25:]) and all(log["features"][25:])
    assert all(0 < use <= 100 for use in log["use"]) and all(1 <= value <= 16 for value in log["perplexity"])
    names = sorted(path.name for path in (whole / "samples").iterdir())
    assert {path.rsplit("_", 1)[-1] for path in names} >= {"20.wav", "20.png", "60.wav", "60.png"}
    wave, rate = soundfile.read(next((whole / "samples").glob("*_60.wav")))
    assert rate == RATE and np.abs(wave).max() <= 1
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["sounds"] == 8 and metrics["validation"].keys() == {"mel", "SI-SDR", "use"}
    model = Mimi.from_pretrained(whole / "model")
    assert not [name for name in model.state_dict() if "parametrizations" in name]
    model.save_pretrained(tmp_path / "hf", "hf")
    sound = torch.from_numpy(tone(1, 200)).float()[None, None]
    assert torch.equal(Mimi.from_pretrained(tmp_path / "hf").encode(sound), model.encode(sound))
    recipe = CodecRecipe.load_from_checkpoint(whole / "last.ckpt", weights_only=True)
    assert recipe.loss == CodecLoss(adversarial_from=25)


@pytest.mark.full
def test_two_processes_train_the_codec_of_one(data, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    argv = options(data, tmp_path / "two", "--trainer.devices", "2", *SHORT)
    torch.multiprocessing.spawn(process, (port, argv), nprocs=WORLD)
    train(data, tmp_path / "one", *SHORT)
    one, two = (read_log(tmp_path / name / "train.csv") for name in ("one", "two"))
    for name in ("loss", "mel", "commit", "critics", "perplexity"):
        assert one[name] == pytest.approx(two[name], rel=2e-3), name
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    for name, value in one.items():
        close(two[name], value, 5e-3)


def test_a_teacher_is_heard_once_and_moves_the_semantic_codebook(data, tmp_path, monkeypatch):
    from mm.recipes.codec import start as codec_start

    calls = []

    class Teacher:
        name, width = "a test", 6

        def __call__(self, wave):
            calls.append(len(wave))
            level = wave.view(1500, 320).abs().mean(1, keepdim=True)
            return torch.cat([level * i for i in range(-3, 3)], 1) + 0.01 * torch.randn(1500, 6)
    monkeypatch.setattr(codec_start, "teacher", lambda *_: Teacher())
    argv = ("--loss.teacher", "somewhere", "--loss.semantic", "30", "--loss.adversarial", "0")
    out = train(data, tmp_path / "out", *argv, "--trainer.max_steps", "80")
    log = read_log(out / "train.csv")
    assert calls == [30 * 16000] and np.mean(log["semantic"][-10:]) < 0.9 * np.mean(log["semantic"][:10])
    heard = np.memmap(out / "sounds" / "teacher.f16", np.float16, "r").reshape(-1, 6).astype(float)
    assert np.abs(heard.mean(0)).max() < 0.01 and np.abs(heard.std(0) - 1).max() < 0.01
    train(data, out, *argv, "--trainer.max_steps", "81")
    assert len(calls) == 1


def test_the_discriminators_alone_can_train(data, tmp_path):
    out = train(data, tmp_path / "out", "--loss.mel", "0", "--loss.adversarial_from", "0", "--trainer.max_steps", "8")
    log = read_log(out / "train.csv")
    assert not any(log["mel"]) and all(log["critics"]) and np.isfinite(log["loss"]).all()


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(data, tmp_path):
    with pytest.raises(InputError, match=r"at step \d+, in a batch of .*\d\.(wav|flac|ogg) at .*"
                                         r"(no checkpoint was saved yet|last.ckpt holds step)"):
        train(data, tmp_path / "out", "--optim.lr", "1e18", "--optim.clip", "0")


# ------------------------------------------------------------------------------------------------- data
def test_sounds_are_stored_once_at_the_codecs_rate(data, tmp_path):
    files = listing((str(data / "a"), str(data / "b")))
    held = store(files, RATE, 16, tmp_path / "s.i16")
    assert len(held) == 10 and held.seconds == pytest.approx(sum(soundfile.info(path).duration for path in files), 1e-3)
    close(held.sound(2), torch.from_numpy(tone(1.5, 220)).float(), 1e-4)
    assert held.starts[-1] * 16 * 2 == (tmp_path / "s.i16").stat().st_size
    before = (tmp_path / "s.i16").stat().st_mtime_ns
    assert len(store(files, RATE, 16, tmp_path / "s.i16")) == 10
    assert (tmp_path / "s.i16").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="holds other sounds than those of this run"):
        store(files[1:], RATE, 16, tmp_path / "s.i16")


def test_damaged_sounds_are_left_out_and_told(data, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.wav").write_bytes(b"RIFF nothing")
    soundfile.write(tmp_path / "in" / "nan.wav", np.full(99, np.nan), RATE, subtype="FLOAT")
    files = listing((str(tmp_path / "in"),))
    with pytest.raises(InputError, match="none of 2 sounds can be read"):
        store(files, RATE, 16, tmp_path / "none.i16")
    soundfile.write(tmp_path / "in" / "ok.wav", tone(1, 100), RATE)
    held = store(listing((str(tmp_path / "in"),)), RATE, 16, tmp_path / "s.i16")
    assert len(held) == 1 and held.account.counts == {"sounds that cannot be read": 2}


@pytest.mark.parametrize(("folder", "says"), [("nowhere", "is not a folder"), ("empty", "holds no sounds")])
def test_wrong_folders_are_refused(folder, says, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=says):
        listing((str(tmp_path / folder),))


def test_rows_depend_on_seed_epoch_and_item_alone(data, tmp_path):
    settings = SoundData(path=(str(data / "a"),), seconds=1.0, lowpass=0.5)
    held = store(listing(settings.path), RATE, 16, tmp_path / "s.i16")
    count = len(parts(held, 1600))
    assert count == sum(max(1, round(n / 1600)) for n in held.lengths)
    one = Sounds(held, settings, Order(count=count, batch=4, seed=0))
    first = one[5]
    np.random.rand(3)
    assert torch.equal(one[5].wave, first.wave) and first.wave.shape == (4, 1, 1600)
    assert not torch.equal(Sounds(held, settings, Order(count=count, batch=4, seed=1))[5].wave, first.wave)
    halves = [Sounds(held, settings, Order(count=count, batch=4, seed=0, rank=r, world=2))[5].wave for r in range(2)]
    assert torch.equal(torch.cat(halves), first.wave)


def test_what_a_teacher_heard_goes_with_the_sound(data, tmp_path):
    settings = SoundData(path=(str(data / "a"),), seconds=1.0, lowpass=0.0, gain=0.0)
    held = store(listing(settings.path), RATE, 16, tmp_path / "s.i16")
    levels = np.abs(held.samples.reshape(-1, 16).astype(np.float32) / 32767).mean(1, keepdims=True)
    batch = Sounds(held, settings, Order(count=len(parts(held, 1600)), batch=4, seed=0), levels)[3]
    near = batch.wave.reshape(4, 100, 16).abs().mean(-1)
    assert batch.features.shape == (4, 100, 1) and np.corrcoef(near.flatten(), batch.features.flatten())[0, 1] > 0.95


def test_a_lowpass_takes_what_lies_above_and_a_gain_never_clips():
    from mm.recipes.data.sampler import generator

    wave, settings = torch.randn(24000) * 0.3, SoundData(path=("x",), lowpass=1.0, gain=20.0)
    for seed in range(20):
        found = changed(wave, 24000, settings, generator(seed))
        power = torch.fft.rfft(found).abs()
        assert found.abs().max() <= 1.0001 and power[:3000].mean() > 1 and power[11990:].max() < 1e-2


def test_held_out_files_come_from_every_folder(data):
    kept, held = split(SoundData(path=(str(data / "a"), str(data / "b")), holdout=0.4))
    assert len(held) == 4 and {path.parent.name for path in held} == {"a", "deep"} or len(held) == 4
    assert not set(kept) & set(held) and len(kept) + len(held) == 10
    assert split(SoundData(path=(str(data / "a"),), val=(str(data / "b"),)))[1] == listing((str(data / "b"),))


# ---------------------------------------------------------------------------------------------- losses
def test_the_mel_distance_is_zero_for_the_same_and_grows_with_noise():
    distance, x = MelDistance(24000), torch.randn(2, 1, 4800) * 0.1
    assert distance(x, x) == 0
    far = [distance(x + scale * torch.randn_like(x), x) for scale in (0.01, 0.1)]
    assert 0 < far[0] < far[1]
    assert distance(2 * x, x) == pytest.approx(np.log10(2), rel=0.02)
    silent = torch.zeros(1, 1, 4800, requires_grad=True)
    assert torch.autograd.grad(distance(silent, x[:1]), silent)[0].isfinite().all()


def test_losses_of_codec_and_discriminators_do_not_meet():
    jury, x, y = Jury((256, 128), 2), torch.randn(2, 1, 2400, requires_grad=True), torch.randn(2, 1, 2400)
    adversarial, features, critics = jury(x, y, torch.Tensor.detach)
    own = torch.autograd.grad(adversarial + features, [x, *jury.parameters()], retain_graph=True, allow_unused=True)
    assert own[0].abs().sum() > 0 and all(grad is None for grad in own[1:])
    theirs = torch.autograd.grad(critics, [x, *jury.parameters()], allow_unused=True)
    assert theirs[0] is None and all(grad is not None for grad in theirs[1:])
    assert jury(y, y, torch.Tensor.detach)[1] == 0
    optimizer = torch.optim.Adam(jury.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        found = jury(0.2 * y, y, torch.Tensor.detach)[2]
        found.backward()
        optimizer.step()
    assert found < 0.5 * critics


def test_si_sdr_by_hand():
    y = torch.randn(1000, dtype=torch.float64)
    y = y - y.mean()
    noise = torch.randn(1000, dtype=torch.float64)
    noise = noise - noise.mean()
    noise = noise - (noise @ y) / (y @ y) * y
    noise = noise * y.norm() / noise.norm() / 10
    assert float(si_sdr(3 * (y + noise) + 5, y)) == pytest.approx(20)
    assert used(torch.tensor([[0, 1, 1], [3, 3, 3]]), 4) == 37.5


def test_teachers_are_told_by_their_files(tmp_path):
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
             "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "conv_dim": [8] * 7}
    transformers.HubertModel(transformers.HubertConfig(**sizes)).save_pretrained(tmp_path)
    found = teacher(str(tmp_path), torch.device("cpu"))
    assert found.width == 16 and pooled(found(torch.randn(30 * 16000)), 375).shape == (375, 16)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(InputError, match="holds no Whisper checkpoint"):
        teacher(str(tmp_path), torch.device("cpu"))


def test_pooling_covers_twice_a_frame_and_channels_are_standardised():
    x = torch.arange(16.0)[:, None]
    assert pooled(x, 4)[:, 0].tolist() == [2.5, 5.5, 9.5, 12.5]
    made = np.random.default_rng(0).normal(3, 2, (50, 4)).astype(np.float32)
    standardise(made, 7)
    assert np.abs(made.mean(0)).max() < 1e-5 and np.abs(made.std(0) - 1).max() < 1e-5


@pytest.mark.parametrize(("option", "says"), [
    (("--data.seconds", "0"), "data.seconds must be positive"), (("--data.seconds", "0.5"), "data.seconds"),
    (("--loss.mel", "0", "--loss.adversarial", "0"), "both 0"), (("--loss.commit", "-1"), "loss.commit"),
    (("--shape.codebooks", "1"), "shape.codebooks"), (("--books.skip", "2"), "skip"),
    (("--loss.teacher", "nowhere/at/all"), "nowhere/at/all")])
def test_settings_without_sense_are_refused(option, says, data, tmp_path):
    with pytest.raises(InputError, match=says):
        train(data, tmp_path / "out", *option)


def test_a_decoder_learns_alone_and_every_code_stays(data, tmp_path):
    start = train(data, tmp_path / "start", "--trainer.max_steps", "10")
    out = train(data, tmp_path / "out", "--model", str(start / "model"), "--decoder_only", "true",
                  "--trainer.max_steps", "10")
    old, new = (load_file(folder / "model/model.safetensors") for folder in (start, out))
    moved = {name.split(".")[0] for name, value in new.items() if not torch.equal(value, old[name])}
    assert moved and moved <= {"decoder", "decoder_stack", "upsample"}
    with pytest.raises(InputError, match="decoder_only needs a model"):
        parse(CodecJob, "mm train codec", options(data, tmp_path / "none", "--decoder_only", "true"))
