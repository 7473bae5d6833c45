"""`mm transcribe`: options and output, on a model that is replaced, and word error rates."""

import json

import pytest

from mm.checkpoint import door
from mm.encoders.audio.transcribe import Segment, Transcript
from mm.errors import InputError
from mm.recipes import cli
from mm.recipes.commands import transcribe
from mm.recipes.common.metrics import edits, word_error_rate


@pytest.fixture
def heard(monkeypatch):
    """The settings with which the model was asked; it hears the same in every file."""
    asked = []
    said = Transcript(" Hi.  Ho.", [Segment(0.0, 1.5, " Hi.", [1], -0.1, 0.0, 1.0, 0.0),
                                    Segment(3601.25, 3602.0, " Ho.", [2], -0.1, 0.0, 1.0, 0.0)], "en")

    def fake(model, files, settings, batch):
        asked.append((list(files), settings, batch))
        return [said] * len(files)
    monkeypatch.setattr(transcribe, "load", lambda name, device: name)
    monkeypatch.setattr("mm.encoders.audio.transcribe.transcribe", fake)
    return asked


def test_text_times_and_json(heard, capsys):
    assert cli.main(["transcribe", "a.wav"]) == 0
    assert capsys.readouterr().out == "Hi.  Ho.\n"
    assert cli.main(["transcribe", "a.wav", "--timestamps"]) == 0
    assert capsys.readouterr().out == ("[00:00:00.000 --> 00:00:01.500] Hi.\n[01:00:01.250 --> 01:00:02.000] Ho.\n")
    assert cli.main(["transcribe", "a.wav", "b.wav", "c.wav", "--json", "--batch", "2", "--language", "de"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in rows] == ["a.wav", "b.wav", "c.wav"]
    assert rows[0]["segments"][1]["start"] == 3601.25
    assert [(files, batch) for files, _, batch in heard[2:]] == [(["a.wav", "b.wav"], 2), (["c.wav"], 2)]
    assert heard[2][1].language == "de"


def test_without_a_model(monkeypatch, capsys):
    monkeypatch.setitem(door.PACKAGED, "tiny.en", ("there-is-no-such-package", "tiny.en.pt"))
    assert cli.main(["transcribe", "a.wav"]) == 2
    assert "--model" in capsys.readouterr().err


def test_word_error_rate():
    assert word_error_rate(["Hello, world!"], ["hello world"]) == 0
    assert word_error_rate(["a b x d", "one"], ["a b c d", "one two"]) == pytest.approx(100 * 2 / 6)
    assert edits("kitten", "sitting") == 3
    for texts in ((["a"], []), (["a"], ["."])):
        with pytest.raises(InputError):
            word_error_rate(*texts)
