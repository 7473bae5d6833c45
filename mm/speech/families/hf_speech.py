"""transformers' models that speak: CSM and Moshi. Their files hold the codec too, which `Mimi` reads from Kyutai's;
what is written here has none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mm.checkpoint.family import Family, Keys, ensure_kept
from mm.checkpoint.fields import Values, always, extend, field, gather, pair, spell
from mm.checkpoint.hf import FILES, HARMLESS, rope_config, rope_of
from mm.checkpoint.tables import GATE_UP, STACKED, Table, WeightTransform, fused, rotary, rules_of
from mm.errors import InputError
from mm.spec import Attention, CSMSpec, Depth, DuplexSpec, Rope, Stack, TextStream, Window
from mm.text.families.decoder import STACK, WEIGHTS, layers_of, stack_pieces, widths

CODEC = "the codec, which is a model of its own"


def stack_of(keys: Keys, fields: Sequence[Any], defaults: Mapping[str, Any]) -> tuple[Stack, Values]:
    """The stack that a config describes, and the values that were read."""
    keys.left = dict(defaults) | {name: value for name, value in keys.left.items() if value is not None}
    v = gather(fields, keys)
    layers = layers_of(v)
    return Stack(dim=v["stack.dim"], layers=layers, final_norm=layers[0].norm), v


# ------------------------------------------------------------------------------------- CSM
UNREAD = HARMLESS | {"codebook_pad_token_id", "audio_token_id", "audio_eos_token_id", "tie_word_embeddings",
                     "codec_config", "depth_decoder_config"}
TEMPORAL = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "max_position_embeddings": 2048, "vocab_size": 2051, "num_codebooks": 32,
            "rope_theta": 5e5, "rms_norm_eps": 1e-5}
DEEP = TEMPORAL | {"hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
                   "max_position_embeddings": 33}
COPY = "a copy of the depth decoder's table, to which it is tied"
TABLES = ("backbone_model.embed_tokens.embed_audio_tokens.weight", "depth_decoder.model.embed_tokens.weight")


def csm_spec(config: Mapping[str, Any], where: str) -> CSMSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    keys = Keys(config, where)
    deep = Keys(config.get("depth_decoder_config") or {}, f"{where}: depth_decoder_config")
    for name in ("num_codebooks", "vocab_size", "backbone_hidden_size"):  # those of the whole model, said again
        deep.left.pop(name, None)
    if not keys.take("tie_codebooks_embeddings", bool, True):
        raise InputError(f"{where}: codebooks whose embeddings are not tied are not supported")
    (stack, v), (inner, _) = stack_of(keys, STACK, TEMPORAL), stack_of(deep, STACK, DEEP)
    spec = CSMSpec(text_vocab=keys.positive("text_vocab_size", 128256), stack=stack, card=keys.positive("vocab_size"),
                   context=v["spec.context"], end=keys.take("codebook_eos_token_id", int, 0),
                   depth=Depth(stack=inner, weights=(0,) * keys.positive("num_codebooks")))
    keys.done(UNREAD)
    deep.done({*UNREAD, "num_codebooks", "vocab_size"})
    return spec


def csm_config(spec: CSMSpec) -> dict[str, Any]:
    """Raises InputError for a model that transformers' class cannot hold."""
    count, deep = spec.depth.codebooks, spec.depth.stack
    config = spell(STACK, stack_pieces(spec.stack, spec.context)) | {
        "architectures": ["CsmForConditionalGeneration"], "model_type": "csm", "num_codebooks": count,
        "vocab_size": spec.card, "text_vocab_size": spec.text_vocab, "tie_codebooks_embeddings": True,
        "codebook_eos_token_id": spec.end, "codebook_pad_token_id": spec.card - 1,
        "codec_config": {"model_type": "mimi"},
        "depth_decoder_config": spell(STACK, stack_pieces(deep, count + 1)) | {
            "model_type": "csm_depth_decoder_model", "num_codebooks": count, "vocab_size": spec.card,
            "backbone_hidden_size": spec.stack.dim}}
    ensure_kept(spec, csm_spec(config, "config"), "hf (csm)")
    return config


