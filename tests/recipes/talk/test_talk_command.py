"""`mm talk` from the command line: a file that is answered, a server that starts and stops, and what it refuses."""

import importlib
import json
import os
import signal
import subprocess
import sys
import urllib.request

import codec
import duplex
import numpy as np
import pytest
import soundfile
import talking
import torch

from mm import spec
from mm.checkpoint import door
from mm.codecs.spec import MimiSpec, Quantizer
from mm.decode.sampling import Sampling
from mm.errors import InputError
from mm.recipes.cli import main
from mm.recipes.commands import talk as command
from mm.recipes.talk import capacity
from mm.recipes.talk.dialogues import Dialogues
from mm.recipes.talk.partner import Partner
from mm.recipes.talk.wishes import Wishes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return talking.written(tmp_path_factory.mktemp("model"))


def test_a_file_is_answered(model, tmp_path, capsys):
    soundfile.write(tmp_path / "question.wav", talking.speech(10)[: 8 * 1920 + 100], 24000, subtype="FLOAT")
    argv = ["talk", "--model", str(model), "--file", str(tmp_path / "question.wav"), "--after", "0.4", "--to"]
    for name in ("one.wav", "two.wav"):
        assert main([*argv, str(tmp_path / name)]) == 0
    wave, rate = soundfile.read(tmp_path / "one.wav")
    assert rate == 24000 and len(wave) == 14 * 1920 and np.abs(wave).max() > 0.1
    assert (tmp_path / "one.wav").read_bytes() == (tmp_path / "two.wav").read_bytes()
    text = capsys.readouterr().out.splitlines()
    assert text[0].strip() and text[0] == text[2] and "1.1 s, the first 0.6 s" in text[1]
    for name, more in (("three.wav", "--seed"), ("four.wav", "--sinks")):  # the context is 6 frames
        assert main([*argv, str(tmp_path / name), more, "1"]) == 0
        assert (tmp_path / "one.wav").read_bytes() != (tmp_path / name).read_bytes()


@torch.no_grad()
def test_the_answer_stands_beside_what_it_answers(model):
    """The codes of the sound, given to the model as in training, have the logits of what was said step by step."""
    partner = Partner.open(str(model))
    wave, frame = torch.from_numpy(talking.speech(6)), partner.frame
    dialogues = Dialogues(partner, 1)
    dialogues.enter("one", Wishes.of({"text_temperature": "0", "audio_temperature": "0"}))
    tokens, go = [], partner.model.step
    partner.model.step = lambda *args, **options: tokens.append(go(*args, **options)) or tokens[-1]
    for piece in (torch.zeros(frame), *wave.split(frame)):
        dialogues.step({"one": piece.numpy()})
    heard = partner.codec.encode(wave[None, None], codebooks=4)
    said = torch.stack([one.tokens[0] for one in tokens[1:]], 1)
    logits = partner.model(torch.cat([said[None], heard], 1))
    assert torch.equal(logits.text[0].argmax(-1), said[0])
    known = ~logits.audio[0, ..., 0].isnan()
    assert known.sum() > 18 and torch.equal(logits.audio[0].argmax(-1)[known], said[1:][known])


