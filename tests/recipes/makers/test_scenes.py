"""Dialogues of hums: what is placed when, and that it is the same by the seed."""

from collections import Counter

import numpy as np
import pytest

from mm.recipes.data.sampler import generator
from mm.recipes.duplex.questions import answers
from mm.recipes.makers import scenes
from mm.recipes.makers.scenes import FRAME, Library, compose, paused, plan, stretched
from mm.recipes.makers.talkers import HELD_OUT, OWN, PEOPLE, lines
from mm.recipes.makers.voices import RATE

HUM = np.sin(2 * np.pi * 250 * np.arange(RATE) / RATE).astype(np.float32)
SCRIPT = [line for line in lines(0) if line.talker != OWN and line.talker not in HELD_OUT]


@pytest.fixture(scope="module")
def library():
    times = {text: [(word, 0.1 + 0.2 * i, 0.25 + 0.2 * i) for i, word in enumerate(text.split())]
             for text in answers()}
    own = {text: 0.1 * np.tile(HUM, 2)[:int(RATE * (0.2 * len(text.split()) + 0.2))] for text in answers()}
    question = (HUM * 3000).astype(np.int16)
    return Library({line.file: question for line in SCRIPT}, own, times, [np.ones(60 * RATE, np.float32)])


@pytest.fixture(scope="module")
def made(library):
    return [compose(questions, library, generator(i)) for i, questions in enumerate(plan(SCRIPT, 60, generator(9)))]


def test_every_answer_is_wanted_equally_often():
    planned = plan(SCRIPT, 1500, generator(0))
    asked = [line for scene in planned for line in scene]
    kinds = Counter(line.question.kind for line in asked)
    assert kinds["sum"] / len(asked) == pytest.approx(0.5, abs=0.03)
    assert kinds["greeting"] / len(asked) == pytest.approx(0.1, abs=0.02)
    for kind, count in (("sum", 100), ("word", 50)):
        wanted = Counter(line.question.answer for line in asked if line.question.kind == kind)
        assert len(wanted) == count and max(wanted.values()) - min(wanted.values()) <= 1
    people = sum(line.talker in PEOPLE for line in asked)
    assert people / kinds["word"] == pytest.approx(scenes.HUMAN, abs=0.05)
    assert plan(SCRIPT, 100, generator(0)) == planned[:100]


def test_a_script_may_lack_a_kind():
    words = [line for line in SCRIPT if line.question.kind == "word"][:5]
    planned = plan(words, 40, generator(0))
    assert {line.text for scene in planned for line in scene} == {line.text for line in words}


def test_alignments_and_turns_lie_within_the_sound(made):
    for scene in made:
        seconds = scene.wave.shape[1] / RATE
        assert scene.wave.shape[1] % FRAME == 0 and scene.wave.dtype == np.float32
        spans = [span for _, span, _ in scene.words]
        assert all(0 <= start < end <= seconds for start, end in spans)
        assert [start for start, _ in spans] == sorted(start for start, _ in spans)
        assert all(turn.asked[1] < seconds for turn in scene.turns)


def test_the_model_is_silent_but_for_its_answers(made):
    """It answers within 0.5 to 0.75 s, on a frame, is silent in a question that it was not interrupted by, and stops
    0.2 to 0.3 s after one that it was."""
    interrupted = 0
    for scene in made:
        said = np.flatnonzero(scene.wave[0]) / RATE
        assert scene.turns or not len(said)
        for before, turn in zip([None, *scene.turns], scene.turns, strict=False):
            start, end = turn.asked
            during = said[(said >= start - 0.04) & (said < end + 0.49)]
            if before and before.interrupted:
                assert 0.2 - 0.04 <= during.max() - start <= 0.3
                interrupted += 1
            else:
                assert not len(during)
            first = said[said > end + 0.45].min()
            assert 0.499 <= first - end <= 0.735
            assert round(first * RATE) % FRAME <= 1
    assert interrupted > 5


def test_an_answer_is_written_before_it_is_said_and_the_question_after_it_was_asked(made):
    """A word a frame, so that what is said tells nothing that is not written."""
    for scene in made:
        starts = [start for _, (start, _), _ in scene.words]
        assert [word for word, _, _ in scene.words] == [word for turn in scene.turns for word in turn.answer.split()]
        for turn in scene.turns:
            begin = next(start for start in starts if start >= turn.asked[1])
            own = starts[starts.index(begin):][:len(turn.answer.split())]
            assert begin - turn.asked[1] < 0.34
            assert np.allclose(np.diff(own), FRAME / RATE, atol=2e-3)
            assert not scene.wave[0, round(begin * RATE) + 2:round((begin + 4.9 * FRAME / RATE) * RATE)].any()


def test_some_have_no_question_and_none_is_like_another(made):
    assert 0 < sum(not scene.turns for scene in made) < 15
    assert {len(scene.turns) for scene in made} == {0, 1, 2, 3}
    assert 7 < np.mean([scene.wave.shape[1] / RATE for scene in made]) < 12
    assert np.abs(np.stack([scene.wave[1, :FRAME] for scene in made])).max() <= 1


def test_a_drill_asks_much_and_its_answers_are_only_written(library):
    planned = plan(SCRIPT, 40, generator(9), scenes.DRILL)
    made = [compose(questions, library, generator(i), scenes.DRILL) for i, questions in enumerate(planned)]
    assert {len(scene.turns) for scene in made} <= {0, 4, 5}
    assert not any(scene.wave[0].any() for scene in made)
    seconds = sum(scene.wave.shape[1] for scene in made) / RATE / sum(len(scene.turns) for scene in made)
    assert seconds < 2.8  # a question lasts one
    for scene in made:
        assert [word for word, _, _ in scene.words] == [word for turn in scene.turns for word in turn.answer.split()]
        starts = iter([start for _, (start, _), _ in scene.words])
        for turn in scene.turns:
            own = [next(starts) for _ in turn.answer.split()]
            assert 0 < own[0] - turn.asked[1] < 0.34 and np.allclose(np.diff(own), FRAME / RATE, atol=2e-3)


def test_the_same_seed_makes_the_same_dialogue(library):
    questions = next(one for one in plan(SCRIPT, 9, generator(1)) if len(one) > 1)
    one, same, other = (compose(questions, library, generator(seed)) for seed in (5, 5, 6))
    assert np.array_equal(one.wave, same.wave) and one.turns == same.turns and one.words == same.words
    assert not np.array_equal(one.wave[:, :3 * RATE], other.wave[:, :3 * RATE])


def test_a_pause_falls_where_it_is_quiet():
    wave = np.concatenate([HUM[:12000], np.zeros(480, np.float32), HUM[:12000]])
    out = paused(wave, 9600)
    quiet = np.flatnonzero(np.abs(out).reshape(-1, 240).max(1) == 0)
    assert len(out) == len(wave) + 9600 and (quiet[0], len(quiet)) == (50, 42)


def test_slower_is_lower():
    out = stretched((HUM * 20000).astype(np.int16), 1.1)
    assert len(out) == pytest.approx(1.1 * RATE, abs=2)
    spectrum = np.abs(np.fft.rfft(out))
    assert np.argmax(spectrum) * RATE / len(out) == pytest.approx(250 / 1.1, abs=1)
