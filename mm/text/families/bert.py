"""transformers' encoders: BERT and RoBERTa, and ModernBERT, whose layers with a window alternate with layers that see
everything, each kind with its own rope."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from mm.checkpoint.family import Extras, Family, Keys, ensure_kept
from mm.checkpoint.fields import Entry, Pieces, Values, always, expected, field, pair, unread
from mm.checkpoint.files import CONFIG
from mm.checkpoint.hf import TIED, Kind, act, below, equal_heads, rope_config, rope_of
from mm.checkpoint.tables import GATE_UP, Rule, Table, WeightTransform, fused, rule
from mm.errors import InputError
from mm.spec import (
    EVERYWHERE,
    Attention,
    EncoderSpec,
    Layer,
    LayerNorm,
    LearnedTable,
    LMHead,
    Mlp,
    Stack,
    Transform,
    Window,
)
from mm.text.families.sentence import complete

GLOBAL, LOCAL = "full_attention", "sliding_attention"
NO_HEAD = "a head that the config does not name"


@dataclass(frozen=True, kw_only=True)
class Encoder(Kind):
    """A class of transformers that is a text encoder: `under` is the prefix of weights below a head, `head` are the
    patterns of names of the head's weights, which a model without one leaves out."""

    under: str
    head: tuple[str, ...]

    def build(self, v: Values) -> EncoderSpec:
        layer = Layer(mixer=v.make("mixer"), mlp=v.make("mlp"), norm=v.make("norm"), **v.fields("layer"))
        layers = [layer] * v["stack.depth"]
        if "each.mixer" in v:
            layers = [replace(layer, mixer=mixer, mixer_norm=i > 0) for i, mixer in enumerate(v["each.mixer"])]
        head = v.make("head", transform=v.make("transform")) if v["spec.scores"] else None
        return EncoderSpec(embed=v.make("embed"), context=v["spec.context"], head=head, stack=Stack(
            dim=v["stack.dim"], layers=tuple(layers), final_norm=v.get("stack.final_norm")))

    def pieces(self, spec: EncoderSpec) -> Pieces:
        layer, head = spec.stack.layers[0], spec.head or LMHead(transform=Transform())
        if not isinstance(layer.mixer, Attention) or not isinstance(layer.mlp, Mlp) or head.transform is None:
            raise InputError(f"the hf layout of {self.model_type} has layers of attention with one MLP")
        return Pieces(spec=spec, stack=SimpleNamespace(dim=spec.stack.dim, depth=len(spec.stack.layers)), layer=layer,
                      layers=spec.stack.layers, embed=spec.embed, norm=layer.norm, mixer=layer.mixer, mlp=layer.mlp,
                      head=head, transform=head.transform)

    def from_spec(self, spec: EncoderSpec) -> dict[str, Any]:
        config = super().from_spec(spec)
        return config if spec.head else config | {"architectures": [architecture(self.name, spec)]}

    def check(self, spec: EncoderSpec, read_back: EncoderSpec) -> None:
        """The pooling of sentences lies in files of its own, which hold no projection."""
        if spec.pooling is not None and spec.pooling.projection is not None:
            raise InputError("the hf layout of a sentence encoder is not written with a projection")
        read_back = read_back if spec.head else replace(read_back, head=None)
        ensure_kept(replace(spec, pooling=None), read_back, f"hf ({self.model_type})")

    def table(self, spec: EncoderSpec, names: Iterable[str] = ()) -> Table:
        names, found = list(names), super().table(spec)
        heads = dict.fromkeys(self.head, NO_HEAD) if spec.head is None else {}
        tied = {"cls.predictions.decoder.weight": TIED, "lm_head.decoder.weight": TIED,
                "decoder.weight": TIED} if spec.head and spec.head.tied else {}
        rules = tuple(one for one in found.rules if spec.head or not one.ours[0].startswith("head."))
        under = names or ([] if spec.head else ["-"])  # a model without a head is written without the prefix
        return Table(rules, dict(found.ignored) | heads | tied).renamed(below(under, self.under))

    def family(self, **more: Any) -> Family:
        return super().family(**{"files": files, "complete": complete} | more)


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    """The config with the padding id that transformers reads, unless it shifts positions and so is there already."""
    given = config.get("pad_token_id") is not None or extras.tokenizer is None
    return {CONFIG: config if given else config | {"pad_token_id": extras.tokenizer.pad_id}}


