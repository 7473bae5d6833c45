"""CSM as transformers' CsmForConditionalGeneration keeps it, whose files hold the codec too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mm.checkpoint.family import Extras, Family, Keys, ensure_kept
from mm.checkpoint.tables import Table, WeightTransform, rule
from mm.errors import InputError
from mm.spec import Attention, CSMSpec, Depth, Layer, Mlp, RMSNorm, Stack
from mm.speech.families.hf_moshi import CODEC
from mm.text.families.decoder import PRE_NORMS, Size, attention_of, attention_rules, mlp_of, mlp_rules, norm_rules
from mm.text.families.hf import CONFIG, FILES, HARMLESS, TO_HF, rope_config

UNREAD = HARMLESS | {"codebook_pad_token_id", "audio_token_id", "audio_eos_token_id", "use_cache"}
TEMPORAL = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "max_position_embeddings": 2048, "vocab_size": 2051, "num_codebooks": 32,
            "rope_theta": 5e5, "rms_norm_eps": 1e-5}
DEEP = TEMPORAL | {"hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
                   "max_position_embeddings": 33}
COPY = "a copy of the depth decoder's table, to which it is tied"
TABLES = ("backbone_model.embed_tokens.embed_audio_tokens.weight", "depth_decoder.model.embed_tokens.weight")


def to_spec(config: Mapping[str, Any], where: str) -> CSMSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    told = {name: value for name, value in config.items() if name not in ("codec_config", "depth_decoder_config")}
    keys = Keys(defaults(told, TEMPORAL), where)
    deep = Keys(defaults(config.get("depth_decoder_config") or {}, DEEP), f"{where}: depth_decoder_config")
    count, card = keys.positive("num_codebooks"), keys.positive("vocab_size")
    if not keys.take("tie_codebooks_embeddings", bool, True):
        raise InputError(f"{where}: codebooks whose embeddings are not tied are not supported")
    for name in ("num_codebooks", "vocab_size", "backbone_hidden_size"):  # those of the whole model, said again
        deep.left.pop(name, None)
    keys.left.pop("tie_word_embeddings", None)
    context = keys.left["max_position_embeddings"]
    spec = CSMSpec(text_vocab=keys.positive("text_vocab_size", 128256), stack=to_stack(keys), card=card,
                   context=context, end=keys.take("codebook_eos_token_id", int, 0),
                   depth=Depth(stack=to_stack(deep), weights=(0,) * count))
    for one in (keys, deep):
        one.done(UNREAD)
    return spec


def defaults(config: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in config.items() if value is not None}
    return {**known, **given}


def to_stack(keys: Keys) -> Stack:
    size = Size(keys.positive("hidden_size"), keys.positive("num_hidden_layers"),
                keys.positive("max_position_embeddings"))
    norm = RMSNorm(eps=float(keys.take("rms_norm_eps", (int, float))))
    layer = Layer(mixer=attention_of(keys, size), mlp=mlp_of(keys), norm=norm)
    return Stack(dim=size.dim, layers=(layer,) * size.depth, final_norm=norm)


def from_spec(spec: CSMSpec) -> dict[str, Any]:
    """Raises InputError for a model that transformers' class cannot hold."""
    count = spec.depth.codebooks
    config = stack_config(spec.stack, spec.context) | {
        "architectures": ["CsmForConditionalGeneration"], "model_type": "csm", "num_codebooks": count,
        "vocab_size": spec.card, "text_vocab_size": spec.text_vocab, "tie_codebooks_embeddings": True,
        "codebook_eos_token_id": spec.end, "codebook_pad_token_id": spec.card - 1,
        "codec_config": {"model_type": "mimi"},
        "depth_decoder_config": stack_config(spec.depth.stack, count + 1) | {
            "model_type": "csm_depth_decoder_model", "num_codebooks": count, "vocab_size": spec.card,
            "backbone_hidden_size": spec.stack.dim}}
    ensure_kept(spec, to_spec(config, "config"), "hf (csm)")
    return config


