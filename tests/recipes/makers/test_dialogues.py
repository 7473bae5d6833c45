"""`mm dialogues` with hums in place of voices: what it writes, who is held out, and what it says of bad input."""

import json
from collections import Counter

import numpy as np
import pytest
import soundfile

from mm.recipes.cli import main
from mm.recipes.data.dialogues import read_manifest
from mm.recipes.data.words import read_words
from mm.recipes.duplex.questions import answers
from mm.recipes.makers import acoustics, library, word_times
from mm.recipes.makers.talkers import HELD_OUT
from mm.recipes.makers.voices import RATE, Sources


def hum(line):
    return 0.1 * np.sin(np.arange(int(RATE * (1 + len(line.text) / 50))) / 20).astype(np.float32)


def timed(hibari, texts):
    return {text: [(word, 0.1 + 0.15 * i, 0.2 + 0.15 * i) for i, word in enumerate(text.split())] for text in texts}


@pytest.fixture(autouse=True)
def humming(monkeypatch):
    said = Counter()
    monkeypatch.setattr(Sources, "say", lambda self, line: said.update([line.file]) or hum(line))
    monkeypatch.setattr(Sources, "check", lambda self, wanted: None)
    monkeypatch.setattr(Sources, "hibari", lambda self: None)
    monkeypatch.setattr(acoustics, "SECONDS", 25)
    monkeypatch.setattr(word_times, "word_times", timed)
    return said


def run(out, *more):
    return main(["dialogues", str(out), "--count", "12", "--held-out", "5", "--drill", "4", "--sentences", "2", *more])


def test_manifests_that_training_reads(tmp_path, humming, capsys):
    assert run(tmp_path) == 0
    assert "12 dialogues" in capsys.readouterr().out
    for part, count in (("train", 12), ("val", 5), ("drill", 4)):
        entries = read_manifest(tmp_path / f"{part}.jsonl")
        assert len(entries) == count
        talkers = set()
        for entry in entries:
            sound, rate = soundfile.read(entry.sound)
            assert rate == RATE and sound.shape[1] == 2
            told = json.loads(entry.words.read_text())
            assert len(read_words(entry.words)) == len(told["alignments"])
            assert all(turn["answer"] in answers() for turn in told["turns"])
            talkers |= {turn["talker"] for turn in told["turns"]}
        assert talkers and (talkers <= HELD_OUT if part == "val" else not talkers & HELD_OUT)
    assert set(humming.values()) == {1}
    said = (tmp_path / "said.txt").read_text().splitlines()
    assert said and all(line.startswith(" ") and line.endswith((".", "?")) for line in said)


def test_a_second_run_says_nothing_anew_and_makes_the_same(tmp_path, humming):
    run(tmp_path)
    first = {path: path.read_bytes() for path in tmp_path.glob("*/0*.*")}
    assert len(first) == 42
    humming.clear()
    gone = next(tmp_path.glob("utterances/af_bella/*.flac"))
    gone.unlink()
    run(tmp_path)
    assert list(humming) == [f"af_bella/{gone.name}"]
    assert {path: path.read_bytes() for path in tmp_path.glob("*/0*.*")} == first
    run(tmp_path, "--seed", "1")
    assert (tmp_path / "train/000001.flac").read_bytes() != first[tmp_path / "train/000001.flac"]


def test_times_are_told_anew_when_answers_are_new(tmp_path):
    run(tmp_path)
    path = tmp_path / "utterances" / library.TIMES
    path.write_text(json.dumps({"It is.": []}))
    run(tmp_path)
    assert set(json.loads(path.read_text())) == set(answers())


def test_a_broken_utterance_is_named(tmp_path, capsys):
    run(tmp_path)
    broken = next(tmp_path.glob("utterances/af_bella/*.flac"))
    broken.write_bytes(b"fLaC")
    assert run(tmp_path) == 2
    error = capsys.readouterr().err
    assert str(broken) in error and "delete it" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("argv", [["--count", "0"], ["--jobs", "x"], []])
def test_bad_arguments(argv, tmp_path):
    assert main(["dialogues", *argv, *([str(tmp_path)] if argv else [])]) == 2
