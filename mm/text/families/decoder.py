"""What transformers' text decoders share: one reader and one writer of configs and one table of weights for all; a
`Kind` says what its layers are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mm.checkpoint.family import Family, Keys, ensure_kept
from mm.checkpoint.tables import Rule, Table, rule
from mm.errors import InputError
from mm.spec import CAUSAL, Attention, DecoderSpec, Embed, Layer, LMHead, Mlp, QKNorm, RMSNorm, Stack, Window
from mm.text.families import generation
from mm.text.families.hf import (
    CONFIG,
    FILES,
    HARMLESS,
    ROTARY_BUFFER,
    TIED,
    TO_HF,
    act_of,
    qkv_rules,
    rope_config,
    rope_of,
)

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Size:
    """Width, layers and positions of a stack: what reading any of its parts needs."""

    dim: int
    depth: int
    context: int


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One decoder of transformers, by the `model_type` of its config and the `name` of its class. `layers` reads the
    layers and `config` writes the keys for them; `rules(theirs, ours, spec)` name the weights of block {n}, after
    these prefixes; `ahead` reads the layers of heads that look ahead; `defaults` are keys that its files leave out;
    `ignored` are weights as in a `Table`."""

    model_type: str
    name: str
    layers: Callable[[Keys, Size], Sequence[Layer]]
    config: Callable[[DecoderSpec], dict[str, Any]]
    rules: Callable[[str, str, DecoderSpec], list[Rule]]
    embed: Callable[[Keys, Size], Embed] = lambda keys, size: Embed(vocab=keys.positive("vocab_size"))
    head: Callable[[Keys], LMHead] = lambda keys: LMHead(tied=keys.take("tie_word_embeddings", bool, False))
    ahead: Callable[[Keys, Sequence[Layer]], tuple[Layer, ...]] = lambda keys, layers: ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)


def family(kind: Kind) -> Family:
    return Family(
        layout="hf", config=CONFIG, weights=FILES, has_text=True,
        model_types=(kind.model_type,),
        to_spec=lambda config, where: to_spec(kind, config, where), from_spec=lambda spec: from_spec(kind, spec),
        table=lambda spec, names: table(kind, spec), files=generation.files, complete=generation.complete)


def to_spec(kind: Kind, config: Mapping[str, Any], where: str) -> DecoderSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    keys = Keys({**kind.defaults, **config}, where)
    size = Size(keys.positive("hidden_size"), keys.positive("num_hidden_layers"),
                keys.positive("max_position_embeddings", 2048))
    layers = tuple(kind.layers(keys, size))
    spec = DecoderSpec(embed=kind.embed(keys, size), context=size.context, head=kind.head(keys),
                       ahead=kind.ahead(keys, layers),
                       stack=Stack(dim=size.dim, layers=layers, final_norm=layers[0].norm))
    keys.done(HARMLESS)
    return spec


def from_spec(kind: Kind, spec: DecoderSpec) -> dict[str, Any]:
    """Raises InputError for a model that transformers' class cannot hold."""
    config = {
        "architectures": [kind.name], "model_type": kind.model_type, "vocab_size": spec.embed.vocab,
        "hidden_size": spec.stack.dim, "num_hidden_layers": len(spec.stack.layers),
        "max_position_embeddings": spec.context, "rms_norm_eps": spec.stack.layers[0].norm.eps,
        "tie_word_embeddings": spec.head.tied, **kind.config(spec)}
    ensure_kept(spec, to_spec(kind, config, "config"), f"hf ({kind.model_type})")
    return config


def table(kind: Kind, spec: DecoderSpec) -> Table:
    rules = [
        rule("model.embed_tokens.weight", "embed.tokens.weight"), rule("model.norm.weight", "stack.final_norm.weight"),
        rule("lm_head.weight", "head.weight"), *kind.rules("model.layers.{n}.", "stack.blocks.{n}.", spec)]
    ignored = {"model.layers.{n}.self_attn.rotary_emb.inv_freq": ROTARY_BUFFER, **kind.ignored}
    return Table(tuple(rules), ignored | ({"lm_head.weight": TIED} if spec.head.tied else {}))


def inside(kind: Kind, model_type: str, unread: Iterable[str]) -> Family:
    """The text decoder in the directory of a model that also sees: the config's `text_config` and the weights under
    `language_model.`; `unread` are patterns of the other weights. It is only read, never written."""
    reasons = dict.fromkeys(unread, "a text decoder sees no pictures")

    def spec_of(config: Mapping[str, Any], where: str) -> DecoderSpec:
        return to_spec(kind, Keys(config, where).take("text_config", dict), f"{where}: text_config")

    def table_of(spec: DecoderSpec) -> Table:
        text = table(kind, spec)
        rules = (replace(one, theirs=tuple("language_model." + name for name in one.theirs)) for one in text.rules)
        return Table(tuple(rules), {"language_model." + name: why for name, why in text.ignored.items()} | reasons)

    def never(spec: DecoderSpec) -> dict[str, Any]:
        raise InputError(f"a text decoder is not written as the whole of a {model_type}")

    return replace(family(kind), model_types=(model_type,), to_spec=spec_of,
                   from_spec=never, table=lambda spec, names: table_of(spec))


