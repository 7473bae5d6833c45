"""transformers' CLIPModel: a `config.json` with a part for each tower, weights under `text_model.` and `vision_model.`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mm.checkpoint.family import Extras, Family, Keys
from mm.checkpoint.fields import Entry, Pieces, Values, always, field, gather, pair, spell
from mm.checkpoint.files import CONFIG
from mm.checkpoint.hf import Kind
from mm.checkpoint.tables import SCALAR, Table, fused, reshaped, rules_of
from mm.spec import CAUSAL

from ...spec import ArgmaxPool, CLIPSpec, EosPool, GridTable, Head, Patches, Projection, TextSpec, TokenPool, ViTSpec
from .common import TRANSFORMS, ensure_kept, last_norm, pictures, projected_vit
from .hf_common import HIDDEN, PREPROCESSOR, UNREAD, pieces_of, square, stack_of, tower

LEGACY_EOS = 2  # configs from before 2023 say 2 and mean the token with the largest id
POSITION_IDS = "a buffer of 0, 1, 2, ... that old files carry"
# Keys that CLIPModel does not read, beside those of every class: generation settings that old configs list.
HARMLESS = UNREAD | frozenset("""
    projection_dim dropout tie_word_embeddings num_beam_groups diversity_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens
""".split())  # noqa: SIM905


# ------------------------------------------------------------------------------------- two towers
@dataclass(frozen=True, kw_only=True)
class PairKind(Kind):
    """A class of transformers with an image tower and a text tower: the fields of each tower's part of the config, and
    the values that it leaves out (`usual`); `make(values of both, of vision, of text)` gives the spec. What is left of
    a config that no field takes has to be known as harmless."""

    vision: Sequence[Entry]
    text: Sequence[Entry]
    usual: Mapping[str, Mapping[str, Any]]
    make: Callable[[Values, Values, Values], CLIPSpec]

    def to_spec(self, config: Mapping[str, Any], where: str) -> CLIPSpec:
        keys, towers = Keys(config, where), []
        whole = gather(self.fields, keys)
        for name, fields in (("vision", self.vision), ("text", self.text)):
            part = Keys(merged(keys, name, self.usual[name]), f"{where}: {name}_config")
            towers.append(gather(fields, part))
            part.done(HARMLESS | {"eos_token_id"})
        keys.done(HARMLESS)
        return self.make(whole, *towers)

    def pieces(self, spec: CLIPSpec) -> Pieces:
        return Pieces(clip=spec)

    def from_spec(self, spec: CLIPSpec) -> dict[str, Any]:
        image, text = spec.image, spec.text
        pieces = self.pieces(spec)  # refuses what the class is not
        vision = pieces_of(image.stack, clip=spec, vit=image, patches=image.patches)
        config = {"architectures": [self.name], "model_type": self.model_type, **spell(self.fields, pieces),
                  "vision_config": spell(self.vision, vision),
                  "text_config": spell(self.text, pieces_of(text.stack, clip=spec, text=text))}
        ensure_kept(spec, self.to_spec(config, CONFIG), "hf")
        return config

    def table(self, spec: CLIPSpec, names: Iterable[str] = ()) -> Table:
        width = spec.image.stack.dim
        changes = TRANSFORMS | {"scalar": SCALAR, "row": reshaped((1, width), (width,)),
                                "image qkv": fused(*[width] * 3), "text qkv": fused(*[spec.text.stack.dim] * 3)}
        return Table(rules_of(self.weights(spec), changes | dict(self.transforms(spec))), self.ignored)

    def family(self, **more: Any) -> Family:
        return super().family(**{"files": files, "preprocess": pictures} | more)


def merged(keys: Keys, name: str, usual: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a tower; an old `NAME_config_dict` wins over it, together with the defaults of the class."""
    given, old = keys.take(f"{name}_config", dict, {}), keys.take(f"{name}_config_dict", dict, None)
    return {**usual, **given} if old is None else {**given, **usual, **old}


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    return {PREPROCESSOR: extras.preprocess.to_hf(), CONFIG: config}


LAYERS = (*tower(dropout="attention_dropout"), HIDDEN)
BOTH = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "attention_dropout": 0.0}
PICTURE = (square("image_size", "vit.image"), square("patch_size", "patches.size"),
           field("num_channels", "patches.channels"))
