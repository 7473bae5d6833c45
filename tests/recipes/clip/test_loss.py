"""The tiled losses: equal to dense ones in value and gradient, and never holding the B x B logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import close
from torch.utils._python_dispatch import TorchDispatchMode

from mm.recipes.clip import loss as losses
from mm.recipes.clip.loss import clip_loss, siglip_loss


def dense_logits(image, text, scale):
    return scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T


def dense_clip(image, text, scale, group, smoothing=0.0):
    logits, same = dense_logits(image, text, scale), (group[:, None] == group).to(image.dtype)
    target = (1 - smoothing) * same / same.sum(1, keepdim=True) + smoothing / len(group)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def dense_siglip(image, text, scale, bias, group):
    sign = 2 * (group[:, None] == group).to(image.dtype) - 1
    return -F.logsigmoid(sign * (dense_logits(image, text, scale) + bias)).sum() / len(group)


def draw(rows, dtype=torch.float64, width=6, groups=None):
    image, text = (torch.randn(rows, width, dtype=dtype, requires_grad=True) for _ in range(2))
    scale, bias = (torch.tensor(value, dtype=dtype, requires_grad=True) for value in (2.3, -4.0))
    return image, text, scale, bias, torch.randint(groups, (rows,)) if groups else torch.arange(rows)


def same_gradients(ours, theirs, inputs, tolerance=1e-9):
    close(ours, theirs, tolerance)
    for mine, other in zip(*(torch.autograd.grad(y, inputs) for y in (ours, theirs)), strict=True):
        close(mine, other, tolerance)


@given(rows=st.integers(1, 23), tile=st.integers(1, 200), groups=st.integers(1, 20),
       smoothing=st.sampled_from([0.0, 0.1]))
def test_tiles_of_any_size_equal_dense(rows, tile, groups, smoothing):
    image, text, scale, bias, group = draw(rows, groups=groups)
    whole, losses.TILE = losses.TILE, tile
    try:
        same_gradients(clip_loss(image, text, scale, group, smoothing),
                       dense_clip(image, text, scale, group, smoothing), (image, text, scale))
        same_gradients(siglip_loss(image, text, scale, bias, group), dense_siglip(image, text, scale, bias, group),
                       (image, text, scale, bias))
    finally:
        losses.TILE = whole


def test_gradients_by_differences(monkeypatch):
    monkeypatch.setattr(losses, "TILE", 20)
    image, text, scale, bias, group = draw(7, groups=5)
    assert torch.autograd.gradcheck(lambda *x: clip_loss(*x, group, 0.1), (image, text, scale))
    assert torch.autograd.gradcheck(lambda *x: siglip_loss(*x, group), (image, text, scale, bias))


@pytest.mark.parametrize("offset", [0.0, 60.0])
def test_equal_to_open_clip_in_float32(offset, monkeypatch):
    peer = pytest.importorskip("open_clip.loss")
    monkeypatch.setattr(losses, "TILE", 1000)
    image, text, scale, bias, group = draw(64, torch.float32, 32)
    scale = torch.tensor(100.0 if offset else 10.0).log().requires_grad_()

    def unit():
        return [F.normalize(x, dim=-1) for x in (image, text)]
    same_gradients(clip_loss(image, text, scale, group), peer.ClipLoss()(*unit(), scale.exp()), (image, text, scale),
                   1e-5)
    same_gradients(siglip_loss(image, text, scale, bias, group), peer.SigLipLoss()(*unit(), scale.exp(), bias),
                   (image, text, scale, bias), 1e-4 if offset else 1e-5)


def test_texts_of_other_rows_are_wrong_answers():
    image, text, scale, bias, _ = draw(4)
    groups = torch.tensor([0, 1, 2, 3]), torch.tensor([9, 1, 9, 0])
    sign = 2 * (groups[0][:, None] == groups[1]).double() - 1
    dense = -F.logsigmoid(sign * (dense_logits(image, text, scale) + bias)).sum() / 4
    same_gradients(siglip_loss(image, text, scale, bias, *groups), dense, (image, text, scale, bias))


class Largest(TorchDispatchMode):
    """The most numbers that any tensor held while it was on, views of inputs aside."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.most = max(self.most, value.untyped_storage().nbytes() // value.element_size())
        return out


@pytest.mark.parametrize("loss", ["softmax", "siglip"])
def test_no_tensor_is_as_large_as_the_logits(loss, monkeypatch):
    """Forward and backward; nothing between them holds more than the features."""
    rows = 700
    monkeypatch.setattr(losses, "TILE", rows * 32)
    image, text, scale, bias, group = draw(rows, torch.float32)
    saved = []
    ours = {"softmax": lambda: clip_loss(image, text, scale, group),
            "siglip": lambda: siglip_loss(image, text, scale, bias, group)}[loss]
    watched = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x)
    with Largest() as seen, watched:
        ours().backward()
    assert seen.most <= rows * 32 and max(saved) <= image.numel()
    with Largest() as dense:
        dense_clip(image, text, scale, group).backward()
    assert dense.most == rows * rows