@pytest.mark.parametrize("shape", ["moshi", "hibiki"])
def test_kyutais_directory_talks_as_kyutais_server(tmp_path, monkeypatch, shape):
    """Frames go through the official package as its server hands them on, greedily; Hibiki is told that its sound is
    to be very good."""
    monkeypatch.setenv("NO_TORCH_COMPILE", "1")
    moshi = pytest.importorskip("moshi.models", reason="needs the package moshi")
    lm, mimi = talking.as_kyutai(tmp_path, shape, lm_gen_config={"temp_text": 0.4, "top_k_text": 9, "temp": 0.0})
    told = importlib.import_module("moshi.run_inference").get_condition_tensors(shape, lm, 1, 1.0)
    generator, wave = moshi.LMGen(lm, use_sampling=False, condition_tensors=told), talking.speech(16)
    mimi.streaming_forever(1)
    generator.streaming_forever(1)
    theirs, tokens = [], []
    with torch.no_grad():
        for i, frame in enumerate(torch.from_numpy(wave).view(-1, 1, 1, 1920)):
            codes = mimi.encode(frame)
            if i == 0:
                mimi.reset_streaming()
            out = generator.step(codes)
            if out is not None:
                theirs.append(mimi.decode(out[:, 1:])[0, 0].numpy())
                tokens.append(out[0, 0, 0].item())
    partner = Partner.open(str(tmp_path))
    dialogues = Dialogues(partner, 1)
    dialogues.enter("one", Wishes.of({"text_temperature": "0", "audio_temperature": "0"}))
    ours = [dialogues.step({"one": frame})["one"] for frame in wave.reshape(-1, 1920)]
    lag = partner.model.spec.lag
    assert ours[:lag] == [None] * lag and [said.token for said in ours[lag:]] == tokens
    assert max(np.abs(a.wave - b).max() for a, b in zip(ours[lag:], theirs, strict=True)) < 1e-4
    assert partner.model.tokenizer is not None and partner.told == ({"description": "very_good"} if shape == "hibiki"
                                                                    else {})
    assert partner.wishes.text == Sampling(temperature=0.4, top_k=9) and partner.wishes.audio == Sampling()
    if shape == "hibiki":
        with pytest.raises(InputError, match="description should be one of bad, good, very_good, not 'fine'"):
            Partner.open(str(tmp_path), told={"description": "fine"})
    with pytest.raises(InputError, match="cannot be told 'mood', " + ("only desc" if told else "nor anything else")):
        Partner.open(str(tmp_path), told={"mood": "good"})


def test_what_is_refused(model, tmp_path, capsys):
    soundfile.write(tmp_path / "q.wav", np.zeros(2000), 24000)
    named = ["--model", str(model)]
    for argv, words in (
            (["--model", "duplex_none"], "not a directory here"),
            (["--model", str(tmp_path / "none")], "not a directory with a checkpoint"),
            ([*named, "--file", str(tmp_path / "q.wav")], "--file and --to go together"),
            ([*named, "--file", str(tmp_path / "q.wav"), "--to", str(tmp_path / "a.doc")], ".doc is not a sound"),
            ([*named, "--file", str(tmp_path / "q.wav"), "--to", str(tmp_path / "a.raw")], "RAW takes no 1 channel"),
            ([*named, "--file", str(tmp_path / "no.wav"), "--to", str(tmp_path / "a.wav")], "no.wav"),
            ([*named, "--device", "abacus"], "--device abacus: this machine"),
            ([*named, "--sinks", "6"], "6 positions that stay in sight need a causal window that is longer"),
            ([*named, "--cert", "a.pem"], "--cert and --key go together"),
            ([*named, "--cert", "a.pem", "--key", "b.pem"], "no certificate and its key"),
            ([*named, "--static", str(tmp_path)], "no index.html")):
        assert main(["talk", *argv]) == 2
        told = capsys.readouterr().err
        assert words in told and told.count("\n") == 1
    assert not list(tmp_path.glob("a.*")) and not list(tmp_path.glob(".*"))


def test_a_codec_that_does_not_belong_to_the_model(model, tmp_path):
    other = codec.small(MimiSpec(encoder=codec.SPEC.encoder, decoder=codec.SPEC.decoder,
                                 quantizer=Quantizer(codebooks=3, size=12, dim=16)))
    other.save_pretrained(tmp_path / "few")
    with pytest.raises(InputError, match="4 codebooks of 12 codes, its codec has 3 of 12"):
        Partner.open(str(model), str(tmp_path / "few"))
    talking.lm().save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="holds no codec.*name one with --codec"):
        Partner.open(str(tmp_path / "bare"))
    deaf = duplex.small(text=spec.TextStream(vocab=20), delays=(0, 0, 1, 1, 1))
    with pytest.raises(InputError, match="hears 0"):
        Partner(deaf, talking.partner().codec, "deaf")


