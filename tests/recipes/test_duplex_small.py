"""The duplex model that ships: it fits its codec, and says nothing to somebody who is silent."""

import torch

from mm.recipes.talk.partner import Partner
from mm.recipes.talk.replies import Manner, replies
from mm.recipes.weights import duplex_small


def test_the_weights_are_small():
    assert sum(path.stat().st_size for path in duplex_small().iterdir()) < 24e6


def test_it_opens_with_the_codec_it_was_trained_with_and_is_silent_in_silence():
    partner = Partner.open("duplex_small", None, "cpu")
    assert partner.model.spec.own == 8 and partner.model.spec.heard == 4
    noise = 1e-3 * torch.randn(3 * partner.rate, generator=torch.Generator().manual_seed(0))
    for reply in replies(partner, [torch.zeros(3 * partner.rate), noise], Manner()):
        assert set(reply.tokens) == {partner.model.spec.text.padding}
        assert reply.wave.square().mean().sqrt() < 1e-3
