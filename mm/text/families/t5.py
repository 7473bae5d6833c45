"""transformers' encoder-decoders: T5, version 1.0 and 1.1 (Raffel et al., 2020; FLAN-T5 and UL2 are of this kind), and
BART (Lewis et al., 2019)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from mm.checkpoint.family import Extras, Family, Keys, Opened
from mm.checkpoint.fields import Entry, Pieces, Values, always, expected, field, pair, unread
from mm.checkpoint.files import CONFIG, Folder
from mm.checkpoint.hf import ACTS, TIED, TO_HF, Kind, act
from mm.checkpoint.tables import Rule, Table, WeightTransform, fused, reshaped
from mm.errors import InputError
from mm.spec import (
    CAUSAL,
    EVERYWHERE,
    Attention,
    Buckets,
    DecoderSpec,
    EncoderSpec,
    Layer,
    LayerNorm,
    LearnedTable,
    Mlp,
    Seq2SeqSpec,
    Stack,
)
from mm.text.families.layers import NAMES, layer_rules

HEAD = "lm_head.weight"
NO_BIAS = "a position bias that cross-attention never had"
COPIES = {f"{side}.embed_tokens.weight": "a copy of the shared table" for side in ("encoder", "decoder")}
SIDES = ("encoder", "decoder")


@dataclass(frozen=True, kw_only=True)
class EncoderDecoder(Kind):
    """A class of transformers that is an encoder-decoder. `encoder` and `decoder` are parts of its values: the number
    of layers, and the heads and the width of the MLP where they differ from the other side's."""

    def build(self, v: Values) -> Seq2SeqSpec:
        stacks = {}
        for side in SIDES:
            own = v.fields(side)
            depth, hidden, heads = own["depth"], own.get("hidden"), own.get("heads")
            more = {} if heads is None else {"heads": heads, "kv_heads": heads, "head_dim": v["stack.dim"] // heads}
            mixer = v.make("mixer", window=EVERYWHERE, **more)
            layer = Layer(mixer=mixer, mlp=v.make("mlp", **({} if hidden is None else {"hidden": hidden})),
                          norm=v.make("norm"), **v.fields("layer"))
            if side == "decoder":
                layer = replace(layer, mixer=replace(mixer, window=CAUSAL), cross=mixer)
            stacks[side] = Stack(dim=v["stack.dim"], layers=(layer,) * depth, final_norm=v.get("stack.final_norm"),
                                 relative=own.get("relative"))
        embed, context = v.make("embed"), v["spec.context"]
        return Seq2SeqSpec(encoder=EncoderSpec(embed=embed, stack=stacks["encoder"], context=context),
                           decoder=DecoderSpec(embed=embed, stack=stacks["decoder"], context=context,
                                               head=v.make("head")), start=v["spec.start"], end=v["spec.end"])

    def pieces(self, spec: Seq2SeqSpec) -> Pieces:
        sides = {side: getattr(spec, side).stack for side in SIDES}
        if not all(isinstance(one.layers[0].mixer, Attention) and isinstance(one.layers[0].mlp, Mlp)
                   for one in sides.values()):
            raise InputError(f"the hf layout of {self.model_type} has layers of attention with one MLP")
        layer = spec.encoder.stack.layers[0]
        about = {side: SimpleNamespace(depth=len(one.layers), heads=one.layers[0].mixer.heads, relative=one.relative,
                                       hidden=one.layers[0].mlp.hidden) for side, one in sides.items()}
        return Pieces(spec=SimpleNamespace(context=spec.decoder.context, start=spec.start, end=spec.end),
                      stack=spec.encoder.stack, layer=layer, norm=layer.norm, mixer=layer.mixer, mlp=layer.mlp,
                      embed=spec.decoder.embed, head=spec.decoder.head, **about)

    def from_spec(self, spec: Seq2SeqSpec) -> dict[str, Any]:
        return super().from_spec(spec) | {"is_encoder_decoder": True}

    def table(self, spec: Seq2SeqSpec, names: Iterable[str] = ()) -> Table:
        found = super().table(spec)
        return Table(found.rules, dict(found.ignored) | ({HEAD: TIED} if spec.decoder.head.tied else {}))

    def family(self, **more: Any) -> Family:
        return super().family(**{"files": files} | more)


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    return {CONFIG: config if extras.tokenizer is None else config | {"pad_token_id": extras.tokenizer.pad_id}}


def answers(start: int, end: int, pad: int) -> Entry:
    """The field of the ids that answers begin and end with, and of the id of padding."""
    def read(keys: Keys, v: Values) -> dict[str, Any]:
        first, forced = keys.take("decoder_start_token_id", int, start), keys.take("forced_bos_token_id", int, None)
        return {"spec.start": (first,) if forced is None else (first, forced),
                "spec.end": keys.take("eos_token_id", int, end)}

    def write(pieces: Pieces) -> dict[str, Any]:
        first, *forced = pieces.spec.start
        return {"decoder_start_token_id": first, "eos_token_id": pieces.spec.end, "pad_token_id": pad} | (
            {"forced_bos_token_id": forced[0]} if forced else {})
    return pair("decoder_start_token_id", read, write)


# ------------------------------------------------------------------------------------- T5
def unit(keys: Keys, v: Values) -> dict[str, Any]:
    """`gated-gelu` means GELU by tanh."""
    given = keys.take("feed_forward_proj", str, "relu")
    gated, name = given.startswith("gated-"), given.removeprefix("gated-")
    if name not in ACTS:
        raise InputError(f"{keys.where}: feed_forward_proj should be one of {', '.join(ACTS)}, gated- or not, "
                         f"not {given!r}")
    return {"mlp.act": "gelu_tanh" if given == "gated-gelu" else ACTS[name], "mlp.gated": gated}


def unit_key(pieces: Pieces) -> dict[str, Any]:
    mlp = pieces.mlp
    name = "gelu" if mlp.gated and mlp.act == "gelu_tanh" else TO_HF[mlp.act]
    return {"feed_forward_proj": ("gated-" if mlp.gated else "") + name}


def buckets(keys: Keys, v: Values) -> dict[str, Any]:
    sizes = {"count": keys.positive("relative_attention_num_buckets", 32),
             "distance": keys.positive("relative_attention_max_distance", 128)}
    return {"encoder.relative": Buckets(**sizes), "decoder.relative": Buckets(**sizes, two_sided=False)}


def bucket_keys(pieces: Pieces) -> dict[str, Any]:
    found = pieces.encoder.relative
    if not isinstance(found, Buckets):
        raise InputError("the hf layout of T5 has layers of attention with one MLP and a bias by distance")
    return {"relative_attention_num_buckets": found.count, "relative_attention_max_distance": found.distance}


def scaled(keys: Keys, v: Values) -> dict[str, Any]:
    return {"head.scale": v["stack.dim"] ** -0.5 if keys.take("scale_decoder_outputs", bool, v["head.tied"]) else 1.0}


T5_FIELDS = (
    field("d_model", "stack.dim"), field("num_layers", "encoder.depth"),
    field("num_decoder_layers", "decoder.depth", default=lambda v: v["encoder.depth"]),
    field("num_heads", "mixer.heads", "mixer.kv_heads"), field("d_kv", "mixer.head_dim"), field("d_ff", "mlp.hidden"),
    field("dropout_rate", "layer.dropout", "mixer.dropout", "mlp.dropout", "embed.dropout", kind=float, default=0.1),
    pair("feed_forward_proj", unit, unit_key), field("layer_norm_epsilon", "norm.eps", kind=float, default=1e-6),
    field("vocab_size", "embed.vocab"), pair("relative_attention_num_buckets", buckets, bucket_keys),
    field("n_positions", "spec.context", default=512), field("tie_word_embeddings", "head.tied", kind=bool,
                                                             default=True),
    pair("scale_decoder_outputs", scaled, lambda pieces: {"scale_decoder_outputs": pieces.head.scale != 1.0}),
    answers(start=0, end=1, pad=0), unread("dense_act_fn", "is_gated_act", "classifier_dropout"),
    always(mixer__scale=1.0, mlp__up_bias=False, mlp__down_bias=False, stack__final_norm=lambda v: v.make("norm"),
           **{f"mixer__{name}_bias": False for name in ("q", "k", "v", "out")}))


def t5_weights(spec: Seq2SeqSpec) -> dict[str, str]:
    """The MLP stands behind the cross-attention of a decoder."""
    rows = {"shared.weight": "decoder.embed.tokens.weight", HEAD: "decoder.head.weight"}
    gated = spec.encoder.stack.layers[0].mlp.gated
    inner = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if gated else {"wi": "up", "wo": "down"}
    for side, last in (("encoder", 1), ("decoder", 2)):
        block, ours = side + ".block.{n}.layer.", side + ".stack.blocks.{n}."
        rows |= {
            side + ".block.0.layer.0.SelfAttention.relative_attention_bias.weight": side + ".stack.bias.weight",
            side + ".final_layer_norm.weight": side + ".stack.final_norm.weight",
            block + "0.SelfAttention.[q k v].weight": ours + "mixer.qkv.weight | three",
            block + "0.SelfAttention.o.weight": ours + "mixer.out.weight",
            block + "0.layer_norm.weight": ours + "mixer_norm.weight",
            **{f"{block}{last}.DenseReluDense.{name}.weight": f"{ours}mlp.{part}.weight"
               for name, part in inner.items()},
            f"{block}{last}.layer_norm.weight": ours + "mlp_norm.weight"}
    block, ours = "decoder.block.{n}.layer.1.", "decoder.stack.blocks.{n}.cross"
    return rows | {
        block + "EncDecAttention.q.weight": ours + ".q.weight",
        block + "EncDecAttention.[k v].weight": ours + ".kv.weight | two",
        block + "EncDecAttention.o.weight": ours + ".out.weight", block + "layer_norm.weight": ours + "_norm.weight"}


def side_by_side(spec: Seq2SeqSpec) -> dict[str, WeightTransform]:
    width = spec.encoder.stack.layers[0].mixer.heads * spec.encoder.stack.layers[0].mixer.head_dim
    return {"three": fused(*[width] * 3), "two": fused(*[width] * 2)}


def complete(folder: Folder, opened: Opened) -> Opened:
    """transformers 5 writes `tie_word_embeddings` true whatever the head is: a head of its own in the file counts
    where outputs are not scaled, and is a copy of the table where they are."""
    head = opened.spec.decoder.head
    if head.scale != 1.0 or not head.tied or HEAD not in opened.weights.shapes:
        return opened
    spec = replace(opened.spec, decoder=replace(opened.spec.decoder, head=replace(head, tied=False)))
    return replace(opened, spec=spec, table=T5.table(spec))


T5 = EncoderDecoder(
    model_type="t5", name="T5ForConditionalGeneration", fields=T5_FIELDS, weights=t5_weights, transforms=side_by_side,
    ignored=COPIES | {"decoder.block.{n}.layer.1.EncDecAttention.relative_attention_bias.weight": NO_BIAS})

# ------------------------------------------------------------------------------------- BART
START = 2  # rows of the table of positions before position 0


def bart_positions(keys: Keys, v: Values) -> dict[str, Any]:
    rows = keys.positive("max_position_embeddings", 1024)
    return {"embed.positions": LearnedTable(rows=rows, start=START), "spec.context": rows}


def bart_positions_key(pieces: Pieces) -> dict[str, Any]:
    if pieces.embed.positions is None:
        raise InputError("the hf layout of BART has layers of attention with one MLP and learned positions")
    return {"max_position_embeddings": pieces.embed.positions.rows}


def bart_heads(side: str) -> Entry:
    def read(keys: Keys, v: Values) -> dict[str, Any]:
        heads, dim = keys.positive(f"{side}_attention_heads"), v["stack.dim"]
        if dim % heads:
            raise InputError(f"{keys.where}: d_model {dim} cannot be shared by {heads} heads")
        return {f"{side}.heads": heads}
    return pair(f"{side}_attention_heads", read, lambda pieces: {
        f"{side}_attention_heads": pieces.at(f"{side}.heads")})


BART_FIELDS = (
    field("d_model", "stack.dim"), pair("max_position_embeddings", bart_positions, bart_positions_key),
    *(one for side in SIDES for one in (field(f"{side}_layers", f"{side}.depth"), bart_heads(side),
                                        field(f"{side}_ffn_dim", f"{side}.hidden"))),
    field("dropout", "layer.dropout", "embed.dropout", kind=float, default=0.1),
    field("attention_dropout", "mixer.dropout", kind=float, default=0.0),
    field("activation_dropout", "mlp.dropout", kind=float, default=0.0),
    act("activation_function", default="gelu"), field("vocab_size", "embed.vocab"),
    pair("scale_embedding", lambda keys, v: {
        "embed.scale": v["stack.dim"] ** 0.5 if keys.take("scale_embedding", bool, False) else 1.0},
        lambda pieces: {"scale_embedding": pieces.embed.scale != 1.0, "bos_token_id": 0}),
    field("tie_word_embeddings", "head.tied", kind=bool, default=True), answers(start=2, end=2, pad=1),
    # old files spell out what every BART is, or what makes one something else
    expected(normalize_before=False), expected(add_final_layer_norm=False), expected(add_bias_logits=False),
    expected(normalize_embedding=True), expected(static_position_embeddings=False),
    expected(extra_pos_embeddings=START),
    unread("init_std", "classifier_dropout", "classif_dropout", "encoder_layerdrop", "decoder_layerdrop",
           "num_hidden_layers", "forced_eos_token_id", "no_repeat_ngram_size"),
    always(head__bias=True, norm__is=LayerNorm, embed__norm=LayerNorm(), layer__placement="residual_post"))
BART_WEIGHTS = {
    "model.shared.weight": "decoder.embed.tokens.weight", HEAD: "decoder.head.weight",
    "final_logits_bias": "decoder.head.bias | row",
    **{f"model.{side}.embed_positions.weight": side + ".embed.positions.weight" for side in SIDES},
    **{f"model.{side}.layernorm_embedding.{{x}}": side + ".embed.norm.{x}" for side in SIDES}}


class Bart(EncoderDecoder):
    """BART, whose blocks have the names that Whisper's have."""

    def table(self, spec: Seq2SeqSpec, names: Iterable[str] = ()) -> Table:
        found, rules = super().table(spec), list[Rule]()
        for side in SIDES:
            layer = getattr(spec, side).stack.layers[0]
            rules += layer_rules(f"model.{side}.layers.{{n}}.", side + ".stack.blocks.{n}.", NAMES, layer)
        return Table((*found.rules, *rules), found.ignored)


BART = Bart(
    model_type="bart", name="BartForConditionalGeneration", fields=BART_FIELDS, weights=BART_WEIGHTS,
    transforms=lambda spec: {"row": reshaped((spec.decoder.embed.vocab,), (1, spec.decoder.embed.vocab))},
    ignored={"model." + name: why for name, why in COPIES.items()})
KINDS = (T5.family(complete=complete), BART.family())
