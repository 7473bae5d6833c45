"""Decoding: equal to transformers where it is greedy, the same alone as in company where it draws."""

import pytest
import torch
import transformers
from support import redraw

from mm import TextDecoder
from mm.decode import Sampling
from mm.errors import InputError
from mm.recipes.weights import stories260k


@pytest.fixture(scope="module")
def stories():
    return TextDecoder.from_pretrained(stories260k())


def test_the_shipped_model_tells_a_story(stories):
    text = stories.generate("Once upon a time", Sampling(max_tokens=40))[0].text
    assert text.startswith(", there was a little girl named Lily. She loved to play outside")


@torch.no_grad()
def test_the_shipped_model_opens_in_transformers(stories):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stories260k())
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories260k())
    ids = tokenizer("Once upon a time, Lily's café was open")["input_ids"]
    assert ids[-8:] == stories.tokenizer.encode("Once upon a time, Lily's café was open")[-8:]
    ids = torch.tensor([ids])
    assert (theirs(ids).logits - stories(ids)).abs().max() <= 1e-4  # logits of this model reach 20


@torch.no_grad()
def test_greedy_equals_transformers_on_prompts_of_any_length(tmp_path):
    torch.manual_seed(3)
    config = transformers.MistralConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, sliding_window=6, pad_token_id=0,
                                        eos_token_id=None, max_position_embeddings=128)
    theirs = redraw(transformers.MistralForCausalLM(config))
    theirs.save_pretrained(tmp_path)
    ours = TextDecoder.from_pretrained(tmp_path)
    prompts = [torch.randint(97, (n,)).tolist() for n in (3, 11, 7, 20)]
    got = ours.generate(prompts, Sampling(max_tokens=30), chunk=4)
    for prompt, out in zip(prompts, got, strict=True):
        wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, len(prompt):].tolist()
        assert out.ids == wanted and out.reason == "length"


def test_a_drawn_text_is_the_same_alone_and_in_company(stories):
    ways = [Sampling(max_tokens=25, temperature=0.9, seed=s, top_p=0.9 if s % 2 else 1.0, top_k=s) for s in range(4)]
    prompts = ["Once", "The dog was", "Lily and Tom", "A"]
    together = stories.generate(prompts, ways)
    alone = [stories.generate(p, way)[0] for p, way in zip(prompts, ways, strict=True)]
    assert [out.ids for out in together] == [out.ids for out in alone]
    assert len({out.text for out in stories.generate(["Once"] * 4, ways)}) > 1


def test_stop_strings_end_the_text_and_are_not_in_it(stories):
    told = []
    out = stories.generate("Once upon a time", Sampling(max_tokens=60, stop=("Lily", "xyz")),
                           on_text=lambda row, piece: told.append(piece))[0]
    assert out.reason == "stop" and out.text == ", there was a little girl named " and "".join(told) == out.text
    assert "".join(stories.stream("Once upon a time", Sampling(max_tokens=9))) == \
        stories.generate("Once upon a time", Sampling(max_tokens=9))[0].text


@pytest.mark.parametrize("prompt, told", [([[]], "empty"), ([[5, 900]], "vocabulary"), ([[1] * 600], "context"),
                                          ([], "no prompt")])
def test_prompts_that_cannot_be_read(stories, prompt, told):
    with pytest.raises(InputError, match=told):
        stories.generate(prompt)
