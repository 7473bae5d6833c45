"""transformers' ViT, DeiT and Audio Spectrogram Transformer: one encoder, three beginnings and several heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mm.checkpoint.tables import Rule, Table, rule
from mm.errors import InputError
from mm.spec import Layer, Mlp, Stack

from ...audio.spectrogram import Spectrogram
from ...spec import GridTable, Head, Patches, PrefixPool, Projection, TokenPool, ViTSpec
from .common import Extras, Family, ensure_kept, pictures
from .hf_common import (
    CONFIG,
    FILES,
    HARMLESS,
    PRETRAINING_ONLY,
    act_of,
    attention,
    classes,
    label_config,
    labels,
    layers_of,
    legacy_rules,
    norm_of,
    one_size,
    start,
)
from .transforms import BATCHED, HALF_EACH, MEAN_OF_BOTH, TWO_TOKENS

POOLER, CLASSIFIER, TEACHER, MEAN, MEAN_CLASSIFIER = "pooler", "classifier", "teacher", "mean", "mean classifier"
KINDS = {  # model type: its architectures, and the prefix of its weights below a head
    "vit": ({"ViTModel": POOLER, "ViTForImageClassification": CLASSIFIER}, "vit."),
    "deit": ({"DeiTModel": POOLER, "DeiTForImageClassification": CLASSIFIER,
              "DeiTForImageClassificationWithTeacher": TEACHER}, "deit."),
    "audio-spectrogram-transformer": ({"ASTModel": MEAN, "ASTForAudioClassification": MEAN_CLASSIFIER},
                                      "audio_spectrogram_transformer."),
}


# ------------------------------------------------------------------------------------- config to spec
def to_spec(config: Mapping[str, Any], where: str) -> ViTSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    kind = config["model_type"]
    keys, head = start(config, where, KINDS[kind][0])
    dim, norm, bias = keys.positive("hidden_size", 768), norm_of(keys, 1e-12), keys.take("qkv_bias", bool, True)
    mixer = attention(keys, dim, q_bias=bias, k_bias=bias, v_bias=bias)
    mlp = Mlp(hidden=keys.positive("intermediate_size", 3072), act=act_of(keys))
    layer = Layer(mixer=mixer, mlp=mlp, norm=norm, dropout=float(keys.take("hidden_dropout_prob", (int, float), 0.0)))
    image, patches = sound(keys) if head in (MEAN, MEAN_CLASSIFIER) else picture(keys)
    spec = ViTSpec(image=image, patches=patches, cls=1 if kind == "vit" else 2, positions=GridTable(antialias=False),
                   stack=Stack(dim=dim, layers=(layer,) * keys.positive("num_hidden_layers", 12), final_norm=norm),
                   head=heads(head, dim, classes(config), norm, keys.take("pooler_act", str, "tanh")))
    keys.done(HARMLESS)
    return spec


def picture(keys: Any) -> tuple[tuple[int, int], Patches]:
    return keys.pair("image_size", 224), Patches(size=keys.pair("patch_size", 16),
                                                 channels=keys.positive("num_channels", 3))


def sound(keys: Any) -> tuple[tuple[int, int], Patches]:
    """Mel bins down, frames across."""
    image = keys.positive("num_mel_bins", 128), keys.positive("max_length", 1024)
    stride = keys.positive("frequency_stride", 10), keys.positive("time_stride", 10)
    return image, Patches(size=keys.pair("patch_size", 16), stride=stride, channels=1)


def heads(kind: str, dim: int, count: int, norm: Any, act: str) -> Head:
    match kind:
        case "pooler":
            if act != "tanh":
                raise InputError(f"pooler_act should be tanh, not {act!r}")
            return Head(pool=TokenPool(), proj=Projection(dim=dim, bias=True, act="tanh"))
        case "classifier":
            return Head(pool=TokenPool(), proj=Projection(dim=count, bias=True))
        case "teacher":
            return Head(pool=PrefixPool(tokens=2, join="concat"), proj=Projection(dim=count, bias=True))
        case "mean":
            return Head(pool=PrefixPool(tokens=2))
    return Head(pool=PrefixPool(tokens=2), norm=norm, proj=Projection(dim=count, bias=True))


# ------------------------------------------------------------------------------------- spec to config
def kind_of(spec: ViTSpec) -> tuple[str, str]:
    """(model type, architecture) that may hold a spec."""
    pool, proj = spec.head.pool, spec.head.proj
    if spec.patches.stride:
        return "audio-spectrogram-transformer", "ASTForAudioClassification" if proj else "ASTModel"
    if pool == PrefixPool(tokens=2, join="concat"):
        return "deit", "DeiTForImageClassificationWithTeacher"
    names = {1: ("vit", "ViT"), 2: ("deit", "DeiT")}
    if spec.cls not in names or proj is None:
        raise InputError("the hf layout of ViT needs a class token and a pooler or classifier")
    model, title = names[spec.cls]
    return model, f"{title}Model" if proj.act == "tanh" else f"{title}ForImageClassification"


def from_spec(spec: ViTSpec) -> dict[str, Any]:
    """Raises InputError that names what this layout cannot hold."""
    model, architecture = kind_of(spec)
    layer, proj, patches = next(iter(spec.stack.layers), None), spec.head.proj, spec.patches
    config = {"architectures": [architecture], "model_type": model, **layers_of(spec.stack),
              "intermediate_size": layer.mlp.hidden, "qkv_bias": layer.mixer.q_bias}
    if patches.stride:
        if patches.size[0] != patches.size[1]:
            raise InputError(f"the hf layout of AST has square patches, not {patches.size}")
        config |= {"num_mel_bins": spec.image[0], "max_length": spec.image[1], "patch_size": patches.size[0],
                   "frequency_stride": patches.stride[0], "time_stride": patches.stride[1]}
    else:
        image, patch = one_size(spec, "hf")
        config |= {"image_size": image, "patch_size": patch, "num_channels": patches.channels}
    numbered = label_config(Extras(), proj, architecture not in ("ViTModel", "DeiTModel"))
    ensure_kept(spec, to_spec(config | numbered, CONFIG), "hf")
    return config | numbered


# -------------------------------------------------------------------------------------------- weights
def table(spec: ViTSpec, names: Iterable[str]) -> Table:
    model, architecture = kind_of(spec)
    below = "" if architecture.endswith("Model") else KINDS[model][1]
    t, o = below + "encoder.layer.{n}.", "stack.blocks.{n}."
    tokens = tuple(f"{below}embeddings.{name}" for name in ("cls_token", "distillation_token"))
    return Table((
        rule(tokens, "cls", TWO_TOKENS) if spec.cls == 2 else rule(tokens[0], "cls", BATCHED),
        rule(below + "embeddings.position_embeddings", "positions.weight", BATCHED),
        rule(below + "embeddings.patch_embeddings.projection.{x}", "patchify.{x}"),
        *legacy_rules(below, spec.stack.dim, spec.stack.layers[0].mixer.q_bias),
        rule(t + "layernorm_before.{x}", o + "mixer_norm.{x}"), rule(t + "layernorm_after.{x}", o + "mlp_norm.{x}"),
        rule(t + "intermediate.dense.{x}", o + "mlp.up.{x}"), rule(t + "output.dense.{x}", o + "mlp.down.{x}"),
        rule(below + "layernorm.{x}", "stack.final_norm.{x}"), *head_rules(architecture)),
        {below + "embeddings.mask_token": PRETRAINING_ONLY})


def head_rules(architecture: str) -> list[Rule]:
    if architecture == "DeiTForImageClassificationWithTeacher":
        both = [tuple(f"{name}_classifier.{x}" for name in ("cls", "distillation")) for x in ("weight", "bias")]
        return [rule(both[0], "head.proj.weight", HALF_EACH), rule(both[1], "head.proj.bias", MEAN_OF_BOTH)]
    if architecture == "ASTForAudioClassification":
        return [rule("classifier.layernorm.{x}", "head.norm.{x}"), rule("classifier.dense.{x}", "head.proj.{x}")]
    return [rule(f"{'pooler.dense' if architecture.endswith('Model') else 'classifier'}.{{x}}", "head.proj.{x}")]


def preprocess(folder: Path, spec: ViTSpec) -> Any:
    return Spectrogram.from_files(folder, spec.image) if spec.patches.stride else pictures(folder, spec)


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    named = config
    if "id2label" in config and extras.labels:
        named = config | label_config(extras, Projection(dim=len(config["id2label"]), bias=True), True)
    beside = {"preprocessor_config.json": extras.preprocess.to_hf()} if extras.preprocess else {}
    return {**beside, CONFIG: named}


HF_VIT = Family(layout="hf", config=CONFIG, weights=FILES, model_types=tuple(KINDS),
                to_spec=to_spec, from_spec=from_spec, table=table, files=files, preprocess=preprocess, labels=labels)
