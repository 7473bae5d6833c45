"""The loss of duplex models against the official logits, weighted as the released models were trained."""

import duplex
import pytest
import torch
import torch.nn.functional as F
from duplex import random_codes, small

from mm.errors import InputError
from mm.recipes.duplex.loss import losses, some_frames
from mm.recipes.duplex.settings import DuplexLoss


def mean(made):
    return made.text / made.weight[0] + made.audio / made.weight[1].clamp(min=1e-9)


def plain(text, audio, codes, own, settings, padding=(3, 0)):
    """Weighted means from logits (B, T, V) and (B, K, T, card), NaN where there is none."""
    def weighted(logits, targets, weight):
        known = (targets >= 0) & ~logits[..., 0].isnan()
        entropy = F.cross_entropy(logits.nan_to_num().flatten(0, -2), targets.clamp(min=0).flatten(), reduction="none")
        weight = (weight * known).flatten()
        return (entropy * weight).sum() / weight.sum()
    words, said = codes[:, 0], codes[:, 1:1 + own]
    worth = torch.where((words == padding[0]) | (words == padding[1]), settings.text_padding, 1.0)
    first = torch.tensor([settings.first_codebook] + [1.0] * (own - 1))[:, None].expand(said.shape)
    return weighted(text, words, worth) + weighted(audio, said, first)


@pytest.mark.parametrize("shape", ["moshi", "tts", "2b"])
def test_the_loss_of_the_official_logits(tmp_path, monkeypatch, shape):
    monkeypatch.setenv("NO_TORCH_COMPILE", "1")
    pytest.importorskip("moshi", reason="the official package")
    theirs, ours, config = duplex.pair(shape, tmp_path)
    codes, values = duplex.codes(config, 3, 30, holes=0.1), duplex.told(config, 3)
    codes[:, 0, ::2] = 3
    settings = DuplexLoss(first_codebook=7.0, text_padding=0.3)
    with torch.no_grad():
        out = theirs(codes, duplex.official_conditions(theirs, values))
        wanted = plain(out.text_logits[:, 0], out.logits, codes, config["dep_q"], settings)
        made = losses(ours, codes, settings, conditions=ours.condition(values, 3))
    torch.testing.assert_close(mean(made), wanted, atol=1e-5, rtol=1e-6)
    assert made.said.sum() == out.mask.sum() and made.words == out.text_mask.sum()
    best = out.logits.argmax(-1)
    right = ((best == codes[:, 1:1 + config["dep_q"]]) & out.mask).sum((0, 2))
    assert torch.equal(made.right.long(), right)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_packed_conversations_in_float64(bias, monkeypatch):
    monkeypatch.setattr("mm.recipes.duplex.loss.LOGITS", 200)  # several chunks
    model = small(head_bias=bias).double().train()
    codes, settings = random_codes(model, 2, 12), DuplexLoss(first_codebook=5.0)
    codes[:, 1, 4] = -1
    documents = torch.tensor([[0] * 5 + [1] * 7, [2] * 9 + [-1] * 3])
    parameters = [p for p in model.parameters() if p.requires_grad]
    made = torch.autograd.grad(mean(losses(model, codes, settings, documents)), parameters)
    logits = model(codes, documents=documents)
    targets = codes.masked_fill((documents < 0)[:, None], -1)
    wanted = torch.autograd.grad(plain(logits.text, logits.audio, targets, 4, settings), parameters)
    for ours, theirs in zip(made, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-8)


def test_what_is_heard_has_no_loss_and_a_model_without_audio_has_one_of_text():
    model = small()
    codes, settings = random_codes(model, 1, 10), DuplexLoss()
    made = losses(model, codes, settings)
    assert made.said.tolist() == [10, 8, 8, 8]
    other = codes.clone()
    other[:, 5:, 9] = 0  # the last frame heard is before nothing
    assert torch.equal(mean(losses(model, other, settings)), mean(made))
    stt = small(depth=None)
    made = losses(stt, codes, settings)
    assert made.audio == 0 and made.right.shape == (0,) and torch.isfinite(mean(made))


def test_codes_of_chosen_frames_and_the_text_of_all():
    model = small().double()
    codes, settings = random_codes(model, 2, 12), DuplexLoss()
    whole = losses(model, codes, settings)
    parts = [losses(model, codes, settings, deep=torch.tensor(frames)) for frames in ([20, 3, 11, 0], [7, 13])]
    others = [i for i in range(24) if i not in (20, 3, 11, 0, 7, 13)]
    parts.append(losses(model, codes, settings, deep=torch.tensor(others)))
    torch.testing.assert_close(sum(part.audio for part in parts), whole.audio)
    assert torch.equal(sum(part.said for part in parts), whole.said)
    assert torch.equal(sum(part.right for part in parts), whole.right)
    for part in parts:
        torch.testing.assert_close(part.text, whole.text)


def test_frames_in_which_nothing_changes_are_learned_from_less():
    codes = torch.arange(400).expand(2, -1).clone()
    codes[1, 100:] = 7  # the third frame of these is the first that is still
    random, counts, steps = torch.Generator().manual_seed(0), torch.zeros(800), 200
    for _ in range(steps):
        frames = some_frames(codes, DuplexLoss(depth=0.1, still=0.1), random)
        assert len(frames) == len(frames.unique()) == 80
        counts[frames] += 1
    moving, still = counts[:502], counts[502:]
    assert 7 < moving.mean() / still.mean() < 10.5  # none is drawn twice in a step: a little less than ten times
    assert moving.min() > still.max()


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_few_frames(frames):
    drawn = some_frames(torch.zeros(2, frames, dtype=torch.long), DuplexLoss(depth=0.5, still=0.5), torch.Generator())
    assert len(drawn) == frames
    assert some_frames(torch.zeros(2, frames), DuplexLoss(still=0.5), torch.Generator()) is None


@pytest.mark.parametrize("name", ["depth", "still"])
def test_shares_of_frames(name):
    with pytest.raises(InputError, match=rf"loss.{name} must lie in \(0, 1\], not 0"):
        DuplexLoss(**{name: 0})
