"""What was asked in a recorded dialogue: read in order, with the recorded answers' ends, or refused in one sentence."""

import json
import math

import pytest

from mm.errors import InputError
from mm.recipes.duplex.questions import read_turns

WORDS = [["Hello", [0.2, 0.5], "SPEAKER_USER"], ["hi", [1.0, 1.2], "SPEAKER_MAIN"], ["It", [4.5, 4.6], "SPEAKER_MAIN"],
         ["is", [4.6, 4.7], "SPEAKER_MAIN"], ["seven", [4.7, 5.2], "SPEAKER_MAIN"]]
TURNS = [{"kind": "greeting", "expect": "hello", "asked": [0.2, 0.5]},
         {"kind": "sum", "expect": "seven", "asked": [3.0, 4.0], "interrupted": True},
         {"kind": "word", "expect": "cake", "asked": [5.0, 6.0], "talker": "F3", "interrupted": False}]


def test_turns(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"alignments": WORDS, "turns": TURNS}))
    first, second, third = read_turns(tmp_path / "x.json")
    assert (first.kind, first.expect, first.start, first.end, first.until, first.answered) == (
        "greeting", "hello", 0.2, 0.5, 3.0, 1.2)
    assert (second.until, second.answered, second.interrupted) == (5.0, 5.2, True)
    (tmp_path / "quiet.json").write_text('{"alignments": [], "turns": []}')
    assert read_turns(tmp_path / "quiet.json") == []
    assert third.until == math.inf and third.answered == 6.0 and not third.interrupted  # no answer was recorded


@pytest.mark.parametrize(("turns", "words"), [
    (None, "has no list turns"), ({}, "has no list turns"), (TURNS[::-1], "out of order"),
    ([TURNS[0] | {"kind": "song"}], "of the kind 'song', expected sum or word or greeting"),
    ([TURNS[0] | {"asked": [2.0, 1.0]}], "turn 0 is asked from 2.0 to 1.0 s"),
    ([TURNS[0] | {"asked": [2.0, math.nan]}], "turn 0 is asked"), ([TURNS[0], 3], "turn 1 should hold kind"),
    ([{"kind": "sum"}], "turn 0 should hold kind, expect and asked")])
def test_what_is_refused(tmp_path, turns, words):
    (tmp_path / "x.json").write_text(json.dumps({"alignments": [], "turns": turns}))
    with pytest.raises(InputError, match=words):
        read_turns(tmp_path / "x.json")
