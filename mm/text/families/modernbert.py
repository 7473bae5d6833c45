"""transformers' ModernBERT: layers with a window alternate with layers that see everything, each with its own rope."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mm.checkpoint.family import Family, Keys
from mm.checkpoint.tables import Rule, Table, rule
from mm.errors import InputError
from mm.spec import EVERYWHERE, Attention, Embed, EncoderSpec, Layer, LayerNorm, LMHead, Mlp, Stack, Transform, Window
from mm.text.families.bert import has_head, kept, with_padding
from mm.text.families.hf import CONFIG, FILES, GATE_UP, HARMLESS, TIED, TO_HF, act_of, rope_config, rope_of
from mm.text.families.sentence import complete

MORE_HARMLESS = HARMLESS | frozenset("""
    initializer_cutoff_factor cls_token_id classifier_pooling classifier_dropout deterministic_flash_attn
    sparse_prediction sparse_pred_ignore_index reference_compile repad_logits_with_grad layer_norm_eps mlp_dropout
    embedding_dropout
""".split())  # noqa: SIM905
GLOBAL, LOCAL = "full_attention", "sliding_attention"


# ------------------------------------------------------------------------------------- config to spec
def to_spec(config: Mapping[str, Any], where: str) -> EncoderSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    keys = Keys(config, where)
    dim, context = keys.positive("hidden_size"), keys.positive("max_position_embeddings", 8192)
    norm = LayerNorm(eps=float(keys.take("norm_eps", (int, float), 1e-5)), bias=keys.take("norm_bias", bool, False))
    bias = keys.take("mlp_bias", bool, False)
    mlp = Mlp(hidden=keys.positive("intermediate_size"), act=act_of(keys, "hidden_activation", "gelu"), gated=True,
              up_bias=bias, down_bias=bias)
    layers = tuple(Layer(mixer=mixer, mlp=mlp, norm=norm, mixer_norm=i > 0)
                   for i, mixer in enumerate(mixers_of(keys, dim, context)))
    transform = Transform(act=act_of(keys, "classifier_activation", "gelu"), norm=norm,
                          bias=keys.take("classifier_bias", bool, False))
    head = LMHead(tied=keys.take("tie_word_embeddings", bool, True), bias=keys.take("decoder_bias", bool, True),
                  transform=transform)
    if keys.take("position_embedding_type", str, "absolute") not in ("absolute", "rope"):  # in files, and never read
        raise InputError(f"{where}: the position_embedding_type is not supported")
    spec = EncoderSpec(embed=Embed(vocab=keys.positive("vocab_size"), norm=norm), context=context,
                       stack=Stack(dim=dim, layers=layers, final_norm=norm), head=head if has_head(config) else None)
    keys.done(MORE_HARMLESS)
    return spec


def mixers_of(keys: Keys, dim: int, context: int) -> list[Attention]:
    depth, heads = keys.positive("num_hidden_layers"), keys.positive("num_attention_heads")
    if dim % heads:
        raise InputError(f"{keys.where}: hidden_size {dim} cannot be shared by {heads} heads")
    bias, every = keys.take("attention_bias", bool, False), keys.positive("global_attn_every_n_layers", 3)
    half = keys.positive("local_attention", 128) // 2
    thetas = {GLOBAL: keys.take("global_rope_theta", (int, float), 160000.0),
              LOCAL: keys.take("local_rope_theta", (int, float), 10000.0)}
    given = keys.take("rope_parameters", dict, {})
    windows = {GLOBAL: EVERYWHERE, LOCAL: Window(left=half, right=half)}
    mixers = {kind: Attention(
        heads=heads, kv_heads=heads, head_dim=dim // heads, q_bias=bias, k_bias=bias, v_bias=bias, out_bias=bias,
        window=windows[kind], rope=rope_of(keys, context, thetas[kind], parameters=given.get(kind)))
        for kind in windows}
    dropout = float(keys.take("attention_dropout", (int, float), 0.0))
    types = keys.take("layer_types", list, [LOCAL if i % every else GLOBAL for i in range(depth)])
    if len(types) != depth or not set(types) <= set(mixers):
        raise InputError(f"{keys.where}: layer_types should hold {depth} of {GLOBAL} and {LOCAL}, not {types}")
    return [replace(mixers[kind], dropout=dropout) for kind in types]


# ------------------------------------------------------------------------------------- spec to config
def from_spec(spec: EncoderSpec) -> dict[str, Any]:
    """Raises InputError for a model that transformers' class cannot hold."""
    layer, mixers = spec.stack.layers[0], [one.mixer for one in spec.stack.layers]
    mlp, transform = layer.mlp, spec.head.transform if spec.head else None
    shaped = all(isinstance(mixer, Attention) and mixer.rope is not None for mixer in mixers)
    if not shaped or not isinstance(mlp, Mlp) or mlp.act not in TO_HF or (spec.head and transform is None):
        raise InputError("the hf layout of modernbert has layers of attention with rope, one MLP and a transform")
    near = [mixer for mixer in mixers if mixer.window.left is not None]
    far = [mixer for mixer in mixers if mixer.window.left is None]
    ropes = {GLOBAL: (far or near)[0], LOCAL: (near or far)[0]}
    config = {
        "architectures": ["ModernBertForMaskedLM" if spec.head else "ModernBertModel"], "model_type": "modernbert",
        "pad_token_id": None, "vocab_size": spec.embed.vocab, "hidden_size": spec.stack.dim,
        "num_hidden_layers": len(mixers),
        "num_attention_heads": mixers[0].heads, "intermediate_size": mlp.hidden, "hidden_activation": TO_HF[mlp.act],
        "max_position_embeddings": spec.context, "norm_eps": layer.norm.eps, "norm_bias": layer.norm.bias,
        "attention_bias": mixers[0].q_bias, "mlp_bias": mlp.up_bias, "attention_dropout": mixers[0].dropout,
        "local_attention": 2 * near[0].window.left if near else 128,
        "layer_types": [GLOBAL if mixer.window.left is None else LOCAL for mixer in mixers],
        "rope_parameters": {kind: rope_config(mixer.rope, mixer.head_dim) for kind, mixer in ropes.items()}}
    if spec.head is not None:
        config |= {"tie_word_embeddings": spec.head.tied, "decoder_bias": spec.head.bias,
                   "classifier_activation": TO_HF[transform.act], "classifier_bias": transform.bias}
    kept(spec, to_spec(config, "config"), "modernbert")
    return config


