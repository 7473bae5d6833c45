"""transformers' T5, version 1.0 and 1.1 (Raffel et al., 2020; FLAN-T5 and UL2 are of this kind)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mm.checkpoint.family import Family, Keys, Opened, ensure_kept
from mm.checkpoint.files import Folder
from mm.checkpoint.tables import Rule, Table, fused, rule
from mm.errors import InputError
from mm.spec import (
    CAUSAL,
    EVERYWHERE,
    Attention,
    Buckets,
    DecoderSpec,
    Embed,
    EncoderSpec,
    Layer,
    LMHead,
    Mlp,
    RMSNorm,
    Seq2SeqSpec,
    Stack,
)
from mm.text.families.hf import ACTS, CONFIG, FILES, HARMLESS, TIED, TO_HF, answer_ids, padding_id

UNREAD = HARMLESS | {"dense_act_fn", "is_gated_act", "classifier_dropout"}
PARTS = ("q", "k", "v")
HEAD = "lm_head.weight"
NO_BIAS = "a position bias that cross-attention never had"


# ------------------------------------------------------------------------------------- config to spec
def to_spec(config: Mapping[str, Any], where: str) -> Seq2SeqSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    keys = Keys(config, where)
    dim, depth = keys.positive("d_model"), keys.positive("num_layers")
    deep = {"encoder": depth, "decoder": keys.positive("num_decoder_layers", depth)}
    layer = layer_of(keys)
    embed = Embed(vocab=keys.positive("vocab_size"), dropout=layer.dropout)
    buckets = {"count": keys.positive("relative_attention_num_buckets", 32),
               "distance": keys.positive("relative_attention_max_distance", 128)}
    context = keys.positive("n_positions", 512)
    encoder = stack(dim, layer, deep["encoder"], Buckets(**buckets))
    tied = keys.take("tie_word_embeddings", bool, True)
    scaled = keys.take("scale_decoder_outputs", bool, tied)
    spec = Seq2SeqSpec(
        encoder=EncoderSpec(embed=embed, stack=encoder, context=context),
        decoder=DecoderSpec(embed=embed, stack=stack(dim, reading(layer), deep["decoder"],
                                                     Buckets(**buckets, two_sided=False)),
                            context=context, head=LMHead(tied=tied, scale=dim**-0.5 if scaled else 1.0)),
        **answer_ids(keys, start=0, end=1))
    keys.done(UNREAD)
    return spec


def layer_of(keys: Keys) -> Layer:
    """The encoder's."""
    heads, dropout = keys.positive("num_heads"), float(keys.take("dropout_rate", (int, float), 0.1))
    mixer = Attention(heads=heads, kv_heads=heads, head_dim=keys.positive("d_kv"), window=EVERYWHERE, scale=1.0,
                      dropout=dropout, q_bias=False, k_bias=False, v_bias=False, out_bias=False)
    told = keys.take("feed_forward_proj", str, "relu")
    gated, name = told.startswith("gated-"), told.removeprefix("gated-")
    if name not in ACTS:
        raise InputError(f"{keys.where}: feed_forward_proj should be one of {', '.join(ACTS)}, gated- or not, "
                         f"not {told!r}")
    act = "gelu_tanh" if told == "gated-gelu" else ACTS[name]
    mlp = Mlp(hidden=keys.positive("d_ff"), act=act, gated=gated, up_bias=False, down_bias=False, dropout=dropout)
    return Layer(mixer=mixer, mlp=mlp, dropout=dropout, norm=RMSNorm(
        eps=float(keys.take("layer_norm_epsilon", (int, float), 1e-6))))


def reading(layer: Layer) -> Layer:
    """The decoder's layer beside this one of the encoder."""
    return replace(layer, mixer=replace(layer.mixer, window=CAUSAL), cross=layer.mixer)


def stack(dim: int, layer: Layer, depth: int, relative: Buckets) -> Stack:
    return Stack(dim=dim, layers=(layer,) * depth, final_norm=layer.norm, relative=relative)


def complete(folder: Folder, opened: Opened) -> Opened:
    """transformers 5 writes `tie_word_embeddings` true whatever the head is: a head of its own in the file counts
    where outputs are not scaled, and is a copy of the table where they are."""
    head = opened.spec.decoder.head
    if head.scale != 1.0 or not head.tied or HEAD not in opened.weights.shapes:
        return opened
    spec = replace(opened.spec, decoder=replace(opened.spec.decoder, head=replace(head, tied=False)))
    return replace(opened, spec=spec, table=table(spec, opened.weights.shapes))