# ------------------------------------------------------------------------------------- parts of a config, read
def norm_of(keys: Keys, order: str = "cast_then_scale") -> RMSNorm:
    return RMSNorm(eps=float(keys.take("rms_norm_eps", float, 1e-6)), order=order)


def attention_of(keys: Keys, size: Size, **changes: Any) -> Attention:
    """Causal attention by the usual keys; `changes` are its fields that a family sets otherwise."""
    heads = keys.positive("num_attention_heads")
    width = keys.positive("head_dim", max(size.dim // heads, 1))
    bias = keys.take("attention_bias", bool, False)
    fields = {"q_bias": bias, "k_bias": bias, "v_bias": bias, "out_bias": bias, "window": CAUSAL, **changes}
    if "rope" not in fields:
        fields["rope"] = rope_of(keys, size.context)
    return Attention(heads=heads, kv_heads=keys.positive("num_key_value_heads", heads), head_dim=width,
                     dropout=float(keys.take("attention_dropout", (int, float), 0.0)), **fields)


def mlp_of(keys: Keys, act: str = "hidden_act") -> Mlp:
    """A gated MLP; `act` is the key of its activation."""
    bias = keys.take("mlp_bias", bool, False)
    return Mlp(hidden=keys.positive("intermediate_size"), act=act_of(keys, act, "silu"), gated=True, up_bias=bias,
               down_bias=bias)


def types_of(keys: Keys, size: Size, usual: Sequence[str]) -> list[str]:
    """The `layer_types` of a config, or the usual ones. Raises InputError for other kinds or another number."""
    types = keys.take("layer_types", list, list(usual))
    if len(types) != size.depth or not set(types) <= {FULL, SLIDING}:
        raise InputError(f"{keys.where}: layer_types should hold {size.depth} of {FULL} and {SLIDING}, not {types}")
    return types


def window_of(kind: str, window: int | None) -> Window:
    """Causal; a sliding layer's `window` counts the token itself."""
    return Window(left=window - 1, right=0) if kind == SLIDING and window is not None else CAUSAL


def with_qk_norm(layers: Iterable[Layer]) -> list[Layer]:
    """Layers whose queries and keys are normalised by head, with the norm that the layer has."""
    return [replace(one, mixer=replace(one.mixer, qk_norm=QKNorm(norm=one.norm))) for one in layers]


# ------------------------------------------------------------------------------------- parts of a config, written
def attention_config(spec: DecoderSpec) -> dict[str, Any]:
    """Raises InputError for layers that no attention with rope describes."""
    mixers = [layer.mixer for layer in spec.stack.layers]
    rotated = [mixer for mixer in mixers if isinstance(mixer, Attention) and mixer.rope is not None]
    if not rotated or not all(isinstance(mixer, Attention) for mixer in mixers):
        raise InputError("the hf layout of this kind has layers of attention with rope")
    first = rotated[0]
    return {"num_attention_heads": first.heads, "num_key_value_heads": first.kv_heads, "head_dim": first.head_dim,
            "rope_parameters": rope_config(first.rope, first.head_dim)}


def mlp_config(spec: DecoderSpec, act: str = "hidden_act") -> dict[str, Any]:
    mlp = spec.stack.layers[0].mlp
    if not isinstance(mlp, Mlp) or mlp.act not in TO_HF:
        raise InputError("the hf layout of this kind has layers with one MLP and an activation that transformers names")
    return {"intermediate_size": mlp.hidden, act: TO_HF[mlp.act]}


def windows(spec: DecoderSpec) -> tuple[int | None, list[str]]:
    """(the window of the layers that have one, the `layer_types`)."""
    windows = [layer.mixer.window for layer in spec.stack.layers]
    near = [one.left + 1 for one in windows if one.left is not None]
    return (near[0] if near else None), [FULL if one.left is None else SLIDING for one in windows]


# ------------------------------------------------------------------------------------- names of weights
def attention_rules(theirs: str, ours: str, attention: Attention) -> list[Rule]:
    return [*qkv_rules(theirs + "self_attn.", ours + "mixer.", attention),
            rule(theirs + "self_attn.o_proj.{x}", ours + "mixer.out.{x}"),
            *(rule(f"{theirs}self_attn.{name}.weight", f"{ours}mixer.{name}.weight") for name in ("q_norm", "k_norm"))]


def mlp_rules(theirs: str, ours: str) -> list[Rule]:
    return [rule(f"{theirs}mlp.{part}_proj.{{x}}", f"{ours}mlp.{part}.{{x}}") for part in ("gate", "up", "down")]


def norm_rules(theirs: str, ours: str, names: Iterable[tuple[str, str]]) -> list[Rule]:
    return [rule(f"{theirs}{name}.weight", f"{ours}{mine}.weight") for name, mine in names]


PRE_NORMS = (("input_layernorm", "mixer_norm"), ("post_attention_layernorm", "mlp_norm"))


def pre_norm_rules(theirs: str, ours: str, spec: DecoderSpec) -> list[Rule]:
    """A Llama block's."""
    return [*attention_rules(theirs, ours, spec.stack.layers[0].mixer), *mlp_rules(theirs, ours),
            *norm_rules(theirs, ours, PRE_NORMS)]
