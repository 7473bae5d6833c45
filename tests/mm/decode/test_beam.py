"""Beam search equals transformers'."""

import pytest
import torch
import transformers
from support import redraw

from mm import Sampling, TextDecoder
from mm.decode import Beams, beam_search
from mm.errors import InputError


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(vocab_size=19, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=7,
                                      max_position_embeddings=64)
    theirs = redraw(transformers.LlamaForCausalLM(config))
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return theirs, TextDecoder.from_pretrained(folder)


@torch.no_grad()
@pytest.mark.parametrize("beams, penalty", [(1, 1.0), (2, 1.0), (3, 0.0), (4, 2.0), (5, -1.0)])
def test_equal_to_transformers(pair, beams, penalty):
    theirs, ours = pair
    torch.manual_seed(2)
    for length in (1, 4, 9):
        ids = torch.randint(8, 19, (4, length))
        wanted = theirs.generate(ids, num_beams=beams, do_sample=False, max_new_tokens=14, length_penalty=penalty,
                                 attention_mask=torch.ones_like(ids))[:, length:].tolist()
        found = beam_search(ours, ids, beams=beams, max_tokens=14, length_penalty=penalty, eos=[7])
        assert [one.ids for one in found] == [row[:row.index(7)] if 7 in row else row for row in wanted]


@torch.no_grad()
def test_prompts_of_any_length_do_not_know_each_other(pair):
    rows = [[9], [8, 12, 3, 3, 11], [15, 16]]
    together = beam_search(pair[1], rows, beams=3, max_tokens=10, eos=[7])
    alone = [beam_search(pair[1], [row], beams=3, max_tokens=10, eos=[7])[0] for row in rows]
    assert [one.ids for one in together] == [one.ids for one in alone]
    assert all(abs(a.score - b.score) < 1e-5 for a, b in zip(together, alone, strict=True))


def test_generate_takes_beams(pair):
    rows, told = [[9], [8, 12, 3]], []
    out = pair[1].generate(rows, Sampling(max_tokens=6), beams=Beams(count=3), on_text=told.append)
    assert [one.ids for one in out] == [one.ids for one in beam_search(pair[1], rows, beams=3, max_tokens=6)]
    assert {one.reason for one in out} == {"length"} and not told  # no tokenizer, no text
    for settings in (Sampling(top_k=2, temperature=1.0), [Sampling(max_tokens=2), Sampling(max_tokens=3)]):
        with pytest.raises(InputError, match="only max_tokens"):
            pair[1].generate(rows, settings, beams=Beams())


def test_mistakes(pair):
    for rows, told in (([[]], "empty"), ([[1, 99]], "vocabulary"), ([[1] * 65], "fit")):
        with pytest.raises(InputError, match=told):
            beam_search(pair[1], rows)
    with pytest.raises(InputError, match="beam"):
        beam_search(pair[1], [[1]], beams=0)
