"""What is told of a dialogue: answers, their delay, overlap and silence, of sounds that were made to measure."""

import math

import pytest
import talking
import torch

from mm.recipes.duplex import evaluation as answers
from mm.recipes.duplex.evaluation import figures, hear, observe, spoken
from mm.recipes.duplex.questions import Turn
from mm.recipes.talk.replies import Reply
from mm.spec import TextStream

RATE, SECONDS = 24000, 0.08
TEXT = TextStream(vocab=50)
SUM = Turn("sum", "seven", 1.0, 2.0, 5.0, 3.0, False)
WORD = Turn("word", "tent", 5.0, 6.0, math.inf, 7.0, False)


def sound(length, *spans, level=0.1):
    """Noise at these times, in seconds, above a hiss."""
    draw = torch.Generator().manual_seed(0)
    wave = 1e-3 * torch.randn(round(length * RATE), generator=draw)
    for start, end in spans:
        part = wave[round(start * RATE):round(end * RATE)]
        part.add_(level * torch.randn(len(part), generator=draw))
    return wave


def dialogue(*spans, turns=(SUM, WORD), length=9.0, tokens=()):
    tokens = [*tokens, *[TEXT.padding] * (math.ceil(length / SECONDS) - len(tokens))]
    return observe(Reply(sound(length, *spans), tokens), turns, RATE, SECONDS, TEXT, None)


def test_speech_is_what_is_loud_for_a_while():
    """Short pauses are part of it, clicks are none, and the level does not matter."""
    for level in (0.02, 0.5):
        found = spoken(sound(5, (0.5, 1.0), (1.2, 1.8), (2.5, 2.54), (3.0, 4.0), level=level), RATE)
        assert [at for span in found for at in span] == pytest.approx([0.5, 1.8, 3.0, 4.0], abs=0.021)
    assert spoken(sound(2), RATE) == [] and spoken(torch.zeros(100), RATE) == []


def test_a_good_dialogue():
    one = dialogue((2.3, 3.0), (6.7, 7.2))
    for answer, text in zip(one.answers, ("It is 7.", "The word is tent."), strict=True):
        answer.heard = text
    told = figures([one])
    assert told["right"] == told["sum right"] == told["word right"] == told["within 1 s"] == 100
    assert told["median delay"] == pytest.approx(0.3, abs=0.021)
    assert told["90th percentile of the delay"] == pytest.approx(0.7, abs=0.021)
    assert told["overlap"] == told["false starts a minute"] == 0 and told["silence kept"] == 100
    assert len(one.answers[0].clip) == pytest.approx(1.2 * 16000, abs=700)


def test_a_bad_dialogue():
    """It speaks before it is asked and meanwhile, goes on too long, and the second answer never comes."""
    one = dialogue((0.2, 0.6), (1.2, 1.4), (3.5, 5.5))
    one.answers[0].heard = "It is eight."
    assert [answer.delay for answer in one.answers] == [pytest.approx(1.5, abs=0.021), math.inf]
    assert one.answers[1].clip is None and len(one.answers[0].clip) == pytest.approx(1.75 * 16000, abs=700)
    told = figures([one])
    assert told["right"] == told["within 1 s"] == 0 and told["90th percentile of the delay"] == math.inf
    assert told["overlap"] == pytest.approx(100 * 0.7 / 2, abs=2)  # of two seconds of questions
    # silence is due from 0 to 2, from 4 to 6 and from 8 on: 5 s, of which 2.1 are broken, at two starts
    assert told["silence kept"] == pytest.approx(100 * (1 - 2.1 / 5), abs=1)
    assert told["false starts a minute"] == pytest.approx(2 * 60 / 5)


def test_where_nothing_is_asked_silence_is_due():
    told = figures([dialogue((1.0, 4.0), turns=(), length=6.0)])
    assert told["silence kept"] == pytest.approx(50, abs=1) and told["false starts a minute"] == pytest.approx(10)
    assert told["right"] == 0 and told["median delay"] == math.inf


def test_an_answer_may_begin_a_little_early_and_not_long_before():
    early, babble = dialogue((1.8, 2.5)).answers[0], dialogue((0.1, 4.0)).answers[0]
    assert early.delay == pytest.approx(-0.2, abs=0.021) and len(early.clip) == pytest.approx(1.2 * 16000, abs=700)
    assert babble.delay == math.inf and len(babble.clip) == pytest.approx(2.5 * 16000, abs=700)
    at_last = dialogue((0.1, 2.4), (3.0, 4.0)).answers[0]
    assert at_last.delay == pytest.approx(1.0, abs=0.021) and len(at_last.clip) == pytest.approx(2.5 * 16000, abs=700)


def test_answers_that_were_broken_off_are_not_judged():
    cut = Turn("sum", "two", 1.0, 2.0, 2.6, 2.6, True)
    one = dialogue((2.2, 2.6), turns=(cut, WORD))
    told = figures([one])
    assert "sum right" not in told and told["word right"] == 0 and told["within 1 s"] == 50


def test_what_the_model_writes_is_judged_beside_what_it_says():
    tokenizer = talking.partner().model.tokenizer
    ids = [*[TEXT.padding] * 27, TEXT.word_end, *tokenizer.encode("five")]
    reply = Reply(sound(5.0, (2.3, 3.0)), ids + [TEXT.padding] * 30)
    turn = Turn("sum", "five", 1.0, 2.0, math.inf, 3.0, False)
    one = observe(reply, [turn], RATE, SECONDS, TEXT, tokenizer)
    assert one.answers[0].written == "five" and figures([one])["written right"] == 100 > figures([one])["right"]
    earlier = observe(Reply(reply.wave, ids[15:]), [turn], RATE, SECONDS, TEXT, tokenizer)
    assert earlier.answers[0].written == ""


def test_a_recogniser_hears_only_what_was_said(monkeypatch):
    class Text:
        text = " It is seven. "
    given = []
    monkeypatch.setattr(answers, "transcribe", lambda model, clips, how: given.extend(clips) or [Text] * len(clips))
    one, steps = dialogue((2.3, 3.0)), []
    hear(None, one.answers, lambda: steps.append(1))
    assert [answer.heard for answer in one.answers] == ["It is seven.", ""] and len(given) == len(steps) == 1
