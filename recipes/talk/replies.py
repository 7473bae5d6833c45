"""What a duplex model says to people who were recorded: many dialogues as rows of one state, as fast as they go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.decode.sampling import GREEDY, Sampling

from ..data.dialogues import CHUNK, encoded
from .partner import Partner


@dataclass(frozen=True)
class Manner:
    """How tokens are chosen, and how many dialogues go on side by side. The seeds count up by dialogue."""

    text: Sampling = GREEDY
    audio: Sampling = GREEDY
    rows: int = 16


@dataclass(frozen=True)
class Reply:
    """What a person hears while they speak: wave (L,), whose frame s they hear during their own frame s, and tokens
    (T,) of its text, padding where nothing is said."""

    wave: Tensor
    tokens: list[int]


def replies(partner: Partner, users: Iterable[Tensor], manner: Manner) -> Iterator[Reply]:
    """A reply to each sound (L,) at the codec's rate, in order, as long as it is in whole frames."""
    waiting, first = iter(users), 0
    while group := list(islice(waiting, manner.rows)):
        yield from together(partner, group, manner, first)
        first += len(group)


def recorded(partner: Partner, waves: Iterable[Tensor]) -> Iterator[Reply]:
    """Sounds (L,) as if the model had said them: what its codec leaves of them, without text."""
    codec, own = partner.codec, partner.model.spec.own
    for wave in waves:
        codes = codec.encode(wave[None, None].to(partner.device), codebooks=own)
        yield Reply(codec.decode(codes)[0, 0].cpu(), [])


@torch.no_grad()
def together(partner: Partner, users: Sequence[Tensor], manner: Manner, first: int) -> list[Reply]:
    """The dialogues from number `first` on. In step s a model is given frame s - 1 and says a frame, which a person
    hears as their own frame s begins."""
    model, s, frame = partner.model, partner.model.spec, partner.frame
    lengths = [-(-len(user) // frame) for user in users]
    steps = max(*lengths, s.lag + 1)
    wave = torch.stack([F.pad(user, (0, steps * frame - len(user))) for user in users]).to(partner.device)
    heard = encoded(partner.codec, wave, s.heard)
    sessions = model.init_state(len(users), conditions=partner.conditions(len(users)), sinks=partner.sinks)
    for row in range(len(users)):
        sessions.sample(row, *(replace(one, seed=one.seed + first + row) for one in (manner.text, manner.audio)))
    said = [model.step(heard[..., max(t - 1, 0)], sessions).tokens for t in range(steps)]
    tokens = torch.stack(said[s.lag :], 2)
    spoken = partner.codec.decode(tokens[:, 1:], state=partner.codec.init_state(len(users), chunk=CHUNK))[:, 0]
    spoken = F.pad(spoken, (s.lag * frame, 0)).cpu()
    text = F.pad(tokens[:, 0], (s.lag, 0), value=s.text.padding).tolist()
    return [Reply(spoken[row, : length * frame], text[row][:length]) for row, length in enumerate(lengths)]
