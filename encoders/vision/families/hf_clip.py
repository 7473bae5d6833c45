"""transformers' CLIPModel: `config.json` of model type `clip`, weights under `text_model.` and `vision_model.`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mm.checkpoint.tables import SCALAR, Rule, Table, fused, reshaped, rule
from mm.errors import InputError
from mm.spec import CAUSAL, LayerNorm, Stack

from ...spec import (
    ArgmaxPool,
    CLIPSpec,
    EosPool,
    GridTable,
    Head,
    Patches,
    Pool,
    Projection,
    TextSpec,
    TokenPool,
    ViTSpec,
)
from .common import Extras, Family, Keys, a_vit, encoder, ensure_kept

CONFIG = "config.json"
FILES = ("model.safetensors", "pytorch_model.bin")
ACTS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
        "relu": "relu", "silu": "silu"}
LEGACY_EOS = 2  # configs from before 2023 say 2 and mean the token with the largest id
VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
          "attention_dropout": 0.0}
TEXT = {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0, "eos_token_id": 49407}
# Keys that CLIPModel does not read: bookkeeping, initialisation, and the generation settings that old configs list.
HARMLESS = frozenset("""
    _name_or_path _commit_hash _attn_implementation_autoset gradient_checkpointing architectures model_type
    transformers_version torch_dtype dtype
    initializer_range initializer_factor projection_dim dropout bos_token_id pad_token_id sep_token_id
    return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss pruned_heads
    tie_word_embeddings is_encoder_decoder is_decoder cross_attention_hidden_size add_cross_attention
    tie_encoder_decoder max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences chunk_size_feed_forward output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens finetuning_task id2label label2id
    tokenizer_class prefix decoder_start_token_id task_specific_params problem_type use_cache
