"""transformers' BERT and RoBERTa."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mm.checkpoint.family import Family, Keys, ensure_kept
from mm.checkpoint.tables import Rule, Table, fused, rule
from mm.errors import InputError
from mm.spec import Attention, Embed, EncoderSpec, Layer, LayerNorm, LearnedTable, LMHead, Mlp, Stack, Transform
from mm.text.families.hf import CONFIG, FILES, HARMLESS, TIED, TO_HF, act_of
from mm.text.families.sentence import complete

MORE_HARMLESS = HARMLESS | frozenset("""
    classifier_dropout directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
    pooler_size_per_head pooler_type output_past
""".split())  # noqa: SIM905
IGNORED = {
    "embeddings.position_ids": "a buffer of positions 0, 1, 2, ...",
    "embeddings.token_type_ids": "a buffer of zeros",
    "pooler.dense.{x}": "the pooler of next-sentence prediction; an encoder gives hidden states"}


@dataclass(frozen=True)
class Kind:
    """How one of the two differs: the prefix of weights below a head, the class, the head's names, its bias, the
    padding id that shifts positions, an activation of the head that no config names."""

    prefix: str
    name: str
    head: str
    norm: str
    bias: str
    pad: int | None = None
    act: str | None = None


KINDS = {
    "bert": Kind("bert.", "Bert", "cls.predictions.transform.", "LayerNorm", "cls.predictions."),
    "roberta": Kind("roberta.", "Roberta", "lm_head.", "layer_norm", "lm_head.", pad=1, act="gelu")}


# ------------------------------------------------------------------------------------- config to spec
def to_spec(config: Mapping[str, Any], where: str) -> EncoderSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    keys, kind = Keys(config, where), KINDS[config["model_type"]]
    refuse(keys)
    dim, rows = keys.positive("hidden_size"), keys.positive("max_position_embeddings", 512)
    start = 0 if kind.pad is None else keys.take("pad_token_id", int, kind.pad) + 1
    if rows <= start:
        raise InputError(f"{where}: max_position_embeddings should be more than {start}, not {rows}")
    norm = LayerNorm(eps=float(keys.take("layer_norm_eps", (int, float), 1e-12)))
    dropout = float(keys.take("hidden_dropout_prob", (int, float), 0.1))
    act = act_of(keys, default="gelu")
    layer = Layer(mixer=attention_of(keys, dim), norm=norm, placement="residual_post", dropout=dropout,
                  mlp=Mlp(hidden=keys.positive("intermediate_size"), act=act))
    embed = Embed(vocab=keys.positive("vocab_size"), positions=LearnedTable(rows=rows - start, start=start),
                  types=keys.positive("type_vocab_size", 2), norm=norm, dropout=dropout)
    tied = keys.take("tie_word_embeddings", bool, True)
    head = LMHead(tied=tied, bias=True, transform=Transform(act=kind.act or act, norm=norm))
    spec = EncoderSpec(embed=embed, context=rows - start, head=head if has_head(config) else None,
                       stack=Stack(dim=dim, layers=(layer,) * keys.positive("num_hidden_layers")))
    keys.done(MORE_HARMLESS)
    return spec


def refuse(keys: Keys) -> None:
    if keys.take("is_decoder", bool, False) or keys.take("add_cross_attention", bool, False):
        raise InputError(f"{keys.where}: a BERT that decodes is not supported")
    if (kind := keys.take("position_embedding_type", str, "absolute")) != "absolute":
        raise InputError(f"{keys.where}: the position_embedding_type {kind!r} is not supported")


def attention_of(keys: Keys, dim: int) -> Attention:
    heads = keys.positive("num_attention_heads")
    if dim % heads:
        raise InputError(f"{keys.where}: hidden_size {dim} cannot be shared by {heads} heads")
    return Attention(heads=heads, kv_heads=heads, head_dim=dim // heads,
                     dropout=float(keys.take("attention_probs_dropout_prob", (int, float), 0.1)))


def has_head(config: Mapping[str, Any]) -> bool:
    """Whether a config's class scores the vocabulary."""
    return any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in config.get("architectures") or ())


# ------------------------------------------------------------------------------------- spec to config
def from_spec(model_type: str, spec: EncoderSpec) -> dict[str, Any]:
    """Raises InputError for a model that transformers' class cannot hold."""
    kind, layer, embed = KINDS[model_type], spec.stack.layers[0], spec.embed
    mixer, mlp = layer.mixer, layer.mlp
    if not isinstance(mixer, Attention) or not isinstance(mlp, Mlp) or mlp.act not in TO_HF or not embed.positions:
        raise InputError(f"the hf layout of {model_type} has layers of attention with one MLP and learned positions")
    config = {
        "architectures": [kind.name + ("ForMaskedLM" if spec.head else "Model")], "model_type": model_type,
        "vocab_size": embed.vocab, "hidden_size": spec.stack.dim, "num_hidden_layers": len(spec.stack.layers),
        "num_attention_heads": mixer.heads, "intermediate_size": mlp.hidden, "hidden_act": TO_HF[mlp.act],
        "max_position_embeddings": embed.positions.rows + embed.positions.start, "type_vocab_size": embed.types,
        "layer_norm_eps": layer.norm.eps, "hidden_dropout_prob": layer.dropout,
        "attention_probs_dropout_prob": mixer.dropout, "tie_word_embeddings": spec.head is None or spec.head.tied}
    if kind.pad is not None:
        config["pad_token_id"] = embed.positions.start - 1
    kept(spec, to_spec(config, "config"), model_type)
    return config