def test_the_shipped_model_is_the_default(model, tmp_path, monkeypatch, capsys):
    """It names the codec that ships too; where weights are lacking, a sentence says how to get them."""
    own, sound = tmp_path / "own", talking.partner().codec
    partner = talking.partner()
    note = {"name": "codec_small", "weights": sound.fingerprint(), "frame_rate": 12.5}
    partner.model.generation = {"codec_config": note}
    partner.model.save_pretrained(own)
    sound.save_pretrained(tmp_path / "sound")
    real, places = door.shipped, {"duplex_small": own, "codec_small": tmp_path / "sound"}
    monkeypatch.setattr(door, "shipped", places.__getitem__)
    soundfile.write(tmp_path / "q.wav", talking.speech(4), 24000)
    argv = ["talk", "--file", str(tmp_path / "q.wav"), "--to", str(tmp_path / "a.wav"), "--after", "0.1"]
    assert main(argv) == 0 and soundfile.info(tmp_path / "a.wav").frames == 5 * 1920
    monkeypatch.setattr(door, "shipped", real)
    monkeypatch.setattr(door, "WEIGHTS", "mm.recipes.nowhere")
    monkeypatch.setitem(door.SHIPPED, "duplex_small", "mm train duplex")
    assert main(argv) == 2 and "train them with `mm train duplex`" in capsys.readouterr().err


def test_a_codec_that_the_model_was_not_trained_with(tmp_path):
    partner = talking.partner()
    note = {"name": None, "weights": partner.codec.fingerprint(), "frame_rate": 12.5}
    partner.codec.save_pretrained(tmp_path / "codec")
    for change, words in (({}, None), ({"weights": "0123"}, "trained with a codec of the weights 0123, not"),
                          ({"frame_rate": 25}, "trained with 25 frames a second, its codec has 12.5"),
                          ({"more": 1}, "should hold name, weights and frame_rate under codec_config")):
        partner.model.generation = {"codec_config": note | change}
        partner.model.save_pretrained(tmp_path)
        if words is None:
            Partner.open(str(tmp_path))
            continue
        with pytest.raises(InputError, match=words):
            Partner.open(str(tmp_path))


def test_as_many_places_as_a_step_is_fast_enough_for(model, monkeypatch):
    partner = Partner.open(str(model))
    monkeypatch.setattr(capacity, "step_seconds", lambda partner, count: 0.011 * count)
    assert capacity.capacity(partner) == 4
    monkeypatch.setattr(capacity, "step_seconds", lambda partner, count: 1.0)
    assert capacity.capacity(partner) == 1

    def room(most):
        def seconds(partner, count):
            if count > most:
                raise torch.OutOfMemoryError
            return 0.01
        monkeypatch.setattr(capacity, "step_seconds", seconds)
        return capacity.capacity(partner)
    assert (room(99), room(9)) == (64, 8)
    with pytest.raises(InputError, match="do not fit into the GPU's memory"):
        room(0)
    monkeypatch.undo()
    assert 0 < capacity.step_seconds(partner, 2) < 5
    assert f"at most {capacity.COUNTS[-1]}." in " ".join(command.Serving.__doc__.split())


def test_a_server_from_start_to_stop(model):
    process = subprocess.Popen([sys.executable, "-m", "mm.recipes.cli", "talk", "--model", str(model), "--port", "0",
                                "--no-browser", "--sessions", "3", "--token", "a+b &c"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        line = process.stdout.readline()
        assert " for 3 at once: http://localhost:" in line
        url = line.split("at once: ")[1].split()[0]
        with urllib.request.urlopen(url.split("?")[0] + "health") as reply:
            assert json.load(reply)["capacity"] == 3
        with urllib.request.urlopen(url) as reply:
            assert b"<title>mm talk</title>" in reply.read()
        with urllib.request.urlopen(url.replace("/?", "/metrics?")) as reply:
            assert b"mm_talk_capacity 3" in reply.read()
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and "Traceback" not in err
