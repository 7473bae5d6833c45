"""The choice of a token: filters equal to transformers', draws that follow the softmax and know no neighbour."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mm.decode.sampling import Sampling, choose, controls, gumbel, keep_likely, penalise
from mm.errors import InputError


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9), st.sampled_from([0.3, 0.7, 1.5]), st.sampled_from([0, 1, 5]),
       st.sampled_from([0.4, 0.9, 1.0]), st.sampled_from([0.0, 0.05, 0.3]), st.sampled_from([1.0, 1.3]))
def test_filters_equal_transformers(seed, temperature, top_k, top_p, min_p, penalty):
    torch.manual_seed(seed)
    logits, text = torch.randn(1, 50) * 3, torch.randint(50, (1, 8))
    used = torch.zeros(1, 50, dtype=torch.bool).scatter_(1, text, True)
    rows = controls([Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                              repetition_penalty=penalty)])
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(text, logits.clone()) / temperature
    wanted = TopKLogitsWarper(top_k)(text, wanted) if top_k else wanted
    wanted = TopPLogitsWarper(top_p)(text, wanted) if top_p < 1 else wanted
    wanted = MinPLogitsWarper(min_p)(text, wanted) if min_p else wanted
    mine = keep_likely(penalise(logits, rows.penalty, used) / temperature, rows)
    torch.testing.assert_close(mine.softmax(-1), wanted.softmax(-1))


def sorted_whole(scores, k):
    """Top-k by sorting the vocabulary."""
    k = min(k or scores.shape[-1], scores.shape[-1])
    return scores.masked_fill(scores < scores.sort(-1).values[:, -k:][:, :1], -torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # many logits are equal in bfloat16
@pytest.mark.parametrize("vocab", [40, 1024])
def test_top_k_draws_as_if_the_vocabulary_were_sorted(vocab, dtype):
    torch.manual_seed(0)
    ks = [0, 1, 7, 25, 250, 3 * vocab]
    logits = torch.randn(len(ks), vocab).to(dtype)
    kept = [sorted_whole(row[None].float(), k) for row, k in zip(logits, ks, strict=True)]
    for position in range(50):
        at = torch.full((len(ks),), position)
        rows = controls([Sampling(temperature=1.0, top_k=k, seed=k + 3) for k in ks])
        wanted = (torch.cat(kept) + gumbel(rows.seed, at, vocab)).argmax(-1)
        assert torch.equal(choose(logits, rows, at), wanted)
        mixed = controls([Sampling(temperature=1.0, top_k=k, seed=k + 3) for k in ks] + [Sampling(
            temperature=0.5, top_p=0.5)])  # company that needs the vocabulary sorted
        both = choose(torch.cat([logits, logits[:1]]), mixed, torch.cat([at, at[:1]]))
        assert torch.equal(both[:-1], wanted)


def test_draws_follow_the_softmax():
    noise = gumbel(torch.arange(20000), torch.zeros(20000, dtype=torch.long), 4)
    wanted = torch.tensor([0.1, 0.2, 0.3, 0.4])
    counts = (wanted.log() + noise).argmax(1).bincount(minlength=4) / 20000
    assert (counts - wanted).abs().max() < 0.015


def test_every_row_has_its_own_settings():
    torch.manual_seed(0)
    logits, position = torch.randn(5, 40), torch.tensor([3, 9, 3, 0, 7])
    seen = torch.rand(5, 40) < 0.3
    ways = [Sampling(), Sampling(temperature=0.7, seed=4), Sampling(temperature=2.0, top_k=3, seed=1),
            Sampling(repetition_penalty=3.0), Sampling(temperature=1.0, top_p=0.5, min_p=0.1, seed=2**40)]
    together = choose(logits, controls(ways), position, seen)
    for i, way in enumerate(ways):
        row = slice(i, i + 1)
        assert choose(logits[row], controls([way]), position[row], seen[row]) == together[row]
    assert together[0] == logits[0].argmax()


def test_noise_is_independent_of_the_vocabulary_that_follows_and_of_neighbouring_positions():
    seed, position = torch.zeros(1000, dtype=torch.long), torch.arange(1000)
    noise = gumbel(seed, position, 8)
    torch.testing.assert_close(noise, gumbel(seed, position, 20)[:, :8])
    assert noise.corrcoef().isfinite().all() and torch.corrcoef(noise.T).triu(1).abs().max() < 0.15
    assert torch.corrcoef(torch.stack([noise[1:, 0], noise[:-1, 0]]))[0, 1].abs() < 0.1


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0.0, "temperature": 1.0}, {"top_k": 5},
                                   {"max_tokens": 0}, {"min_p": 2.0, "temperature": 1.0}, {"stop": ("",)}])
def test_contradictory_settings_are_refused(wrong):
    with pytest.raises(InputError):
        Sampling(**wrong)