def architecture(name: str, spec: EncoderSpec) -> str:
    return name if spec.head else name.removesuffix("ForMaskedLM") + "Model"


def scores(keys: Keys, v: Values) -> dict[str, Any]:
    """Reads whether a config's class scores the vocabulary."""
    named = keys.left.get("architectures") or ()
    return {"spec.scores": any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in named)}


SHARED = (
    field("hidden_size", "stack.dim"), field("num_hidden_layers", "stack.depth"), equal_heads(),
    field("intermediate_size", "mlp.hidden"), field("vocab_size", "embed.vocab"), pair("architectures", scores),
    field("tie_word_embeddings", "head.tied", kind=bool, default=True),
    always(norm__is=LayerNorm, transform__is=Transform))


# ------------------------------------------------------------------------------------- BERT, RoBERTa
def positions(pad: int | None) -> Entry:
    """Learned positions, which RoBERTa counts from the padding id on."""
    def read(keys: Keys, v: Values) -> dict[str, Any]:
        rows = keys.positive("max_position_embeddings", 512)
        start = 0 if pad is None else keys.take("pad_token_id", int, pad) + 1
        if rows <= start:
            raise InputError(f"{keys.where}: max_position_embeddings should be more than {start}, not {rows}")
        return {"embed.positions": LearnedTable(rows=rows - start, start=start), "spec.context": rows - start}

    def write(pieces: Pieces) -> dict[str, Any]:
        table = pieces.embed.positions
        if table is None:
            raise InputError("the hf layout of BERT has learned positions")
        return {"max_position_embeddings": table.rows + table.start} | (
            {} if pad is None else {"pad_token_id": table.start - 1})
    return pair("max_position_embeddings", read, write)


def bert(pad: int | None = None, head_act: str | None = None) -> tuple[Entry, ...]:
    """pad: the id that shifts positions; head_act: an activation of the head that no config names."""
    return (*SHARED, positions(pad), act(default="gelu"),
            field("type_vocab_size", "embed.types", default=2),
            field("layer_norm_eps", "norm.eps", kind=float, default=1e-12),
            field("hidden_dropout_prob", "layer.dropout", "embed.dropout", kind=float, default=0.1),
            field("attention_probs_dropout_prob", "mixer.dropout", kind=float, default=0.1),
            expected(is_decoder=False), expected(add_cross_attention=False),
            expected(position_embedding_type="absolute"),
            always(layer__placement="residual_post", head__bias=True, embed__norm=lambda v: v.make("norm"),
                   transform__norm=lambda v: v.make("norm"), transform__act=lambda v: head_act or v["mlp.act"]),
            unread("classifier_dropout", "directionality", "pooler_fc_size", "pooler_num_attention_heads",
                   "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type", "output_past"))


BERT_BLOCK = {
    "attention.self.[query key value].{x}": "mixer.qkv.{x} | qkv",
    "attention.output.dense.{x}": "mixer.out.{x}",
    "attention.output.LayerNorm.{x}": "mixer_norm.{x}",
    "intermediate.dense.{x}": "mlp.up.{x}",
    "output.dense.{x}": "mlp.down.{x}",
    "output.LayerNorm.{x}": "mlp_norm.{x}"}


