"""A new CLIP from the settings of its shape, with the tokenizer that belongs to it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mm.errors import InputError
from mm.spec import CAUSAL, EVERYWHERE, Attention, Layer, LayerNorm, Mlp, Stack, drop_path_ramp
from mm.tokenizer.tokenizer import Tokenizer, clip_tokenizer, train_bpe

from ...encoders import spec
from ...encoders.audio.spectrogram import Spectrogram
from ...encoders.clip import CLIP
from ...encoders.vision.backbone import backbone_spec
from ...encoders.vision.image import Preprocess
from ...encoders.vision.vit import ViT
from .settings import AudioTower, ImageTower, Shape, TextTower, Tower

SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0  # Zhai et al., 2023


def new_clip(shape: Shape, captions: Iterable[str], siglip: bool = False) -> CLIP:
    """A model with random weights; its tokenizer is trained on the captions where `shape.text.vocab` says so. For a
    `siglip` loss the logits have an offset."""
    tokenizer = train_bpe(captions, shape.text.vocab) if shape.text.vocab else clip_tokenizer()
    name, vit = shape.image_backbone, None
    if name and ("/" in name or Path(name).is_dir()):
        vit = ViT.from_pretrained(name, dtype=torch.float32)
        image = projected(vit.spec, shape.dim)
    else:
        image = backbone_spec(name, shape.dim) if name else image_spec(shape.image, shape.dim)
    settings = spec.CLIPSpec(image=image, text=text_spec(shape.text, shape.dim, tokenizer),
                             logit_scale=math.log(shape.scale or (SIGLIP_SCALE if siglip else 1 / 0.07)),
                             logit_bias=SIGLIP_BIAS if siglip else None,
                             audio=audio_spec(shape.audio, shape.dim) if shape.audio else None)
    pictures = vit and vit.preprocessing or Preprocess(size=settings.image.image)
    clip = CLIP(settings, preprocess=pictures, tokenizer=tokenizer)
    if vit is not None:
        kept = {name: value for name, value in vit.state_dict().items() if not name.startswith("head.proj.")}
        clip.image.load_state_dict(clip.image.state_dict() | kept)
    return clip


def projected(image: spec.ViTSpec, dim: int) -> spec.ViTSpec:
    """The same tower with a new projection to the shared space."""
    return replace(image, head=replace(image.head, proj=spec.Projection(dim=dim)))


def add_bias(clip: CLIP) -> None:
    """Give a model an offset of its logits, to go on with a siglip loss."""
    clip.spec = replace(clip.spec, logit_bias=SIGLIP_BIAS)
    clip.logit_bias = nn.Parameter(torch.tensor(SIGLIP_BIAS))


def image_spec(tower: ImageTower, dim: int) -> spec.ViTSpec:
    """OpenAI's CLIP layout, as far as the pool allows, so that open_clip can read what is trained."""
    patches = spec.Patches(size=(tower.patch, tower.patch), bias=False)
    down, across = patches.grid(tower.size, tower.size)
    pools = {"token": spec.TokenPool(), "mean": spec.MeanPool(), "flatten": spec.FlattenPool(tokens=down * across)}
    return spec.ViTSpec(
        image=(tower.size, tower.size), patches=patches, cls=0 if tower.pool == "flatten" else 1,
        pre_norm=LayerNorm(), stack=stack(tower, causal=False), patch_dropout=tower.patch_dropout,
        head=spec.Head(pool=pools[tower.pool], proj=spec.Projection(dim=dim)))


def audio_spec(tower: AudioTower, dim: int) -> spec.AudioSpec:
    """A ViT over spectrograms, mels down and time across, as in AST."""
    made = Spectrogram(bins=tower.mels, frames=round(tower.seconds * 100))
    vit = spec.ViTSpec(
        image=(made.bins, made.frames), patches=spec.Patches(size=(tower.patch, tower.patch), channels=1), cls=0,
        stack=stack(tower, causal=False), patch_dropout=tower.patch_dropout,
        head=spec.Head(pool=spec.MeanPool(), proj=spec.Projection(dim=dim)))
    return spec.AudioSpec(tower=vit, spectrogram=made)


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
                      window=CAUSAL if causal else EVERYWHERE)
    mlp = Mlp(hidden=int(tower.width * tower.mlp))
    layers = [Layer(mixer=mixer, mlp=mlp, layer_scale=tower.layer_scale, drop_path=rate, dropout=tower.dropout)
              for rate in drop_path_ramp(tower.drop_path, tower.depth)]
    return Stack(dim=tower.width, layers=tuple(layers), final_norm=LayerNorm())


def can_trim(settings: spec.TextSpec) -> bool:
    """Whether padding behind the longest text changes nothing: it is not seen, or lies behind the end of a causal
    text."""
    causal = all(layer.mixer.window.right == 0 for layer in settings.stack.layers)
    at_end = isinstance(settings.head.pool, spec.ArgmaxPool | spec.EosPool)
    return settings.pad is not None or (causal and at_end)
