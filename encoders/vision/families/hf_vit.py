"""transformers' ViT, DeiT and Audio Spectrogram Transformer: one encoder, three beginnings and several heads."""

from __future__ import annotations

from typing import Any

from mm.checkpoint.family import Keys
from mm.checkpoint.fields import Values, always, extend, pair
from mm.checkpoint.files import Folder
from mm.errors import InputError

from ...audio.spectrogram import Spectrogram
from ...spec import GridTable, Head, PrefixPool, Projection, TokenPool, ViTSpec
from .common import TWO_HEADS
from .hf_common import DROPOUT, HIDDEN, PICTURE, QKV_BIAS, HeadKind, VisionKind, classifier, square, tower


def tanh_only(keys: Keys, v: Values) -> None:
    if (given := keys.take("pooler_act", str, "tanh")) != "tanh":
        raise InputError(f"{keys.where}: pooler_act should be tanh, not {given!r}")


ENCODER = (
    *tower(1e-12, hidden_size=768, num_hidden_layers=12, hidden_act="gelu"), HIDDEN, QKV_BIAS, DROPOUT,
    square("patch_size", "patches.size", 16), always(vit__positions=GridTable(antialias=False)))
VIT = (*ENCODER, *PICTURE, pair("pooler_act", tanh_only), always(vit__cls=1))
DEIT = extend(VIT, always(vit__cls=2))
AST = (*ENCODER, always(vit__cls=2, patches__channels=1), pair(
    "num_mel_bins",  # bins from top to bottom, frames from left to right
    lambda keys, v: {"vit.image": (keys.positive("num_mel_bins", 128), keys.positive("max_length", 1024))},
    lambda p: dict(zip(("num_mel_bins", "max_length"), p.vit.image, strict=True))), pair(
    "frequency_stride",
    lambda keys, v: {"patches.stride": tuple(keys.positive(f"{axis}_stride", 10) for axis in ("frequency", "time"))},
    lambda p: dict(zip(("frequency_stride", "time_stride"), p.patches.stride or p.patches.size, strict=True))))
WEIGHTS = {
    "embeddings.cls_token": "cls | batched",
    "embeddings.position_embeddings": "positions.weight | batched",
    "embeddings.patch_embeddings.projection.{x}": "patchify.{x}",
    "encoder.layer.{n}.layernorm_before.{x}": "stack.blocks.{n}.mixer_norm.{x}",
    "encoder.layer.{n}.attention.attention.[query key value].{x}": "stack.blocks.{n}.mixer.qkv.{x} | qkv",
    "encoder.layer.{n}.attention.output.dense.{x}": "stack.blocks.{n}.mixer.out.{x}",
    "encoder.layer.{n}.layernorm_after.{x}": "stack.blocks.{n}.mlp_norm.{x}",
    "encoder.layer.{n}.intermediate.dense.{x}": "stack.blocks.{n}.mlp.up.{x}",
    "encoder.layer.{n}.output.dense.{x}": "stack.blocks.{n}.mlp.down.{x}",
    "layernorm.{x}": "stack.final_norm.{x}"}
TWO = {**WEIGHTS, "embeddings.cls_token": "", "embeddings.[cls_token distillation_token]": "cls | two tokens"}

# ------------------------------------------------------------------------------------- heads
POOLER = HeadKind(lambda dim, classes, norm: Head(pool=TokenPool(), proj=Projection(dim=dim, bias=True, act="tanh")),
                  {"pooler.dense.{x}": "head.proj.{x}"})
TEACHER = HeadKind(classifier(TWO_HEADS).make, {
    "[cls distillation]_classifier.weight": "head.proj.weight | half each",
    "[cls distillation]_classifier.bias": "head.proj.bias | mean of both"}, True)
MEAN = HeadKind(lambda dim, classes, norm: Head(pool=PrefixPool(tokens=2)), {})
MEAN_CLASSIFIER = HeadKind(
    lambda dim, classes, norm: Head(pool=PrefixPool(tokens=2), norm=norm, proj=Projection(dim=classes, bias=True)),
    {"classifier.layernorm.{x}": "head.norm.{x}", "classifier.dense.{x}": "head.proj.{x}"}, True)


def sounds(folder: Folder, spec: ViTSpec) -> Any:
    return Spectrogram.from_files(folder, spec.image)


HEADS = {"num_attention_heads": 12}
HF_VIT = (
    VisionKind(model_type="vit", fields=VIT, weights=WEIGHTS, under="vit.", defaults=HEADS, heads={
        "ViTModel": POOLER, "ViTForImageClassification": classifier(TokenPool())}).family(),
    VisionKind(model_type="deit", fields=DEIT, weights=TWO, under="deit.", defaults=HEADS, heads={
        "DeiTModel": POOLER, "DeiTForImageClassification": classifier(TokenPool()),
        "DeiTForImageClassificationWithTeacher": TEACHER}).family(),
    VisionKind(model_type="audio-spectrogram-transformer", fields=AST, weights=TWO,
               under="audio_spectrogram_transformer.", defaults=HEADS, heads={
                   "ASTModel": MEAN, "ASTForAudioClassification": MEAN_CLASSIFIER}).family(preprocess=sounds))
