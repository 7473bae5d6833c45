"""What is asked, what is answered, and which transcripts of an answer count."""

import pytest

from mm.recipes.duplex import questions as asked


def test_sums_words_and_greetings():
    one = asked.sum_of(9, 9, "{} plus {}.")
    assert (one.text, one.answer, one.expect) == ("Nine plus nine.", "Nine plus nine is eighteen.", "eighteen")
    assert asked.repeat("cave", asked.READ).text == "Please select the word cave."
    assert asked.repeat("cave", asked.READ).answer == "The word is cave."
    assert len(asked.answers()) == len(set(asked.answers())) == 100 + 50 + 1


def test_the_words_are_fifty_of_the_test():
    places = set(asked.WORDS.values())
    assert len(places) == 50
    assert all(1 <= batch <= 50 and 1 <= place <= 6 for batch, place in places)
    assert not set(asked.WORDS) & {*asked.NUMBERS, *asked.SPELLED, "the", "word", "is"}


@pytest.mark.parametrize("kind, expect, transcript", [
    ("sum", "seven", " It is 7."), ("sum", "eighteen", "It is 18"), ("sum", "seven", "IT IS SEVEN!"),
    ("sum", "four", "It is for."), ("sum", "seven", "Three plus four is seven."), ("sum", "seven", "3 + 4 = 7."),
    ("sum", "four", "Four plus zero is four."), ("word", "male", "The word is mail."),
    ("word", "sale", "The word is sail."),
    ("word", "cave", "the word is, cave"),
    ("greeting", "hello", "Hello, how can I help you?"), ("greeting", "hello", "how can I help")])
def test_right(kind, expect, transcript):
    assert asked.correct(kind, expect, transcript)


@pytest.mark.parametrize("kind, expect, transcript", [
    ("sum", "seven", "It is 17."), ("sum", "seven", "Seven plus one is eight."),
    ("sum", "three", "Three plus four is."),
    ("sum", "seven", "It is seventy seven."), ("sum", "seven", "It is 6 7."),
    ("sum", "seven", "It is 77."), ("sum", "seven", "It is 107"), ("sum", "seven", "seven eight"),
    ("sum", "seven", ""), ("sum", "seven", "Three plus four is 7 8."),
    ("word", "cave", "The word is late."), ("word", "cave", "The word is cave tent."), ("word", "cave", "The word is"),
    ("word", "tap", "tapping"), ("greeting", "hello", "It is seven."), ("greeting", "hello", "")])
def test_wrong(kind, expect, transcript):
    assert not asked.correct(kind, expect, transcript)