""".split())  # noqa: SIM905
POSITION_IDS = "a buffer of 0, 1, 2, ... that old files carry"


# ------------------------------------------------------------------------------------- config to spec
def to_spec(config: Mapping[str, Any], where: str) -> CLIPSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    keys = Keys(config, where)
    dim = keys.positive("projection_dim", 512)
    spec = CLIPSpec(image=vision_spec(part(keys, "vision", VISION), dim), text=text_spec(part(keys, "text", TEXT), dim),
                    logit_scale=keys.take("logit_scale_init_value", (int, float), CLIPSpec.logit_scale))
    keys.done(HARMLESS)
    return spec


def part(keys: Keys, name: str, defaults: Mapping[str, Any]) -> Keys:
    """The sub-config of a tower; an old `NAME_config_dict` wins over it, together with the defaults of the class."""
    given, old = keys.take(f"{name}_config", dict, {}), keys.take(f"{name}_config_dict", dict, None)
    merged = {**defaults, **given} if old is None else {**given, **defaults, **old}
    return Keys(merged, f"{keys.where}: {name}_config")


def vision_spec(keys: Keys, embed: int) -> ViTSpec:
    stack, norm = stack_of(keys)
    spec = ViTSpec(
        image=keys.pair("image_size"), pre_norm=norm, positions=GridTable(antialias=False),
        patches=Patches(size=keys.pair("patch_size"), channels=keys.positive("num_channels"), bias=False),
        stack=encoder(**stack, final_norm=False), head=Head(pool=TokenPool(), norm=norm, proj=Projection(dim=embed)))
    keys.done(HARMLESS | {"eos_token_id"})
    return spec


def text_spec(keys: Keys, embed: int) -> TextSpec:
    stack, _ = stack_of(keys)
    spec = TextSpec(vocab=keys.positive("vocab_size"), context=keys.positive("max_position_embeddings"),
                    stack=encoder(**stack, window=CAUSAL), head=Head(pool=text_pool(keys), proj=Projection(dim=embed)))
    keys.done(HARMLESS)
    return spec


def text_pool(keys: Keys) -> Pool:
    eos = keys.take("eos_token_id", int)
    return ArgmaxPool() if eos == LEGACY_EOS else EosPool(id=eos)


def stack_of(keys: Keys) -> tuple[dict[str, Any], LayerNorm]:
    """The arguments of `encoder` that both towers read alike, and their norm."""
    dim, heads, act = keys.positive("hidden_size"), keys.positive("num_attention_heads"), keys.take("hidden_act", str)
    if act not in ACTS:
        raise InputError(f"{keys.where}: hidden_act should be one of {', '.join(ACTS)}, not {act!r}")
    if dim % heads:
        raise InputError(f"{keys.where}: hidden_size {dim} cannot be split over {heads} heads")
    norm = LayerNorm(eps=keys.take("layer_norm_eps", float))
    dropout = float(keys.take("attention_dropout", (int, float)))
    return {"dim": dim, "heads": heads, "act": ACTS[act], "norm": norm, "dropout": dropout,
            "depth": keys.positive("num_hidden_layers"), "hidden": keys.positive("intermediate_size")}, norm


# ------------------------------------------------------------------------------------- spec to config
def from_spec(spec: CLIPSpec) -> dict[str, Any]:
    """Raises InputError that names what this layout cannot hold."""
    image, text, pool = a_vit(spec, "hf"), spec.text, spec.text.head.pool
    dim = (image.head.proj or Projection(dim=0)).dim
    towers = {
        "vision_config": stack_config(image.stack) | {
            "model_type": "clip_vision_model", "projection_dim": dim, "image_size": image.image[0],
            "patch_size": image.patches.size[0], "num_channels": image.patches.channels},
        "text_config": stack_config(text.stack) | {
            "model_type": "clip_text_model", "projection_dim": dim, "vocab_size": text.vocab,
            "max_position_embeddings": text.context, "bos_token_id": 0, "pad_token_id": 1,
            "eos_token_id": pool.id if isinstance(pool, EosPool) else LEGACY_EOS}}
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": dim,
              "logit_scale_init_value": spec.logit_scale, **towers}
    ensure_kept(spec, to_spec(config, CONFIG), "hf")
    return config


def stack_config(stack: Stack) -> dict[str, Any]:
    layer = stack.layers[0]
    acts = {ours: theirs for theirs, ours in ACTS.items()}
    return {"hidden_size": stack.dim, "intermediate_size": layer.mlp.hidden, "num_hidden_layers": len(stack.layers),
            "num_attention_heads": layer.mixer.heads, "layer_norm_eps": layer.norm.eps,
            "attention_dropout": layer.mixer.dropout, "hidden_act": acts.get(layer.mlp.act, layer.mlp.act)}


# -------------------------------------------------------------------------------------------- weights
def table(spec: CLIPSpec, names: Iterable[str]) -> Table:
    width = spec.image.stack.dim
    post = "image.head.norm" if spec.image.head.norm else "image.stack.final_norm"
    rules = [
        rule("vision_model.embeddings.patch_embedding.weight", "image.patchify.weight"),
        rule("vision_model.embeddings.class_embedding", "image.cls", reshaped((1, width), (width,))),
        rule("vision_model.embeddings.position_embedding.weight", "image.positions.weight"),
        rule("vision_model.pre_layrnorm.{x}", "image.pre_norm.{x}"),
        rule("vision_model.post_layernorm.{x}", post + ".{x}"),
        rule("visual_projection.weight", "image.head.proj.weight"),
        *block_rules("vision_model.encoder.", "image.stack.", width),
        rule("text_model.embeddings.token_embedding.weight", "text.tokens"),
        rule("text_model.embeddings.position_embedding.weight", "text.positions"),
        rule("text_model.final_layer_norm.{x}",
             ("text.head.norm" if spec.text.head.norm else "text.stack.final_norm") + ".{x}"),
        rule("text_projection.weight", "text.head.proj.weight"),
        *block_rules("text_model.encoder.", "text.stack.", spec.text.stack.dim),
        rule("logit_scale", "logit_scale", SCALAR)]
    return Table(tuple(rules), {f"{tower}_model.embeddings.position_ids": POSITION_IDS for tower in ("text", "vision")})


def block_rules(theirs: str, ours: str, width: int) -> list[Rule]:
    t, o = f"{theirs}layers.{{n}}.", f"{ours}blocks.{{n}}."
    qkv = tuple(f"{t}self_attn.{name}_proj.{{x}}" for name in "qkv")
    return [rule(t + "layer_norm1.{x}", o + "mixer_norm.{x}"), rule(t + "layer_norm2.{x}", o + "mlp_norm.{x}"),
            rule(qkv, o + "mixer.qkv.{x}", fused(width, width, width)),
            rule(t + "self_attn.out_proj.{x}", o + "mixer.out.{x}"),
            rule(t + "mlp.fc1.{x}", o + "mlp.up.{x}"), rule(t + "mlp.fc2.{x}", o + "mlp.down.{x}")]


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    return {"preprocessor_config.json": extras.preprocess.to_hf(), CONFIG: config}


HF_CLIP = Family(
    layout="hf", config=CONFIG, weights=FILES, has_text=True,
    model_types=("clip",), to_spec=to_spec, from_spec=from_spec,
    table=table, files=files)
