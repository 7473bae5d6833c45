"""Speculation gives the text of plain decoding, greedy or drawn, whatever is proposed."""

import pytest
import torch
from support import attention, redraw, stack

from mm import TextDecoder, spec
from mm.engine import Engine
from mm.errors import InputError
from mm.sampling import Sampling
from mm.spec import CAUSAL, DecoderSpec, Embed, Rope, Sight
from mm.speculate import Draft, PromptLookup

SPEC = DecoderSpec(embed=Embed(vocab=31), context=64, stack=stack(
    attention(sight=Sight(left=4, right=0), rope=Rope()), attention(sight=CAUSAL, rope=Rope()),
    final_norm=spec.RMSNorm()))
PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [5], list(range(25)), [30, 29, 30], [8] * 12]
WAYS = [Sampling(max_tokens=m, temperature=t, seed=s, top_p=p, repetition_penalty=r) for m, t, s, p, r in (
    (20, 0, 0, 1.0, 1.0), (17, 0.7, 1, 0.9, 1.0), (60, 0, 2, 1.0, 1.0), (9, 1.2, 3, 1.0, 1.3), (13, 0, 4, 1.0, 1.5))]


def make(seed):
    torch.manual_seed(seed)
    return redraw(TextDecoder(SPEC))


MODEL = make(0)
PLAIN = MODEL.generate(PROMPTS, WAYS)


class Counted(Draft):
    steps = 0

    def propose(self, rows, settings):
        self.steps += 1
        return super().propose(rows, settings)


@pytest.mark.parametrize("proposer", [PromptLookup(3), PromptLookup(1, longest=1), Draft(make(5), 3), Draft(MODEL, 4)])
@pytest.mark.parametrize("slots", [1, 3, 5])
def test_the_text_is_that_of_plain_decoding(proposer, slots):
    out = MODEL.generate(PROMPTS, WAYS, slots=slots, chunk=6, speculate=proposer)
    assert out == PLAIN
    assert out[2].reason == "context"


def test_a_perfect_draft_saves_its_tokens():
    proposer = Counted(MODEL, 4)
    drawn = Sampling(max_tokens=21, temperature=0.8, seed=9)
    out = MODEL.generate([[3, 4, 5]], drawn, speculate=proposer)
    assert out == MODEL.generate([[3, 4, 5]], drawn)
    assert proposer.steps == 4  # 1 token by the prompt, 5 by each step


def test_look_up_finds_what_followed_last():
    look = PromptLookup(3, longest=2).look_up
    assert look([1, 2, 9, 8, 7, 1, 2, 5, 6, 1, 2]) == [5, 6, 1] and look([1, 2, 3]) == [] and look([4]) == []


def test_mistakes():
    with pytest.raises(InputError, match="at least 1"):
        PromptLookup(0)
    small = TextDecoder(DecoderSpec(embed=Embed(vocab=31), context=8, stack=SPEC.stack))
    with pytest.raises(InputError, match="context"):
        Engine(MODEL, 1, 20, speculate=Draft(small))
    other = TextDecoder(DecoderSpec(embed=Embed(vocab=32), context=64, stack=SPEC.stack))
    with pytest.raises(InputError, match="vocabulary"):
        Engine(MODEL, 1, 20, speculate=Draft(other))
