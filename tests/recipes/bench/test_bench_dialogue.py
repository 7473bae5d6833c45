"""`mm bench dialogue`: a model that hears answers right, one that hears somebody else does not; and what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import talking
import torch

from mm.recipes.bench import dialogue as bench
from mm.recipes.cli import main
from mm.recipes.duplex import evaluation as answers
from mm.recipes.duplex.questions import NUMBERS
from mm.recipes.talk.replies import Reply

RATE = 24000


@pytest.fixture
def room(tmp_path, monkeypatch):
    """Five dialogues of one question each, whose loudness is the number that answers it."""
    monkeypatch.chdir(tmp_path)
    lines = []
    for i in range(5):
        wave = np.zeros((RATE + 1000 * i, 2), np.float32)
        wave[2400:7200, 1] = wave[9600:19200, 0] = (i + 1) / 10
        soundfile.write(f"{i}.wav", wave, RATE, subtype="FLOAT")
        turn = {"kind": "sum", "question": "", "answer": "", "expect": NUMBERS[i + 1], "asked": [0.1, 0.3]}
        words = [["seven", [0.4, 0.8], "SPEAKER_MAIN"]]
        (tmp_path / f"{i}.json").write_text(json.dumps({"alignments": words, "turns": [turn]}))
        lines.append(json.dumps({"path": f"{i}.wav"}))
    (tmp_path / "val.jsonl").write_text("\n".join(lines))
    talking.written(tmp_path / "model")
    monkeypatch.setattr(bench, "load", lambda *_: None)
    monkeypatch.setattr(answers, "transcribe", lambda model, clips, settings: [SimpleNamespace(
        text=NUMBERS[min(round(10 * float(clip[clip > 0.05].median())), 9)]) for clip in clips])
    return tmp_path


def run(room, *more):
    status = main(["bench", "dialogue", "val.jsonl", "--model", "model", "--json", "out.json", *more])
    told = json.loads((room / "out.json").read_text())
    return status, {case["case"]: case for case in told["cases"]}


def test_a_model_that_hears_answers_right_and_by_chance_what_it_does_not_hear(room, monkeypatch):
    def echo(partner, users, manner):
        for wave in users:
            yield Reply(torch.roll(wave, RATE * 2 // 5), [partner.model.spec.text.padding] * 99)
    monkeypatch.setattr(bench, "replies", echo)
    monkeypatch.setattr(bench, "recorded", lambda partner, waves: (Reply(wave, []) for wave in waves))
    status, cases = run(room, "--answers", "heard.jsonl")
    assert status == 0 and cases["right"]["ours"] == 100 and cases["right"]["peer"] == 0
    assert cases["median delay"]["ours"] == pytest.approx(0.2, abs=0.021) and cases["overlap"]["ours"] == 0
    assert cases["as recorded: sum right"]["ours"] == 100
    kept = [json.loads(line) for line in (room / "heard.jsonl").read_text().splitlines()]
    assert [one["right"] for one in kept] == [True] * 5 + [False] * 5 + [True] * 5


def test_a_small_partner_is_measured(room):
    """With random weights: the same again, whoever else is there, but not at another temperature."""
    def told(*more):
        cases = run(room, "--limit", "2", "--answers", "heard.jsonl", *more)[1]
        return cases, [json.loads(line) for line in (room / "heard.jsonl").read_text().splitlines()]
    cases, heard = told("--rows", "2")
    assert told("--rows", "1") == (cases, heard) and told("--temperature", "1")[1] != heard
    assert set(cases) > {"right", "sum right", "written right", "within 1 s", "overlap", "silence kept"}
    assert len(heard) == 6 and any(one["written"] for one in heard) and not any(one["written"] for one in heard[4:])
    drawn = [[one.sound.path for one in bench.chosen(room / "val.jsonl", 2, seed)] for seed in range(4)]
    assert any(one != drawn[0] for one in drawn)


def test_what_is_refused(room, capsys):
    def refused(words, line=None):
        if line is not None:
            (room / "val.jsonl").write_text(f'{line}\n{{"path": "1.wav"}}')
        assert main(["bench", "dialogue", "val.jsonl", "--model", "model"]) == 2
        assert words in capsys.readouterr().err
    soundfile.write("mono.wav", np.zeros(100, np.float32), RATE)
    (room / "mono.json").write_text((room / "1.json").read_text())
    (room / "2.json").write_text('{"alignments": []}')
    refused("mono.wav has 1 channel, a dialogue has two", '{"path": "mono.wav"}')
    refused("2.json has no list turns", '{"path": "2.wav"}')
    refused("names codes", '{"own": "a.mimi", "heard": "b.mimi", "alignments": "1.json"}')
    refused("one dialogue is too few", "")