CSM_WEIGHTS = {
    "embed_text_tokens.weight": "text.weight",
    **{name.replace("model.", "backbone_model."): ours for name, ours in WEIGHTS.items() if name.startswith(
        ("model.layers.", "model.norm."))},
    "lm_head.weight": "head.weight",
    "depth_decoder.model.inputs_embeds_projector.weight": "depth_input.weight",
    "depth_decoder.model.layers.{n}.input_layernorm.weight": "depth.blocks.{n}.mixer_norm.weight",
    "depth_decoder.model.layers.{n}.self_attn.[q k v]_proj.weight": "depth.blocks.{n}.mixer.qkv.weight | deep qkv",
    "depth_decoder.model.layers.{n}.self_attn.o_proj.weight": "depth.blocks.{n}.mixer.out.weight | one",
    "depth_decoder.model.layers.{n}.post_attention_layernorm.weight": "depth.blocks.{n}.mlp_norm.weight",
    "depth_decoder.model.layers.{n}.mlp.[gate up]_proj.weight": "depth.blocks.{n}.mlp.up.weight | deep up",
    "depth_decoder.model.layers.{n}.mlp.down_proj.weight": "depth.blocks.{n}.mlp.down.weight | one",
    "depth_decoder.model.norm.weight": "depth.final_norm.weight | one",
    "depth_decoder.codebooks_head.weight": "depth_head.weight | turned"}


def csm_table(spec: CSMSpec, names: Iterable[str]) -> Table:
    held, inner = set(names), spec.depth.stack.layers[0]
    which = TABLES[0] if held and TABLES[1] not in held else TABLES[1]
    transforms = {
        "qkv": fused(*widths(spec.stack.layers[0].mixer)), "deep qkv": together(widths(inner.mixer)),
        "deep up": together([inner.mlp.hidden] * 2), "rows": per_codebook(spec.depth.codebooks),
        "one": WeightTransform(lambda xs: [xs[0].unsqueeze(0)], lambda xs: [xs[0].squeeze(0)]),
        "turned": WeightTransform(lambda xs: [xs[0].transpose(1, 2)], lambda xs: [xs[0].transpose(1, 2)])}
    return Table(rules_of({which: "codes.weight | rows"} | CSM_WEIGHTS, transforms),
                 {"codec_model.{name}": CODEC} | ({TABLES[0]: COPY} if which == TABLES[1] else {}))


def per_codebook(count: int) -> WeightTransform:
    return WeightTransform(lambda xs: [xs[0].unflatten(0, (count, -1))], lambda xs: [xs[0].flatten(0, 1)])


def together(sizes: Sequence[int]) -> WeightTransform:
    """Several of theirs are the one set of weights of ours, (1, sum of sizes, D)."""
    return WeightTransform(lambda xs: [torch.cat(list(xs)).unsqueeze(0)],
                           lambda xs: list(xs[0].squeeze(0).split(list(sizes))))


# ------------------------------------------------------------------------------------- Moshi
LATER = 1  # frames by which every codebook but a voice's first is delayed
BESIDE = {"audio_encoder_config", "is_encoder_decoder", "depth_decoder_config"}
AGAIN = ("vocab_size", "audio_vocab_size", "input_size", "num_codebooks", "sliding_window")  # as in the whole model
MAIN = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 22528,
        "max_position_embeddings": 3000, "rms_norm_eps": 1e-8}
