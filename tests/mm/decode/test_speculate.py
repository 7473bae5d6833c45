"""Speculation gives the text of plain decoding, greedy or drawn, whatever is proposed."""

from dataclasses import replace

import pytest
import torch
from support import attention, redraw, stack

from mm import TextDecoder, spec
from mm.decode import Ahead, Draft, Engine, PromptLookup, Sampling
from mm.errors import InputError
from mm.positions.visibility import along
from mm.spec import CAUSAL, DecoderSpec, Embed, Rope, Window

SPEC = DecoderSpec(embed=Embed(vocab=31), context=64, stack=stack(
    attention(window=Window(left=4, right=0), rope=Rope()), attention(window=CAUSAL, rope=Rope()),
    final_norm=spec.RMSNorm()))
PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [5], list(range(25)), [30, 29, 30], [8] * 12]
WAYS = [Sampling(max_tokens=m, temperature=t, seed=s, top_p=p, repetition_penalty=r) for m, t, s, p, r in (
    (20, 0, 0, 1.0, 1.0), (17, 0.7, 1, 0.9, 1.0), (60, 0, 2, 1.0, 1.0), (9, 1.2, 3, 1.0, 1.3), (13, 0, 4, 1.0, 1.5))]


def make(seed):
    torch.manual_seed(seed)
    return redraw(TextDecoder(SPEC))


MODEL = make(0)
PLAIN = MODEL.generate(PROMPTS, WAYS)


HEADS = [replace(SPEC.stack.layers[0], mixer=mixer) for mixer in (
    attention(window=CAUSAL, rope=Rope()), attention(window=Window(left=3, right=0), rope=Rope()),
    spec.Latent(heads=4, kv_rank=8, nope_dim=6, rope_dim=4, value_dim=6, rope=Rope()))]


def with_heads(count):
    torch.manual_seed(1)
    return redraw(TextDecoder(replace(SPEC, ahead=tuple(HEADS[:count]))))


def counted(proposer):
    """The proposer, which counts its steps."""
    plain, proposer.steps = proposer.propose, 0

    def propose(rows, settings):
        proposer.steps += 1
        return plain(rows, settings)
    proposer.propose = propose
    return proposer


@pytest.mark.parametrize("proposer", [PromptLookup(3), PromptLookup(1, longest=1), Draft(make(5), 3), Draft(MODEL, 4)])
@pytest.mark.parametrize("slots", [1, 3, 5])
def test_the_text_is_that_of_plain_decoding(proposer, slots):
    out = MODEL.generate(PROMPTS, WAYS, slots=slots, chunk=6, speculate=proposer)
    assert out == PLAIN
    assert out[2].reason == "context"


def test_a_perfect_draft_saves_its_tokens():
    proposer = counted(Draft(MODEL, 4))
    drawn = Sampling(max_tokens=21, temperature=0.8, seed=9)
    out = MODEL.generate([[3, 4, 5]], drawn, speculate=proposer)
    assert out == MODEL.generate([[3, 4, 5]], drawn)
    assert proposer.steps == 4  # 1 token by the prompt, 5 by each step


@pytest.mark.parametrize("count, slots", [(1, 3), (2, 5), (3, 1), (3, 2)])
def test_the_models_own_heads_leave_its_text(count, slots):
    model = with_heads(count)
    plain = model.generate(PROMPTS, WAYS)
    assert plain[2].reason == "context"
    assert model.generate(PROMPTS, WAYS, slots=slots, chunk=6, speculate=Ahead()) == plain


class Checked(Ahead):
    """Its guesses are those of heads that read every row anew, without a cache."""

    guesses = 0

    def propose(self, rows, settings):
        drafts = super().propose(rows, settings)
        for ids, guess in zip(rows, drafts.tolist(), strict=True):
            if ids:
                assert self.anew(list(ids)) == guess
                self.guesses += 1
        return drafts

    def anew(self, ids):
        hidden, drafts = self.model.hidden(torch.tensor([ids[:-1]])), []
        for k, head in enumerate(self.model.ahead, 1):
            read = self.model.embed.look_up(torch.tensor([(ids + drafts)[k:len(ids) - 1 + k]]))
            hidden = head(hidden, read, along(*hidden.shape[:2]))
            drafts.append(int(self.model.logits(hidden[0, -1]).argmax()))
        return drafts


def test_heads_guess_as_if_they_read_everything_anew():
    proposer, model = Checked(), with_heads(3)
    model.generate(PROMPTS, Sampling(max_tokens=9), slots=2, chunk=6, speculate=proposer)
    assert proposer.guesses > 20


@torch.no_grad()
def test_perfect_heads_save_their_tokens():
    """Where no token looks at another, a head can do all that the model does with the token it reads."""
    layer = replace(HEADS[0], norm=spec.RMSNorm())
    model = redraw(TextDecoder(DecoderSpec(embed=Embed(vocab=31), context=64, ahead=(layer, layer),
                                           stack=spec.Stack(dim=32, layers=(layer,), final_norm=spec.RMSNorm()))))
    table = model.embed.tokens.weight
    table.div_(table.square().mean(1, keepdim=True).sqrt())
    for part in (model.stack, *(head.stack for head in model.ahead)):
        part.load_state_dict(model.stack.state_dict())
        part.blocks[0].mixer.out.weight.zero_()
        part.blocks[0].mixer.out.bias.zero_()
    for head in model.ahead:
        head.token_norm.weight.fill_(1)
        head.project.weight.copy_(torch.eye(32, 64))
    for way in (Sampling(max_tokens=16), Sampling(max_tokens=16, temperature=0.9, seed=3)):
        proposer = counted(Ahead())
        out = model.generate([[3, 4, 5], [6]], way, speculate=proposer)
        assert out == model.generate([[3, 4, 5], [6]], way)
        assert proposer.steps == 5  # 1 token by the prompt, 3 by each step


def test_after_a_shared_prefix_the_text_is_the_same():
    model = with_heads(3)
    plain = model.generate([PROMPTS[2], PROMPTS[0]], WAYS[0])
    engine = Engine(model, 2, 50, 4, speculate=Ahead())
    request, other = (engine.submit(PROMPTS[i], WAYS[0], prefix=prefix) for i, prefix in
                      ((2, engine.prefix(PROMPTS[2][:23])), (0, None)))
    engine.run()
    assert [request.out, other.out] == [one.ids for one in plain]


def test_look_up_finds_what_followed_last():
    look = PromptLookup(3, longest=2).look_up
    assert look([1, 2, 9, 8, 7, 1, 2, 5, 6, 1, 2]) == [5, 6, 1] and look([1, 2, 3]) == [] and look([4]) == []


def test_mistakes():
    with pytest.raises(InputError, match="at least 1"):
        PromptLookup(0)
    small = TextDecoder(DecoderSpec(embed=Embed(vocab=31), context=8, stack=SPEC.stack))
    with pytest.raises(InputError, match="context"):
        Engine(MODEL, 1, 20, speculate=Draft(small))
    with pytest.raises(InputError, match="no heads"):
        Engine(MODEL, 1, 20, speculate=Ahead())
    other = TextDecoder(DecoderSpec(embed=Embed(vocab=32), context=64, stack=SPEC.stack))
    with pytest.raises(InputError, match="vocabulary"):
        Engine(MODEL, 1, 20, speculate=Draft(other))