def stack_config(stack: Stack, context: int) -> dict[str, Any]:
    layer = stack.layers[0]
    mixer, mlp = layer.mixer, layer.mlp
    if not isinstance(mixer, Attention) or mixer.rope is None or not isinstance(mlp, Mlp) or mlp.act not in TO_HF:
        raise InputError("the hf layout of CSM has Llama's layers")
    return {"hidden_size": stack.dim, "num_hidden_layers": len(stack.layers), "num_attention_heads": mixer.heads,
            "num_key_value_heads": mixer.kv_heads, "head_dim": mixer.head_dim, "intermediate_size": mlp.hidden,
            "hidden_act": TO_HF[mlp.act], "rms_norm_eps": layer.norm.eps, "max_position_embeddings": context,
            "rope_parameters": rope_config(mixer.rope, mixer.head_dim)}


def table(spec: CSMSpec, names: Iterable[str]) -> Table:
    held, count = set(names), spec.depth.codebooks
    which = TABLES[0] if held and TABLES[1] not in held else TABLES[1]
    theirs, ours = "depth_decoder.model.layers.{n}.", "depth.blocks.{n}."
    mixer = spec.depth.stack.layers[0].mixer
    sizes = [heads * mixer.head_dim for heads in (mixer.heads, mixer.kv_heads, mixer.kv_heads)]
    rules = [
        rule(which, "codes.weight", per_codebook(count)), rule("embed_text_tokens.weight", "text.weight"),
        rule("backbone_model.norm.weight", "stack.final_norm.weight"), rule("lm_head.weight", "head.weight"),
        rule("depth_decoder.model.inputs_embeds_projector.weight", "depth_input.weight"),
        rule("depth_decoder.model.norm.weight", "depth.final_norm.weight", ONE),
        rule("depth_decoder.codebooks_head.weight", "depth_head.weight", TURNED),
        rule(tuple(f"{theirs}self_attn.{x}_proj.weight" for x in "qkv"), ours + "mixer.qkv.weight", together(sizes)),
        rule(theirs + "self_attn.o_proj.weight", ours + "mixer.out.weight", ONE),
        rule((theirs + "mlp.gate_proj.weight", theirs + "mlp.up_proj.weight"), ours + "mlp.up.weight",
             together([spec.depth.stack.layers[0].mlp.hidden] * 2)),
        rule(theirs + "mlp.down_proj.weight", ours + "mlp.down.weight", ONE), *norm_rules(theirs, ours, PRE_NORMS)]
    theirs, ours = "backbone_model.layers.{n}.", "stack.blocks.{n}."
    rules += [*attention_rules(theirs, ours, spec.stack.layers[0].mixer), *mlp_rules(theirs, ours),
              *norm_rules(theirs, ours, PRE_NORMS)]
    return Table(tuple(rules), {"codec_model.{name}": CODEC} | ({TABLES[0]: COPY} if which == TABLES[1] else {}))


ONE = WeightTransform(lambda xs: [xs[0].unsqueeze(0)], lambda xs: [xs[0].squeeze(0)])
TURNED = WeightTransform(lambda xs: [xs[0].transpose(1, 2)], lambda xs: [xs[0].transpose(1, 2)])


def per_codebook(count: int) -> WeightTransform:
    return WeightTransform(lambda xs: [xs[0].unflatten(0, (count, -1))], lambda xs: [xs[0].flatten(0, 1)])


def together(sizes: list[int]) -> WeightTransform:
    """Several of theirs are the one set of weights of ours, (1, sum of sizes, D)."""
    return WeightTransform(lambda xs: [torch.cat(list(xs)).unsqueeze(0)],
                           lambda xs: list(xs[0].squeeze(0).split(sizes)))


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    return {CONFIG: config}


HF_CSM = Family(layout="hf", config=CONFIG, weights=FILES, to_spec=to_spec, from_spec=from_spec, table=table,
                files=files, has_text=True, model_types=("csm",))
