"""The perplexity of a text: every token once, with the context it was promised, as transformers' loss has it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mm.errors import InputError
from mm.recipes.bench.perplexity import by_cache, measured, text_ids, windows
from mm.recipes.cli import main
from mm.recipes.weights import stories260k
from mm.text.decoder import TextDecoder
from mm.tokenizer.tokenizer import clip_tokenizer

transformers = pytest.importorskip("transformers")
TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog."


@pytest.fixture(scope="module")
def model():
    return TextDecoder.from_pretrained(stories260k(), torch.float32)


@given(st.integers(2, 200), st.integers(2, 50), st.integers(1, 49))
def test_windows_count_every_token_but_the_first_once(count, length, stride):
    assume(stride < length)
    cuts = list(windows(count, length, stride))
    assert [i for cut in cuts for i in range(cut.first, cut.stop)] == list(range(1, count))
    for cut in cuts:
        assert 0 <= cut.start < cut.first and cut.stop - cut.start <= length
        assert cut.start == 0 or cut.first - cut.start >= length - stride


def test_one_window_is_the_loss_of_transformers(model, tmp_path):
    model.save_pretrained(tmp_path, layout="hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = [1, *model.tokenizer.encode(TEXT)]
    with torch.no_grad():
        loss = theirs(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert measured(model, ids, 512, 8, (), TextDecoder.hidden, "") == pytest.approx(math.exp(loss), rel=1e-5)


def test_less_context_makes_no_better_text_and_a_cache_of_eight_bits_costs_little(model):
    ids = model.tokenizer.encode(TEXT)
    whole, short = (measured(model, ids, n, 4, model.tokenizer.prefix, TextDecoder.hidden, "") for n in (512, 6))
    cached = measured(model, ids, 512, 4, model.tokenizer.prefix, by_cache(4), "")
    assert whole < short and cached != whole and cached == pytest.approx(whole, rel=0.02)


def test_a_text_has_two_tokens_at_least(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match="a.txt has 1 tokens of text"):
        text_ids(clip_tokenizer(), str(tmp_path / "a.txt"), 10)


@pytest.mark.parametrize(("options", "says"), [
    (["--length", "8", "--stride", "8"], "--stride 8 must be less than --length 8"),
    (["--model", "MODEL", "--text", "/nowhere", "--length", "64", "--stride", "8"], "/nowhere does not exist")])
def test_wrong_options_are_one_sentence(options, says, capsys):
    options = [str(stories260k()) if option == "MODEL" else option for option in options]
    assert main(["bench", "perplexity", *options]) == 2
    assert says in capsys.readouterr().err
