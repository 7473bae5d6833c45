"""Conversations as rows of one state: each as if it were alone, whoever comes and goes; wishes for the text."""

import numpy as np
import pytest
import talking
from talking import FRAME, speech

from mm.decode.requests import TextStream
from mm.recipes.talk import dialogues, engine
from mm.recipes.talk.dialogues import Dialogues
from mm.recipes.talk.metrics import Metrics
from mm.recipes.talk.wishes import Wishes


@pytest.fixture(scope="module")
def partner():
    return talking.partner()


def test_wishes_for_the_text(partner):
    """Padding that is much likelier leaves nothing else; a penalty leaves no word twice while it looks back."""
    held, s = Dialogues(partner, 1), partner.model.spec.text
    hot = {"text_temperature": "1", "audio_temperature": "0", "text_topk": "0"}
    held.enter("padded", Wishes.of(hot | {"pad_mult": "100"}))
    held.enter("new", Wishes.of({"text_temperature": "0", "audio_temperature": "0", "repetition_penalty": "1e2"}))
    tokens = {"padded": [], "new": []}
    for frame in speech(12).reshape(-1, FRAME):
        for key, said in held.step({"padded": frame, "new": frame}).items():
            tokens[key] += [said.token] if said else []
    assert set(tokens["padded"]) == {s.padding}
    words = [token for token in tokens["new"] if token not in (s.padding, s.word_end)]
    assert len(words) > 3 and len(set(words)) == len(words)


def test_the_engine_gives_and_takes_rows(partner):
    held = Dialogues(partner, 4)
    greedy = Wishes.of({"text_temperature": "0", "audio_temperature": "0"})
    frames = speech(9).reshape(-1, FRAME)
    held.enter("a", greedy)
    lone = [held.step({"a": frame})["a"] for frame in frames]
    held.leave("a")
    assert len(held.keys) == 1
    for key in "bcd":
        held.enter(key, greedy)
    said = []
    for i, frame in enumerate(frames):
        company = {"b": frames[-i - 1]} if i in (2, 3) else {}
        said.append(held.step({"c": frame} | company)["c"])
        if i == 4:
            held.leave("b")
    assert held.keys == ["c", "d"]
    assert [one and one.token for one in said] == [one and one.token for one in lone]
    assert max(np.abs(a.wave - b.wave).max() for a, b in zip(said[1:], lone[1:], strict=True)) < 1e-5
    assert held.step({}) == {}


def test_rows_that_are_fixed_as_on_a_gpu(partner, monkeypatch):
    """A row is taken again after its conversation, and a step that was captured is begun anew for who samples."""
    class Captured:
        def __init__(self, step):
            self.step, self.renewed = step, 0

        def renew(self):
            self.renewed += 1

        def __call__(self):
            return self.step()
    monkeypatch.setattr(dialogues, "Replay", Captured)
    held, lone = Dialogues(partner, 1), Dialogues(partner, 1)
    held.static = True
    held.resize(2, [])
    greedy, frames = Wishes.of({"text_temperature": "0", "audio_temperature": "0"}), speech(6).reshape(-1, FRAME)
    held.enter("a", greedy)
    assert held.advance.renewed == 0
    held.enter("b", Wishes())
    assert held.advance.renewed == 1
    for frame in frames:
        held.step({"a": frame, "b": frame})
    held.leave("a")
    held.enter("c", greedy)
    lone.enter("c", greedy)
    assert held.keys == ["c", "b"] and held.advance.renewed == 1
    for frame in frames:
        ours, theirs = held.step({"b": frame, "c": frame})["c"], lone.step({"c": frame})["c"]
        assert (ours and ours.token) == (theirs and theirs.token)
    assert np.abs(ours.wave - theirs.wave).max() < 1e-5


def test_tokens_that_are_no_words(partner):
    """Padding, and those beyond the tokenizer's vocabulary, for which the model has rows."""
    seat = engine.Seat(Wishes(), print, print, words=TextStream(partner.model.tokenizer))
    it = engine.Engine(partner, 1, Metrics())
    known = partner.model.tokenizer.encode("hello")
    assert [it.text(seat, token) for token in (0, 3, talking.WORDS - 1)] == ["", "", ""]
    assert "".join(it.text(seat, token) for token in known) == "hello"
