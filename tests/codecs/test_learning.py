"""How codebooks learn: averages by hand, k-means, expiry, dropout and skipping, and two processes as one."""

from __future__ import annotations

import codec
import pytest
import torch
from books import WORLD, process, quantizer, several, vectors
from support import close

from mm.codecs import Mimi
from mm.codecs.learning import (
    add_weight_norm,
    begin,
    draw,
    folded,
    kmeans,
    learn,
    move,
    normed,
    perplexity,
    replace,
    use,
)
from mm.codecs.quantizer import Codebook, SplitQuantizer
from mm.codecs.spec import Learning
from mm.errors import InputError

PLAIN = Learning(dropout=0.0, skip=0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kept_aside(made: SplitQuantizer) -> dict[str, torch.Tensor]:
    """The codebooks as they are now."""
    return {name: value.clone() for name, value in made.state_dict().items() if "codebooks" in name}


def test_running_averages_are_those_of_the_formula():
    book = Codebook(3, 2)
    book.usage.copy_(torch.tensor([2.0, 1.0, 4.0]))
    book.sum.copy_(torch.arange(6.0).view(3, 2))
    x, code = torch.tensor([[1.0, 1.0], [3.0, 5.0], [7.0, 7.0]]), torch.tensor([0, 0, 2])
    move(book, x, code, 0.9)
    close(book.usage, torch.tensor([0.9 * 2 + 0.1 * 2, 0.9, 0.9 * 4 + 0.1]), 1e-6)
    close(book.sum, 0.9 * torch.arange(6.0).view(3, 2) + 0.1 * torch.tensor([[4.0, 6.0], [0.0, 0.0], [7.0, 7.0]]), 1e-6)


def test_kmeans_finds_clusters_and_other_entries_lie_around_them():
    places = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    x = places.repeat(25, 1) + 0.1 * torch.randn(100, 2, generator=generator())
    found = kmeans(x, 12, 50, generator())
    assert torch.cdist(places, found).amin(1).max() < 0.2
    book = Codebook(64, 2)
    begin(book, x, 50, generator())
    assert bool(book.initialized) and torch.cdist(book.table, places).amin(1).max() < 1.5
    close(book.usage.sum(), torch.tensor(100.0), 1e-3)
    assert (x - book.decode(book.encode(x))).square().mean() > 0  # 25 centres at most: something is left


def test_entries_that_are_not_used_are_replaced_by_vectors_of_the_batch():
    book = Codebook(8, 2)
    book.usage.copy_(torch.tensor([1.0] * 6 + [0.001, 0.0]))
    before, x = book.sum.clone(), torch.randn(5, 2)
    replace(book, x, 0.1, generator())
    book.refresh()
    assert torch.equal(book.sum[:6], before[:6]) and torch.cdist(book.table[6:], x).amin(1).max() < 1e-5
    assert use(book, 0.1) == 1 and 7 < perplexity(book) <= 8.01


def test_output_is_the_decoded_codes_with_the_gradient_of_the_input():
    made, x = quantizer(), vectors().requires_grad_()
    learn(made, x, PLAIN, 0, generator())  # codebooks begin
    made.eval()
    frozen = kept_aside(made)
    out = learn(made, x, PLAIN, 0, generator())
    made.load_state_dict(frozen, strict=False)  # as they were when they quantised
    assert torch.equal(out.codes, made.encode(x, 4))
    close(out.latents, made.decode(out.codes), 1e-5)
    close(out.semantic, made.semantic.decode(out.codes[:, :1]), 1e-5)
    slope, = torch.autograd.grad(out.latents.sum(), x)
    wanted, = torch.autograd.grad(sum(part.up(part.down(x)).sum() for part in (made.semantic, made.acoustic)), x)
    close(slope, wanted, 1e-5)


def test_commitment_is_the_mean_distance_to_the_entries_and_reaches_the_vectors():
    made, x = quantizer(), vectors().requires_grad_()
    learn(made, x, PLAIN, 0, generator())
    frozen = kept_aside(made)
    out = learn(made, x, PLAIN, 0, generator())
    made.load_state_dict(frozen, strict=False)
    total, left = 0.0, made.semantic.down(x)
    total += (left - made.semantic.codebooks[0].decode(out.codes[:, 0])).square().mean()
    left = made.acoustic.down(x)
    for book, code in zip(made.acoustic.codebooks, out.codes[:, 1:].unbind(1), strict=True):
        left = left - book.decode(code)
        total += left.square().mean()
    close(out.commitment, total / 4, 1e-6)
    assert torch.autograd.grad(out.commitment, x)[0].abs().sum() > 0


def test_sequences_drop_codebooks_or_skip_quantisation():
    made, x = quantizer(), vectors(64, 3)
    for settings in (Learning(dropout=0.0, skip=1.0), Learning(dropout=1.0, skip=0.0)):
        learn(made, x, settings, 0, generator())
    frozen = kept_aside(made)
    whole = learn(made, x, Learning(dropout=0.0, skip=1.0), 0, generator())
    close(whole.latents, sum(part.up(part.down(x)) for part in (made.semantic, made.acoustic)), 1e-6)
    made.load_state_dict(frozen, strict=False)
    few = learn(made, x, Learning(dropout=1.0, skip=0.0), 0, generator(5))
    made.load_state_dict(frozen, strict=False)
    kept, _ = draw(64, 3, Learning(dropout=1.0, skip=0.0), generator(5), x)
    assert set(kept.tolist()) == {0, 1, 2, 3}
    for i, count in enumerate(kept.tolist()):
        close(few.latents[i : i + 1], made.decode(few.codes[i : i + 1, : 1 + count]), 1e-5)
    _, skip = draw(4000, 3, Learning(skip=0.25), generator(), x)
    assert abs(skip.float().mean() - 0.25) < 0.03


def test_codebooks_come_to_hold_what_they_are_shown():
    made, kinds, random = quantizer(), torch.randn(8, 8, generator=generator()), generator()
    settings, losses = Learning(decay=0.9, dropout=0.0, skip=0.0), []
    for step in range(150):
        x = kinds[torch.randint(8, (4, 10), generator=random)]
        losses.append(learn(made, x, settings, step, random).commitment.item())
    assert sum(losses[-10:]) < 0.02 * sum(losses[:10])
    assert perplexity(made.semantic.codebooks[0]) > 6


def test_two_processes_hold_the_codebooks_of_one(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=WORLD)
    books, latents, codes = several(slice(None))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for name, value in books.items():
        assert torch.equal(parts[0][0][name], parts[1][0][name]), name
        close(parts[0][0][name], value, 1e-5)
    assert torch.equal(torch.cat([part[2] for part in parts]), codes)
    close(torch.cat([part[1] for part in parts]), latents, 1e-5)


def test_split_weights_are_the_same_codec_and_fold_back():
    model, x = codec.small(), codec.wave(2, 160)
    codes, wave = model.encode(x), model.decode(model.encode(x))
    names = set(model.state_dict())
    add_weight_norm(model)
    assert set(model.state_dict()) != names and len(normed(model)) == 16
    close(model.decode(codes), wave, 1e-5)
    assert len({tuple(part.parametrizations.weight.original0.shape) for part in normed(model)}) > 3
    back = folded(model)
    assert set(back.state_dict()) == names and not back.training
    close(back.decode(codes), wave, 1e-5)
    assert model.encoder.layers[0].weight is not None  # the model in training stays as it was
    assert set(folded(Mimi(codec.TINY)).state_dict()) == names


@pytest.mark.parametrize("wrong", [{"decay": 1.0}, {"skip": 1.5}, {"look": 0}, {"dropout": -0.1}])
def test_settings_without_sense_are_refused(wrong):
    with pytest.raises(InputError, match="Learning"):
        Learning(**wrong)