INNER = {"hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16, "ffn_dim": 5632, "rms_norm_eps": 1e-8}


def flat_rope(keys: Keys, v: Values) -> dict[str, Any]:
    rope = rope_of(keys, v["spec.context"])
    if rope.scaling is not None:
        raise InputError(f"{keys.where}: rope_parameters should not scale positions in Moshi")
    window = keys.positive("sliding_window", 3000)
    return {"mixer.rope": Rope(theta=rope.theta, layout="interleaved"),
            "mixer.window": Window(left=window - 1, right=0), "spec.window": window}


def flat_rope_keys(pieces: Any) -> dict[str, Any]:
    mixer = pieces.mixer
    if not isinstance(mixer, Attention) or mixer.rope is None or mixer.window.left is None:
        raise InputError("the hf layout of Moshi has a depth transformer, attention with rope and a window")
    window = mixer.window.left + 1
    return {"rope_parameters": rope_config(Rope(theta=mixer.rope.theta), mixer.head_dim), "sliding_window": window,
            "max_position_embeddings": window}


LAYER = extend(
    STACK, field("ffn_dim", "mlp.hidden", load=lambda width: width // 2, save=lambda width: 2 * width),
    pair("intermediate_size", lambda keys, v: None), always(norm__order="scale_then_cast"))
FLAT = extend(LAYER, pair("rope_parameters", lambda keys, v: None), pair("rope", flat_rope, flat_rope_keys))
WITHOUT = extend(LAYER, pair("rope_parameters", lambda keys, v: None), always(mixer__rope=None))


def moshi_spec(config: Mapping[str, Any], where: str) -> DuplexSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    deep = Keys(config.get("depth_decoder_config") or {}, f"{where}: depth_decoder_config")
    codec = config.get("audio_encoder_config") or {}
    keys = Keys({name: value for name, value in config.items() if name not in BESIDE}, where)
    for name in AGAIN:
        deep.left.pop(name, None)
    (stack, v), (inner, _) = stack_of(keys, FLAT, MAIN), stack_of(deep, WITHOUT, INNER)
    count = keys.positive("num_codebooks", 8)
    vocab = keys.positive("vocab_size", 32000)
    card = keys.positive("audio_vocab_size", codec.get("codebook_size", 2048))
    for one in (keys, deep):
        if one.take("tie_word_embeddings", bool, False):
            raise InputError(f"{one.where}: tied word embeddings are not supported")
        one.done(HARMLESS)
    voice = (0, *[LATER] * (count - 1))
    depth = Depth(stack=replace(inner, final_norm=None), weights=tuple(range(count)))
    return DuplexSpec(text=TextStream(vocab=vocab), stack=stack, card=card, delays=(0, *voice, *voice), depth=depth,
                      context=v["spec.window"])


def moshi_config(spec: DuplexSpec) -> dict[str, Any]:
    """Raises InputError for a model that transformers' class cannot hold."""
    if spec.depth is None:
        raise InputError("the hf layout of Moshi has a depth transformer, attention with rope and a window")
    count = spec.depth.codebooks
    same = {"vocab_size": spec.text.vocab, "audio_vocab_size": spec.card, "num_codebooks": count}
    config = spell(FLAT, stack_pieces(spec.stack, spec.context)) | same | {
        "architectures": ["MoshiForConditionalGeneration"], "model_type": "moshi", "tie_word_embeddings": False,
        "audio_encoder_config": {"model_type": "mimi", "codebook_size": spec.card},
        "depth_decoder_config": spell(WITHOUT, stack_pieces(spec.depth.stack, count + 1)) | same | {
            "model_type": "moshi_depth", "input_size": spec.stack.dim, "sliding_window": count}}
    ensure_kept(spec, moshi_spec(config, "config"), "hf (moshi)")
    return config


def joined(mixer: Attention) -> WeightTransform:
    """Query, key and value projections of every step, (steps, rows, D); ours are one."""
    return WeightTransform(lambda xs: [torch.cat(list(xs), 1)], lambda xs: list(xs[0].split(widths(mixer), 1)))


MOSHI_BLOCK = {
    "self_attn.o_proj.linear.weight": "mixer.out.weight",
    "input_layernorm.weight": "mixer_norm.weight",
    "post_attention_layernorm.weight": "mlp_norm.weight",
    "mlp.fc2.weight": "mlp.down.weight"}
SIDES = {"decoder.model.layers.{n}.": "stack.blocks.{n}.", "depth_decoder.layers.{n}.": "depth.stack.blocks.{n}."}
MOSHI_WEIGHTS = {
    "decoder.model.embed_tokens.weight": "text.weight", "decoder.lm_head.weight": "head.weight",
    "decoder.model.norm.weight": "stack.final_norm.weight",
    "depth_decoder.text_embed_tokens.weight": "depth.text.weight",
    "depth_decoder.input_projections.weight": "depth.input.weight",
    "depth_decoder.lm_heads.weight": "depth.head.weight",
    "decoder.model.layers.{n}.self_attn.[q k v]_proj.linear.weight": "stack.blocks.{n}.mixer.qkv.weight | halved",
    "depth_decoder.layers.{n}.self_attn.[q k v]_proj.linear.weight": "depth.stack.blocks.{n}.mixer.qkv.weight | joined",
    "decoder.model.layers.{n}.mlp.fc1.weight": "stack.blocks.{n}.mlp.[gate up].weight | two",
    "depth_decoder.layers.{n}.mlp.fc1.weight": "depth.stack.blocks.{n}.mlp.up.weight",
    **{theirs + name: ours + mine for theirs, ours in SIDES.items() for name, mine in MOSHI_BLOCK.items()}}


def moshi_table(spec: DuplexSpec, names: Iterable[str]) -> Table:
    mixer = spec.stack.layers[0].mixer
    transforms = {"halved": rotary(mixer.heads, mixer.kv_heads, mixer.head_dim, interleaved=False),
                  "joined": joined(spec.depth.stack.layers[0].mixer), "two": GATE_UP, "stacked": STACKED}
    rules = (*rules_of({"embed_tokens.[*].weight": "codes.weight | stacked"}, transforms, spec.codebooks),
             *rules_of({"depth_decoder.embed_tokens.[*].weight": "depth.codes.weight | stacked"}, transforms,
                       spec.own - 1), *rules_of(MOSHI_WEIGHTS, transforms))
    return Table(rules, {"audio_encoder.{name}": CODEC})


HF_CSM = Family(layout="hf", weights=FILES, has_text=True, model_types=("csm",), to_spec=csm_spec,
                from_spec=csm_config, table=csm_table)
HF_MOSHI = Family(layout="hf", weights=FILES, has_text=True, model_types=("moshi",), to_spec=moshi_spec,
                  from_spec=moshi_config, table=moshi_table, accepts=lambda config: "hidden_size" in config)