# ------------------------------------------------------------------------------------- weights
def table(spec: EncoderSpec, names: Iterable[str]) -> Table:
    names = list(names)
    below = any(name.startswith("model.") for name in names) or (not names and spec.head is not None)
    prefix = "model." if below else ""
    theirs, ours = prefix + "layers.{n}.", "stack.blocks.{n}."
    rules = [
        rule(prefix + "embeddings.tok_embeddings.weight", "embed.tokens.weight"),
        rule(prefix + "embeddings.norm.{x}", "embed.norm.{x}"), rule(prefix + "final_norm.{x}", "stack.final_norm.{x}"),
        *layer_rules(theirs, ours, spec.stack.layers[0].mlp.up_bias)]
    if spec.head is None:
        why = "a head that the config does not name"
        return Table(tuple(rules), {"head.{name}": why, "decoder.{x}": why})
    rules += [rule("head.dense.{x}", "head.transform.dense.{x}"), rule("head.norm.{x}", "head.transform.norm.{x}"),
              rule("decoder.bias", "head.bias"), rule("decoder.weight", "head.weight")]
    return Table(tuple(rules), {"decoder.weight": TIED} if spec.head.tied else {})


def layer_rules(theirs: str, ours: str, biased: bool) -> list[Rule]:
    parts = ("weight", "bias") if biased else ("weight",)
    return [
        rule(theirs + "attn.Wqkv.{x}", ours + "mixer.qkv.{x}"), rule(theirs + "attn.Wo.{x}", ours + "mixer.out.{x}"),
        rule(theirs + "attn_norm.{x}", ours + "mixer_norm.{x}"), rule(theirs + "mlp_norm.{x}", ours + "mlp_norm.{x}"),
        *(rule(f"{theirs}mlp.Wi.{part}", (f"{ours}mlp.gate.{part}", f"{ours}mlp.up.{part}"), GATE_UP)
          for part in parts),
        rule(theirs + "mlp.Wo.{x}", ours + "mlp.down.{x}")]


MODERNBERT = Family(
    layout="hf", config=CONFIG, weights=FILES, has_text=True, to_spec=to_spec, table=table, from_spec=from_spec,
    complete=complete, model_types=("modernbert",),
    files=lambda config, extras: {CONFIG: with_padding(config, extras.tokenizer)})
