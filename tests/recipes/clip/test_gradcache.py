"""Chunks give the gradient of the whole batch, random numbers, scale and offset included; where open_clip's do not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support import close, redraw

from mm.encoders import CLIP
from mm.encoders.spec import CLIPSpec, Head, MeanPool, Patches, Projection, TextSpec, TokenPool, ViTSpec
from mm.recipes.clip.loss import clip_loss, siglip_loss
from mm.recipes.clip.whole_batch import in_chunks
from mm.spec import Attention, Layer, LayerNorm, Mlp, Stack

ROWS = 12


def make(dropout=0.0, patch_dropout=0.0):
    mixer = Attention(heads=2, kv_heads=2, head_dim=8, dropout=dropout)
    layer = Layer(mixer=mixer, mlp=Mlp(hidden=24, dropout=dropout), dropout=dropout, drop_path=dropout)
    stack, proj = Stack(dim=16, layers=(layer,) * 2, final_norm=LayerNorm()), Projection(dim=6)
    image = ViTSpec(image=(8, 8), patches=Patches(size=(2, 2)), stack=stack, patch_dropout=patch_dropout,
                    head=Head(pool=TokenPool(), proj=proj))
    text = TextSpec(vocab=20, context=5, stack=stack, head=Head(pool=MeanPool(), proj=proj))
    return redraw(CLIP(CLIPSpec(image=image, text=text, logit_bias=-2.0))).train()


def batch():
    return torch.randn(ROWS, 3, 8, 8), torch.randint(0, 20, (ROWS, 5))


def gradients(clip, inputs, chunk, loss, keep=False):
    """`keep`: the same chunks and random numbers, but nothing is run twice."""
    torch.manual_seed(5)
    towers = clip.encode_image, clip.encode_text
    if keep:
        features = [torch.cat([tower(part) for part in x.split(chunk)])
                    for tower, x in zip(towers, inputs, strict=True)]
    else:
        features = [in_chunks(tower, x, chunk) for tower, x in zip(towers, inputs, strict=True)]
    scale, bias, group = clip.logit_scale, clip.logit_bias, torch.arange(ROWS)
    value = clip_loss(*features, scale, group) if loss == "softmax" else siglip_loss(*features, scale, bias, group)
    value.backward()
    return {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", ["softmax", "siglip"])
@pytest.mark.parametrize("chunk", [1, 5, 6, 12])
def test_without_dropout_chunks_equal_the_whole_batch(chunk, loss):
    clip, inputs = make(), batch()
    whole = gradients(copy.deepcopy(clip), inputs, None, loss)
    chunks = gradients(clip, inputs, chunk, loss)
    assert chunks.keys() == whole.keys() and "logit_scale" in whole and ("logit_bias" in whole) == (loss == "siglip")
    for name, grad in whole.items():
        close(chunks[name], grad)


@pytest.mark.parametrize("loss", ["softmax", "siglip"])
def test_dropout_and_patch_dropout_are_drawn_once(loss):
    clip, inputs = make(dropout=0.2, patch_dropout=0.5), batch()
    whole = gradients(copy.deepcopy(clip), inputs, 4, loss, keep=True)
    chunks = gradients(clip, inputs, 4, loss)
    for name, grad in whole.items():
        close(chunks[name], grad)


def test_random_numbers_go_on_as_if_nothing_had_been_run_twice():
    clip, inputs = make(dropout=0.2), batch()
    gradients(copy.deepcopy(clip), inputs, 4, "softmax", keep=True)
    expected = torch.rand(3)
    gradients(clip, inputs, 4, "softmax")
    assert torch.equal(torch.rand(3), expected)


def accumulated(clip, inputs, chunk):
    """open_clip 3.3's --accum-freq: the loss of the whole batch once per chunk, with that chunk's features fresh."""
    parts, towers = [tuple(x.split(chunk)) for x in inputs], (clip.encode_image, clip.encode_text)
    with torch.no_grad():
        cached = [[tower(x) for x in xs] for tower, xs in zip(towers, parts, strict=True)]
    for i, (x, y) in enumerate(zip(*parts, strict=True)):
        image, text = ([*held[:i], fresh, *held[i + 1:]] for held, fresh in
                       zip(cached, (clip.encode_image(x), clip.encode_text(y)), strict=True))
        clip_loss(torch.cat(image), torch.cat(text), clip.logit_scale, torch.arange(ROWS)).backward()
    return {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("count", [2, 4])
def test_accumulation_multiplies_the_gradient_of_the_scale_and_ours_does_not(count):
    clip, inputs = make(), batch()
    whole = gradients(copy.deepcopy(clip), inputs, None, "softmax")
    theirs = accumulated(copy.deepcopy(clip), inputs, ROWS // count)
    ours = gradients(clip, inputs, ROWS // count, "softmax")
    close(theirs["logit_scale"] / whole["logit_scale"], torch.tensor(float(count)), 1e-4)
    close(ours["logit_scale"], whole["logit_scale"])
    name = "image.patchify.weight"
    close(theirs[name], whole[name])


def test_no_chunk_but_the_last_is_kept():
    """What autograd holds between the passes does not grow with the number of chunks."""
    clip, x = make(), torch.randn(48, 3, 8, 8)

    def kept(chunk):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            in_chunks(clip.encode_image, x, chunk)
        return sum(sizes)
    assert kept(4) < kept(None) / 4
    assert F.mse_loss(in_chunks(clip.eval().encode_image, x, 7), clip.encode_image(x)) < 1e-10