def bert_weights(prefix: str, transform: str, norm: str, head: str) -> dict[str, str]:
    """`prefix` of the model's weights below a head, the head's `transform`, its `norm` and the rest of it."""
    return {
        prefix + "embeddings.word_embeddings.weight": "embed.tokens.weight",
        prefix + "embeddings.position_embeddings.weight": "embed.positions.weight",
        prefix + "embeddings.token_type_embeddings.weight": "embed.types.weight",
        prefix + "embeddings.LayerNorm.{x}": "embed.norm.{x}",
        **{f"{prefix}encoder.layer.{{n}}.{theirs}": "stack.blocks.{n}." + ours for theirs, ours in BERT_BLOCK.items()},
        transform + "dense.{x}": "head.transform.dense.{x}", transform + norm + ".{x}": "head.transform.norm.{x}",
        head + "bias": "head.bias", head + "decoder.weight": "head.weight"}


def bert_kind(model_type: str, name: str, fields: tuple[Entry, ...], weights: Mapping[str, str], prefix: str,
              head: str) -> Encoder:
    return Encoder(
        model_type=model_type, name=name, fields=fields, weights=weights, under=prefix, head=(head + "{name}",),
        transforms=lambda spec: {"qkv": fused(*[spec.stack.dim] * 3)}, ignored={
            prefix + "embeddings.position_ids": "a buffer of positions 0, 1, 2, ...",
            prefix + "embeddings.token_type_ids": "a buffer of zeros",
            prefix + "pooler.dense.{x}": "the pooler of next-sentence prediction; an encoder gives hidden states",
            "cls.seq_relationship.{x}": "the head of next-sentence prediction",
            head + "decoder.bias": "a copy of the head's bias"})


def old_norms(kind: Encoder) -> Family:
    """Old files call a norm's weight and bias gamma and beta."""
    def table(spec: EncoderSpec, names: Iterable[str]) -> Table:
        names = list(names)
        found = kind.table(spec, names)
        if not any(name.endswith(".gamma") for name in names):
            return found
        rules: list[Rule] = []
        for one in found.rules:
            norm = one.theirs[0].endswith("LayerNorm.{x}")
            rules += [rule(one.theirs[0].replace("{x}", theirs), one.ours[0].replace("{x}", ours))
                      for theirs, ours in (("gamma", "weight"), ("beta", "bias"))] if norm else [one]
        return Table(tuple(rules), found.ignored)
    return kind.family(table=table)


BERT = bert_kind("bert", "BertForMaskedLM", bert(), bert_weights(
    "bert.", "cls.predictions.transform.", "LayerNorm", "cls.predictions."), "bert.", "cls.predictions.")
ROBERTA = bert_kind("roberta", "RobertaForMaskedLM", bert(1, "gelu"), bert_weights(
    "roberta.", "lm_head.", "layer_norm", "lm_head."), "roberta.", "lm_head.")


# ------------------------------------------------------------------------------------- ModernBERT
def modern_mixers(keys: Keys, v: Values) -> dict[str, Any]:
    if keys.take("position_embedding_type", str, "absolute") not in ("absolute", "rope"):  # in files, and never read
        raise InputError(f"{keys.where}: the position_embedding_type is not supported")
    depth, every = v["stack.depth"], keys.positive("global_attn_every_n_layers", 3)
    half = keys.positive("local_attention", 128) // 2
    thetas = {GLOBAL: keys.take("global_rope_theta", (int, float), 160000.0),
              LOCAL: keys.take("local_rope_theta", (int, float), 10000.0)}
    given = keys.take("rope_parameters", dict, {})
    windows = {GLOBAL: EVERYWHERE, LOCAL: Window(left=half, right=half)}
    mixers = {kind: v.make("mixer", window=windows[kind], rope=rope_of(
        keys, v["spec.context"], thetas[kind], parameters=given.get(kind))) for kind in windows}
    types = keys.take("layer_types", list, [LOCAL if i % every else GLOBAL for i in range(depth)])
    if len(types) != depth or not set(types) <= set(mixers):
        raise InputError(f"{keys.where}: layer_types should hold {depth} of {GLOBAL} and {LOCAL}, not {types}")
    return {"each.mixer": [mixers[kind] for kind in types]}


