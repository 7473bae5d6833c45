"""A new CLIP from the settings of its shape, with the tokenizer that belongs to it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from mm.errors import InputError
from mm.spec import CAUSAL, EVERYWHERE, Attention, Layer, LayerNorm, Mlp, Stack, drop_path_ramp
from mm.tokenizer import Tokenizer, clip_tokenizer, train_bpe

from ...encoders import spec
from ...encoders.clip import CLIP
from ...encoders.image import Preprocess
from .settings import ImageTower, Shape, TextTower, Tower


def new_clip(shape: Shape, captions: Iterable[str]) -> CLIP:
    """A model with random weights; its tokenizer is trained on the captions where `shape.text.vocab` says so."""
    tokenizer = train_bpe(captions, shape.text.vocab) if shape.text.vocab else clip_tokenizer()
    settings = spec.CLIPSpec(image=image_spec(shape.image, shape.dim), text=text_spec(shape.text, shape.dim, tokenizer),
                             logit_scale=math.log(shape.scale))
    return CLIP(settings, preprocess=Preprocess(size=settings.image.image), tokenizer=tokenizer)


def image_spec(tower: ImageTower, dim: int) -> spec.ViTSpec:
    """OpenAI's CLIP layout, as far as the pool allows, so that open_clip can read what is trained."""
    patches = spec.Patches(size=(tower.patch, tower.patch), bias=False)
    down, across = patches.grid(tower.size, tower.size)
    pools = {"token": spec.TokenPool(), "mean": spec.MeanPool(), "flatten": spec.FlattenPool(tokens=down * across)}
    return spec.ViTSpec(
        image=(tower.size, tower.size), patches=patches, cls=0 if tower.pool == "flatten" else 1,
        pre_norm=LayerNorm(), stack=stack(tower, causal=False), patch_dropout=tower.patch_dropout,
        head=spec.Head(pool=pools[tower.pool], proj=spec.Projection(dim=dim)))


def text_spec(tower: TextTower, dim: int, tokenizer: Tokenizer) -> spec.TextSpec:
    end = tower.pool == "end"
    return spec.TextSpec(
        vocab=tokenizer.vocab_size, context=tower.context, stack=stack(tower, causal=end),
        head=spec.Head(pool=spec.ArgmaxPool() if end else spec.MeanPool(), proj=spec.Projection(dim=dim)),
        pad=None if end else tokenizer.pad_id)


def stack(tower: Tower, causal: bool) -> Stack:
    if tower.width % tower.heads:
        raise InputError(f"a width of {tower.width} cannot be split over {tower.heads} heads")
    mixer = Attention(heads=tower.heads, kv_heads=tower.heads, head_dim=tower.width // tower.heads,
                      sight=CAUSAL if causal else EVERYWHERE)
    mlp = Mlp(hidden=int(tower.width * tower.mlp))
    layers = [Layer(mixer=mixer, mlp=mlp, layer_scale=tower.layer_scale, drop_path=rate, dropout=tower.dropout)
              for rate in drop_path_ramp(tower.drop_path, tower.depth)]
    return Stack(dim=tower.width, layers=tuple(layers), final_norm=LayerNorm())


def can_trim(settings: spec.TextSpec) -> bool:
    """Whether padding behind the longest text changes nothing: it is not seen, or lies behind the end of a causal
    text."""
    causal = all(layer.mixer.sight.right == 0 for layer in settings.stack.layers)
    at_end = isinstance(settings.head.pool, spec.ArgmaxPool | spec.EosPool)
    return settings.pad is not None or (causal and at_end)
