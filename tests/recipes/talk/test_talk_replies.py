"""Replies to recorded people: what a live conversation would have been, frame for frame."""

from dataclasses import replace

import numpy as np
import pytest
import talking
import torch
from talking import FRAME, speech

from mm.recipes.talk.dialogues import Dialogues
from mm.recipes.talk.replies import Manner, recorded, replies
from mm.recipes.talk.wishes import Wishes
from mm.speech.dialogue import AUDIO, TEXT


@pytest.fixture(scope="module")
def partner():
    return talking.partner()


def live(partner, wave, text, audio):
    """(wave, tokens) that a person hears from `mm talk`, to whose first step a frame is given that is not read."""
    held, said = Dialogues(partner, 1), []
    held.enter("one", Wishes(text=text, audio=audio))
    for frame in (np.zeros(FRAME, np.float32), *wave.reshape(-1, FRAME)[:-1]):
        said.append(held.step({"one": frame})["one"])
    quiet = np.zeros(FRAME, np.float32)
    return (np.concatenate([quiet if one is None else one.wave for one in said]),
            [partner.model.spec.text.padding if one is None else one.token for one in said])


@pytest.mark.parametrize(("text", "audio"), [(Manner().text, Manner().audio), (TEXT, AUDIO)])
def test_a_reply_is_what_a_person_would_have_heard(partner, text, audio):
    """Of different lengths, in two groups, each with a seed of its own."""
    waves = [speech(frames, seed) for seed, frames in enumerate((9, 30, 4))]
    manner = Manner(replace(text, seed=5), replace(audio, seed=5), rows=2)
    made = list(replies(partner, map(torch.from_numpy, waves), manner))
    for i, (wave, reply) in enumerate(zip(waves, made, strict=True)):
        wanted, tokens = live(partner, wave, replace(text, seed=5 + i), replace(audio, seed=5 + i))
        assert reply.tokens == tokens and np.abs(reply.wave.numpy() - wanted).max() < 1e-5


def test_a_sound_shorter_than_the_lag_is_met_with_silence(partner):
    short = list(replies(partner, [torch.zeros(100)], Manner()))[0]
    assert short.wave.shape == (FRAME,) and not short.wave.any() and len(short.tokens) == 1


def test_recorded_answers_are_what_the_codec_leaves(partner):
    wave = torch.from_numpy(speech(6))
    made = next(recorded(partner, [wave]))
    codes = partner.codec.encode(wave[None, None], codebooks=partner.model.spec.own)
    assert torch.equal(made.wave, partner.codec.decode(codes)[0, 0]) and not made.tokens
