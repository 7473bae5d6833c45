"""Words and their times as a stream of text tokens."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.errors import InputError
from mm.recipes.data.corpus import open_corpus
from mm.recipes.data.words import Word, by_word, read_words, text_stream
from mm.recipes.lm.tokenizer import train_tokenizer
from mm.tokenizer.tokenizer import train_bpe

PAD, END = 100, 101


def stream(words, frames, late="drop", rate=12.5):
    return text_stream([Word(*word) for word in words], frames, rate, lambda text: [int(c) for c in text], padding=PAD,
                       word_end=END, late=late).tolist()


def test_words_stand_in_the_frame_in_which_they_start():
    """In seconds, not frames: 1.0 s is frame 12."""
    made = stream([("12", 0.0, 0.2), ("345", 1.0, 1.4)], 18)
    assert made[:2] == [1, 2] and made[12:15] == [3, 4, 5]
    assert made[11] == END and made[2:11] == [PAD] * 9 and made[15:] == [PAD] * 3


@pytest.mark.parametrize("kind", ["byte-level", "clip"])
def test_tokens_of_words_read_as_a_text(tmp_path, kind):
    (tmp_path / "text.txt").write_text("it is one word after the other\n" * 3)
    tokenizer = (train_tokenizer(open_corpus(str(tmp_path / "text.txt")), 300) if kind == "byte-level"
                 else train_bpe(["it is one word after the other"], 600))
    encode = by_word(tokenizer)
    said = [token for word in ("it", "is", "one", "other", "word") for token in encode(word)]
    assert tokenizer.decode(said).strip() == "it is one other word"


def test_a_word_that_is_late_is_cut_off_or_shifts_the_next():
    words = [("12345", 0.08, 0.1), ("67", 0.24, 0.3)]
    assert stream(words, 8) == [END, 1, 2, 6, 7, PAD, PAD, PAD]
    assert stream(words, 8, "shift") == [END, 1, 2, 3, 4, 5, 6, 7]
    assert stream(words, 4, "shift") == [END, 1, 2, 3] and stream([("1", 9.0, 9.1)], 4) == [PAD] * 4


@given(st.lists(st.tuples(st.text("123456789", min_size=1, max_size=4), st.floats(0, 3)), max_size=8),
       st.sampled_from(["drop", "shift"]))
def test_every_first_token_is_written_once_and_nothing_is_invented(words, late):
    words = sorted(words, key=lambda word: word[1])
    made = stream([(text, at, at) for text, at in words], 60, late)
    said = [token for token in made if token not in (PAD, END)]
    whole = "".join(text for text, _ in words)
    if late == "shift":
        assert said == [int(c) for c in whole]
    it = iter(whole)
    assert all(str(token) in it for token in said)  # in order
    assert all(b < PAD for a, b in zip(made, made[1:], strict=False) if a == END)


@pytest.mark.parametrize(("entries", "words"), [
    ([["a", [1, 2], "SPEAKER_MAIN"], ["b", [0.5, 2], "SPEAKER_MAIN"]], "out of order: number 1"),
    ([["a", [2, 1], "SPEAKER_MAIN"]], "runs from 2 to 1"), ([["a", [0, 1]]], "should be"), ([7], "should be")])
def test_alignments_that_make_no_sense(tmp_path, entries, words):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"alignments": entries}))
    with pytest.raises(InputError, match=words):
        read_words(path)


def test_only_one_speaker_counts(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"alignments": [["a", [1, 2], "SPEAKER_1"], ["b", [0.5, 2], "SPEAKER_MAIN"]]}))
    assert read_words(path) == [Word("b", 0.5, 2.0)]