def modern_keys(pieces: Pieces) -> dict[str, Any]:
    mixers = [layer.mixer for layer in pieces.layers]
    if not all(isinstance(mixer, Attention) and mixer.rope is not None for mixer in mixers):
        raise InputError("the hf layout of modernbert has layers of attention with rope, one MLP and a transform")
    near = [mixer for mixer in mixers if mixer.window.left is not None]
    far = [mixer for mixer in mixers if mixer.window.left is None]
    ropes = {GLOBAL: (far or near)[0], LOCAL: (near or far)[0]}
    return {"local_attention": 2 * near[0].window.left if near else 128, "pad_token_id": None,
            "layer_types": [GLOBAL if mixer.window.left is None else LOCAL for mixer in mixers],
            "rope_parameters": {kind: rope_config(mixer.rope, mixer.head_dim) for kind, mixer in ropes.items()}}


MODERN = (
    *SHARED, field("max_position_embeddings", "spec.context", default=8192), act("hidden_activation", default="gelu"),
    field("norm_eps", "norm.eps", kind=float, default=1e-5), field("norm_bias", "norm.bias", kind=bool, default=False),
    field("mlp_bias", "mlp.up_bias", "mlp.down_bias", kind=bool, default=False),
    field("attention_bias", "mixer.q_bias", "mixer.k_bias", "mixer.v_bias", "mixer.out_bias", kind=bool, default=False),
    field("attention_dropout", "mixer.dropout", kind=float, default=0.0),
    pair("layer_types", modern_mixers, modern_keys), field("decoder_bias", "head.bias", kind=bool, default=True),
    act("classifier_activation", "transform.act", default="gelu"),
    field("classifier_bias", "transform.bias", kind=bool, default=False),
    always(mlp__gated=True, embed__norm=lambda v: v.make("norm"), transform__norm=lambda v: v.make("norm"),
           stack__final_norm=lambda v: v.make("norm")),
    unread("initializer_cutoff_factor", "cls_token_id", "classifier_pooling",
           "classifier_dropout", "deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index",
           "reference_compile", "repad_logits_with_grad", "layer_norm_eps", "mlp_dropout", "embedding_dropout"))
MODERN_WEIGHTS = {
    "model.embeddings.tok_embeddings.weight": "embed.tokens.weight",
    "model.embeddings.norm.{x}": "embed.norm.{x}",
    "model.layers.{n}.attn_norm.{x}": "stack.blocks.{n}.mixer_norm.{x}",
    "model.layers.{n}.attn.Wqkv.{x}": "stack.blocks.{n}.mixer.qkv.{x}",
    "model.layers.{n}.attn.Wo.{x}": "stack.blocks.{n}.mixer.out.{x}",
    "model.layers.{n}.mlp_norm.{x}": "stack.blocks.{n}.mlp_norm.{x}",
    "model.layers.{n}.mlp.Wi.{x}": "stack.blocks.{n}.mlp.[gate up].{x} | halves",
    "model.layers.{n}.mlp.Wo.{x}": "stack.blocks.{n}.mlp.down.{x}",
    "model.final_norm.{x}": "stack.final_norm.{x}",
    "head.dense.{x}": "head.transform.dense.{x}",
    "head.norm.{x}": "head.transform.norm.{x}",
    "decoder.{x}": "head.{x}"}


def halves(spec: EncoderSpec) -> dict[str, WeightTransform]:
    return {"halves": GATE_UP}


MODERNBERT = Encoder(
    model_type="modernbert", name="ModernBertForMaskedLM", fields=MODERN, weights=MODERN_WEIGHTS, transforms=halves,
    under="model.", head=("head.{name}", "decoder.{x}"))
KINDS = (old_norms(BERT), old_norms(ROBERTA), MODERNBERT.family())