TEXT = (*LAYERS, field("vocab_size", "text.vocab"), field("max_position_embeddings", "text.context"))
BLOCK = {
    "layer_norm1.{x}": "mixer_norm.{x}", "layer_norm2.{x}": "mlp_norm.{x}", "self_attn.out_proj.{x}": "mixer.out.{x}",
    "mlp.fc1.{x}": "mlp.up.{x}", "mlp.fc2.{x}": "mlp.down.{x}"}


def tower_weights(theirs: str, ours: str) -> dict[str, str]:
    """The rows of the blocks of a tower, `theirs` vision or text, `ours` image or text."""
    block = BLOCK | {"self_attn.[q k v]_proj.{x}": f"mixer.qkv.{{x}} | {ours} qkv"}
    return {f"{theirs}_model.encoder.layers.{{n}}.{name}": f"{ours}.stack.blocks.{{n}}.{mine}"
            for name, mine in block.items()}


# ------------------------------------------------------------------------------------- CLIP
def eos_pool(keys: Keys, v: Values) -> dict[str, Any]:
    eos = keys.take("eos_token_id", int)
    return {"head.pool": ArgmaxPool() if eos == LEGACY_EOS else EosPool(id=eos)}


def eos_keys(p: Pieces) -> dict[str, int]:
    pool = p.text.head.pool
    return {"eos_token_id": pool.id if isinstance(pool, EosPool) else LEGACY_EOS, "bos_token_id": 0, "pad_token_id": 1}


def projection_dim(keys: Keys, v: Values) -> dict[str, int]:
    return {"proj.dim": keys.positive("projection_dim", 512)}


def part_of(model_type: str) -> Entry:
    """What a tower's part of the config says although the whole decides it."""
    return pair("model_type", lambda keys, v: None, lambda p: {"model_type": model_type, "projection_dim": p.clip.dim})


def clip(both: Values, vision: Values, text: Values) -> CLIPSpec:
    proj, norm = Projection(dim=both["proj.dim"]), vision.make("norm")
    text["mixer.window"] = CAUSAL
    return CLIPSpec(
        image=ViTSpec(stack=stack_of(vision, final_norm=None), head=Head(pool=TokenPool(), norm=norm, proj=proj),
                      patches=Patches(bias=False, **vision.fields("patches")), pre_norm=norm, **vision.fields("vit")),
        text=TextSpec(stack=stack_of(text), head=Head(pool=text["head.pool"], proj=proj), **text.fields("text")),
        **both.fields("clip"))


class Clip(PairKind):
    """CLIPModel, whose image tower is a ViT with a projection."""

    def pieces(self, spec: CLIPSpec) -> Pieces:
        projected_vit(spec, "hf")
        return super().pieces(spec)


def clip_weights(spec: CLIPSpec) -> dict[str, str]:
    v, t = "vision_model.embeddings.", "text_model.embeddings."
    return {
        v + "patch_embedding.weight": "image.patchify.weight", v + "class_embedding": "image.cls | row",
        v + "position_embedding.weight": "image.positions.weight",
        "vision_model.pre_layrnorm.{x}": "image.pre_norm.{x}",
        **tower_weights("vision", "image"),
        "vision_model.post_layernorm.{x}": last_norm(spec.image, "image") + ".{x}",
        "visual_projection.weight": "image.head.proj.weight",
        t + "token_embedding.weight": "text.tokens", t + "position_embedding.weight": "text.positions",
        **tower_weights("text", "text"),
        "text_model.final_layer_norm.{x}": last_norm(spec.text, "text") + ".{x}",
        "text_projection.weight": "text.head.proj.weight", "logit_scale": "logit_scale | scalar"}


BUFFERS = {f"{tower}_model.embeddings.position_ids": POSITION_IDS for tower in ("text", "vision")}
HF_CLIP = Clip(
    model_type="clip", name="CLIPModel", weights=clip_weights, ignored=BUFFERS, make=clip,
    fields=(pair("projection_dim", projection_dim, lambda p: {"projection_dim": p.clip.dim}), field(
        "logit_scale_init_value", "clip.logit_scale", kind=float, default=CLIPSpec.logit_scale)),
    vision=(*LAYERS, *PICTURE, always(vit__positions=GridTable(antialias=False)),
            part_of("clip_vision_model")),
    text=(*TEXT, pair("eos_token_id", eos_pool, eos_keys),
          part_of("clip_text_model")),
    usual={"vision": BOTH | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
                             "num_channels": 3, "image_size": 224, "patch_size": 32},
           "text": BOTH | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
                           "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}}).family()