# ------------------------------------------------------------------------------------- spec to config
def from_spec(spec: Seq2SeqSpec) -> dict[str, Any]:
    """Raises InputError for a model that transformers' class cannot hold."""
    layer, relative, head = spec.encoder.stack.layers[0], spec.encoder.stack.relative, spec.decoder.head
    mixer, mlp = layer.mixer, layer.mlp
    if not isinstance(mixer, Attention) or not isinstance(mlp, Mlp) or not isinstance(relative, Buckets):
        raise InputError("the hf layout of T5 has layers of attention with one MLP and a bias by distance")
    act = "gelu" if mlp.gated and mlp.act == "gelu_tanh" else TO_HF[mlp.act]
    config = {
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True,
        "vocab_size": spec.decoder.embed.vocab, "d_model": spec.encoder.stack.dim, "d_kv": mixer.head_dim,
        "d_ff": mlp.hidden, "num_layers": len(spec.encoder.stack.layers), "num_heads": mixer.heads,
        "num_decoder_layers": len(spec.decoder.stack.layers), "relative_attention_num_buckets": relative.count,
        "relative_attention_max_distance": relative.distance, "dropout_rate": layer.dropout,
        "layer_norm_epsilon": layer.norm.eps, "feed_forward_proj": ("gated-" if mlp.gated else "") + act,
        "n_positions": spec.decoder.context, "tie_word_embeddings": head.tied,
        "scale_decoder_outputs": head.scale != 1.0, "pad_token_id": 0, "eos_token_id": spec.end,
        "decoder_start_token_id": spec.start[0]}
    ensure_kept(spec, to_spec(config, "config"), "hf (t5)")
    return config


# ------------------------------------------------------------------------------------- weights
def table(spec: Seq2SeqSpec, names: Iterable[str]) -> Table:
    head = spec.decoder.head
    rules = [
        rule("shared.weight", "decoder.embed.tokens.weight"), rule(HEAD, "decoder.head.weight"),
        *(one for side in ("encoder", "decoder") for one in side_rules(side, spec))]
    ignored = {**{f"{side}.embed_tokens.weight": "a copy of the shared table" for side in ("encoder", "decoder")},
               "decoder.block.{n}.layer.1.EncDecAttention.relative_attention_bias.weight": NO_BIAS}
    return Table(tuple(rules), ignored | ({HEAD: TIED} if head.tied else {}))


def side_rules(side: str, spec: Seq2SeqSpec) -> list[Rule]:
    theirs, ours = side + ".block.{n}.layer.", side + ".stack.blocks.{n}."
    layer = spec.encoder.stack.layers[0]
    width, decodes = layer.mixer.heads * layer.mixer.head_dim, side == "decoder"
    mlp = f"{theirs}{2 if decodes else 1}."
    names = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if layer.mlp.gated else {"wi": "up", "wo": "down"}
    first = side + ".block.0.layer.0.SelfAttention."
    rules = [
        rule(first + "relative_attention_bias.weight", side + ".stack.bias.weight"),
        rule(side + ".final_layer_norm.weight", side + ".stack.final_norm.weight"),
        rule(tuple(f"{theirs}0.SelfAttention.{part}.weight" for part in PARTS), ours + "mixer.qkv.weight",
             fused(width, width, width)),
        rule(theirs + "0.SelfAttention.o.weight", ours + "mixer.out.weight"),
        rule(theirs + "0.layer_norm.weight", ours + "mixer_norm.weight"),
        *(rule(f"{mlp}DenseReluDense.{name}.weight", f"{ours}mlp.{part}.weight") for name, part in names.items()),
        rule(mlp + "layer_norm.weight", ours + "mlp_norm.weight")]
    return rules + (cross_rules(theirs + "1.", ours, width) if decodes else [])


def cross_rules(theirs: str, ours: str, width: int) -> list[Rule]:
    return [
        rule(theirs + "EncDecAttention.q.weight", ours + "cross.q.weight"),
        rule(tuple(f"{theirs}EncDecAttention.{part}.weight" for part in "kv"), ours + "cross.kv.weight",
             fused(width, width)),
        rule(theirs + "EncDecAttention.o.weight", ours + "cross.out.weight"),
        rule(theirs + "layer_norm.weight", ours + "cross_norm.weight")]


T5 = Family(layout="hf", config=CONFIG, weights=FILES, has_text=True, to_spec=to_spec, from_spec=from_spec, table=table,
            model_types=("t5",), complete=complete,
            files=lambda config, extras: {CONFIG: config | padding_id(extras)})