def kept(spec: EncoderSpec, read_back: EncoderSpec, model_type: str) -> None:
    """As `ensure_kept`; the pooling of sentences lies in files of its own, which hold no projection."""
    if spec.pooling is not None and spec.pooling.projection is not None:
        raise InputError("the hf layout of a sentence encoder is not written with a projection")
    ensure_kept(replace(spec, pooling=None), read_back, f"hf ({model_type})")


# ------------------------------------------------------------------------------------- weights
def table(model_type: str, spec: EncoderSpec, names: Iterable[str]) -> Table:
    """Old files call a norm's weight and bias gamma and beta."""
    names, kind = list(names), KINDS[model_type]
    below = any(name.startswith(kind.prefix) for name in names) or (not names and spec.head is not None)
    prefix = kind.prefix if below else ""
    parts = {"weight": "gamma", "bias": "beta"} if any(name.endswith(".gamma") for name in names) else {
        "weight": "weight", "bias": "bias"}
    rules = [renamed(one, parts) for one in [*embedding_rules(prefix), *layer_rules(prefix, spec)]]
    ignored = {prefix + name: reason for name, reason in IGNORED.items()}
    ignored["cls.seq_relationship.{x}"] = "the head of next-sentence prediction"
    if spec.head is None:
        return Table(tuple(flat(rules)), ignored | {f"{kind.bias}{{name}}": "a head that the config does not name"})
    rules += [[rule(kind.head + "dense.{x}", "head.transform.dense.{x}")],
              renamed(rule(f"{kind.head}{kind.norm}.{{x}}", "head.transform.norm.{x}"), parts),
              [rule(kind.bias + "bias", "head.bias")]]
    ignored[kind.bias + "decoder.bias"] = "a copy of the head's bias"
    if spec.head.tied:
        ignored[kind.bias + "decoder.weight"] = TIED
    else:
        rules.append([rule(kind.bias + "decoder.weight", "head.weight")])
    return Table(tuple(flat(rules)), ignored)


def embedding_rules(prefix: str) -> list[Rule]:
    tables = {"word_embeddings": "tokens", "position_embeddings": "positions", "token_type_embeddings": "types"}
    return [*(rule(f"{prefix}embeddings.{theirs}.weight", f"embed.{ours}.weight") for theirs, ours in tables.items()),
            rule(prefix + "embeddings.LayerNorm.{x}", "embed.norm.{x}")]


def layer_rules(prefix: str, spec: EncoderSpec) -> list[Rule]:
    theirs, ours = prefix + "encoder.layer.{n}.", "stack.blocks.{n}."
    size = spec.stack.dim
    qkv = [rule(tuple(f"{theirs}attention.self.{name}.{part}" for name in ("query", "key", "value")),
                f"{ours}mixer.qkv.{part}", fused(size, size, size)) for part in ("weight", "bias")]
    return [
        *qkv, rule(theirs + "attention.output.dense.{x}", ours + "mixer.out.{x}"),
        rule(theirs + "attention.output.LayerNorm.{x}", ours + "mixer_norm.{x}"),
        rule(theirs + "intermediate.dense.{x}", ours + "mlp.up.{x}"),
        rule(theirs + "output.dense.{x}", ours + "mlp.down.{x}"),
        rule(theirs + "output.LayerNorm.{x}", ours + "mlp_norm.{x}")]


def renamed(one: Rule, parts: Mapping[str, str]) -> list[Rule]:
    """A norm's rule with the names that a file gives its weight and bias."""
    if not one.theirs[0].endswith(("LayerNorm.{x}", "layer_norm.{x}")):
        return [one]
    return [rule(one.theirs[0].replace("{x}", theirs), one.ours[0].replace("{x}", ours))
            for ours, theirs in parts.items()]


def flat(rules: Iterable[list[Rule]]) -> list[Rule]:
    return [one for some in rules for one in some]


def family(model_type: str) -> Family:
    return Family(
        layout="hf", config=CONFIG, weights=FILES, has_text=True, to_spec=to_spec, complete=complete,
        model_types=(model_type,),
        from_spec=lambda spec: from_spec(model_type, spec),
        table=lambda spec, names: table(model_type, spec, names),
        files=lambda config, extras: {CONFIG: with_padding(config, extras.tokenizer)})


def with_padding(config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The config with the padding id that transformers reads, unless it shifts positions and so is there already."""
    given = config.get("pad_token_id") is not None
    return config if tokenizer is None or given else config | {"pad_token_id": tokenizer.pad_id}


BERT_KINDS = tuple(family(kind) for kind in KINDS)
