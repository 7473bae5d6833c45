"""The shared parts of transformers' text decoders: the fields of their configs, the names of their weights, and
generation settings. A `Decoder` is a list of fields and a table of weights, each read in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as default
from types import SimpleNamespace
from typing import Any

from mm.checkpoint.family import Extras, Family, Keys, Opened
from mm.checkpoint.fields import Entry, Pieces, Values, always, field, pair, silent
from mm.checkpoint.files import CONFIG, Folder
from mm.checkpoint.hf import ROTARY_BUFFER, TIED, Kind, act, rope
from mm.checkpoint.tables import Table, WeightTransform, fused
from mm.errors import InputError
from mm.spec import CAUSAL, Attention, DecoderSpec, Layer, Mlp, Moe, Stack, Window

FULL, SLIDING = "full_attention", "sliding_attention"
GENERATION, ENDS = "generation_config.json", "eos_token_id"

# ------------------------------------------------------------------------------------- the config of Llama
BIAS = field("attention_bias", "mixer.q_bias", "mixer.k_bias", "mixer.v_bias", "mixer.out_bias", kind=bool,
             default=False)
MLP_BIAS = field("mlp_bias", "mlp.up_bias", "mlp.down_bias", kind=bool, default=False)
NORM = field("rms_norm_eps", "norm.eps", kind=float, default=1e-6)
SIZES = (
    field("hidden_size", "stack.dim"), field("num_hidden_layers", "stack.depth"),
    field("max_position_embeddings", "spec.context", default=2048))
ATTENTION = (
    field("num_attention_heads", "mixer.heads"),
    field("num_key_value_heads", "mixer.kv_heads", default=lambda v: v["mixer.heads"]),
    field("head_dim", "mixer.head_dim", default=lambda v: max(v["stack.dim"] // v["mixer.heads"], 1)),
    silent(BIAS), silent(field("attention_dropout", "mixer.dropout", kind=float, default=0.0)),
    rope(), always(mixer__window=CAUSAL))
MLP = (field("intermediate_size", "mlp.hidden"), act(default="silu"), silent(MLP_BIAS), always(mlp__gated=True))
PLAIN = always(  # where files say nothing else
    mixer__window=CAUSAL, mixer__out_bias=False, mlp__act="silu", mlp__gated=True, mlp__up_bias=False,
    mlp__down_bias=False)
STACK = (*SIZES, *ATTENTION, *MLP, NORM)
LLAMA = (
    *STACK, field("vocab_size", "embed.vocab"),
    field("tie_word_embeddings", "head.tied", kind=bool, default=False))
# ------------------------------------------------------------------------------------- the weights of Llama
WEIGHTS = {
    "model.embed_tokens.weight": "embed.tokens.weight",
    "model.layers.{n}.input_layernorm.weight": "stack.blocks.{n}.mixer_norm.weight",
    "model.layers.{n}.self_attn.[q k v]_proj.{x}": "stack.blocks.{n}.mixer.qkv.{x} | qkv",
    "model.layers.{n}.self_attn.q_norm.weight": "stack.blocks.{n}.mixer.q_norm.weight",
    "model.layers.{n}.self_attn.k_norm.weight": "stack.blocks.{n}.mixer.k_norm.weight",
    "model.layers.{n}.self_attn.o_proj.{x}": "stack.blocks.{n}.mixer.out.{x}",
    "model.layers.{n}.post_attention_layernorm.weight": "stack.blocks.{n}.mlp_norm.weight",
    "model.layers.{n}.mlp.gate_proj.{x}": "stack.blocks.{n}.mlp.gate.{x}",
    "model.layers.{n}.mlp.up_proj.{x}": "stack.blocks.{n}.mlp.up.{x}",
    "model.layers.{n}.mlp.down_proj.{x}": "stack.blocks.{n}.mlp.down.{x}",
    "model.norm.weight": "stack.final_norm.weight",
    "lm_head.weight": "head.weight"}


def block(rows: Mapping[str, str], theirs: str = "model.layers.{n}.", ours: str = "stack.blocks.{n}."
          ) -> dict[str, str]:
    """Rows of one block as those of all; a row without a name of ours is left out of a table that it is added to."""
    return {theirs + name: mine and ours + mine for name, mine in rows.items()}


def side_by_side(spec: Any) -> dict[str, WeightTransform]:
    """Queries, keys and values are one of our weights."""
    return {"qkv": fused(*widths(spec.stack.layers[0].mixer))}


def widths(mixer: Attention) -> tuple[int, int, int]:
    """Rows of the projections to queries, keys and values."""
    return tuple(heads * mixer.head_dim for heads in (mixer.heads, mixer.kv_heads, mixer.kv_heads))


# ------------------------------------------------------------------------------------- a kind of decoder
@dataclass(frozen=True, kw_only=True)
class Decoder(Kind):
    """A class of transformers that is a text decoder."""

    weights: Mapping[str, str] | Callable[[DecoderSpec], Mapping[str, str]] = default(default_factory=lambda: WEIGHTS)
    transforms: Callable[[DecoderSpec], Mapping[str, WeightTransform]] = side_by_side

    def build(self, v: Values) -> DecoderSpec:
        return decoder_of(v)

    def pieces(self, spec: DecoderSpec) -> Pieces:
        return stack_pieces(spec.stack, spec.context, embed=spec.embed, head=spec.head, ahead=len(spec.ahead))

    def experts(self, spec: DecoderSpec) -> int:
        return max((layer.mlp.experts for layer in spec.stack.layers if isinstance(layer.mlp, Moe)), default=0)

    def table(self, spec: DecoderSpec, names: Iterable[str] = ()) -> Table:
        found, tied = super().table(spec), {"lm_head.weight": TIED} if spec.head.tied else {}
        buffer = {"model.layers.{n}.self_attn.rotary_emb.inv_freq": ROTARY_BUFFER}
        return Table(found.rules, buffer | found.ignored | tied)

    def family(self, **more: Any) -> Family:
        return super().family(**{"files": files, "complete": complete} | more)


def decoder_of(v: Values) -> DecoderSpec:
    """The decoder that values describe."""
    layers = layers_of(v)
    return DecoderSpec(embed=v.make("embed"), context=v["spec.context"], head=v.make("head"),
                       ahead=layers[-1:] * v.get("spec.ahead", 0),
                       stack=Stack(dim=v["stack.dim"], layers=layers, final_norm=layers[0].norm))


def stack_pieces(stack: Stack, context: int, ahead: int = 0, **more: Any) -> Pieces:
    """The first of each piece of a stack, of mixers the first with rope."""
    layers, mixers = stack.layers, [layer.mixer for layer in stack.layers]
    moe = next((layer.mlp for layer in layers if isinstance(layer.mlp, Moe)), None)
    dense = next((layer.mlp for layer in layers if isinstance(layer.mlp, Mlp)), moe and moe.expert)
    return Pieces(
        spec=SimpleNamespace(context=context, ahead=ahead), stack=SimpleNamespace(dim=stack.dim, depth=len(layers)),
        layers=layers, layer=layers[0], norm=layers[0].norm, mlp=dense, moe=moe, expert=moe and moe.expert,
        mixer=next((mixer for mixer in mixers if getattr(mixer, "rope", None)), mixers[0]),
        router=moe and moe.router, shared=moe and moe.shared, **more)


def layers_of(v: Values) -> tuple[Layer, ...]:
    """The layers that values describe: `each` holds a list for what differs by layer, fields of the mixer or `mlp`, the
    name of the part that stands there."""
    depth, each, norm = v["stack.depth"], v.fields("each"), v.make("norm")
    parts = each.pop("mlp", ["moe" if "moe.experts" in v else "mlp"] * depth)
    mlps = {part: mixture_of(v) if part == "moe" else v.make("mlp") for part in set(parts)}
    mixer = v.make("mixer")
    mixers = [replace(mixer, **{name: values[i] for name, values in each.items()}) for i in range(depth)]
    return tuple(Layer(mixer=one, mlp=mlps[part], norm=norm, **v.fields("layer"))
                 for one, part in zip(mixers, parts, strict=True))


def mixture_of(v: Values) -> Moe:
    return v.make("moe", expert=v.make("expert"), router=v.make("router"))


def inside(kind: Decoder, model_type: str, unread: Iterable[str]) -> Family:
    """The text decoder in the directory of a model that also sees: the config's `text_config` and the weights under
    `language_model.`; `unread` are patterns of the other weights. It is only read, never written."""
    reasons = dict.fromkeys(unread, "a text decoder sees no pictures")

    def to_spec(config: Mapping[str, Any], where: str) -> DecoderSpec:
        return kind.to_spec(Keys(config, where).take("text_config", dict), f"{where}: text_config")

    def table(spec: DecoderSpec, names: Iterable[str]) -> Table:
        text = kind.table(spec).renamed(lambda name: "language_model." + name)
        return Table(text.rules, dict(text.ignored) | reasons)

    def never(spec: DecoderSpec) -> dict[str, Any]:
        raise InputError(f"a text decoder is not written as the whole of a {model_type}")
    return kind.family(model_types=(model_type,), to_spec=to_spec, from_spec=never, table=table)


# ------------------------------------------------------------------------------------- windows
def window_of(kind: str, window: int | None) -> Window:
    """Causal; a sliding layer's `window` counts the token itself."""
    return Window(left=window - 1, right=0) if kind == SLIDING and window is not None else CAUSAL


def types_of(keys: Keys, v: Values, usual: Callable[[int], str]) -> list[str]:
    """The `layer_types` of a config, or the usual one of each layer. Raises InputError for other kinds or another
    number."""
    depth = v["stack.depth"]
    types = keys.take("layer_types", list, [usual(i) for i in range(depth)])
    if len(types) != depth or not set(types) <= {FULL, SLIDING}:
        raise InputError(f"{keys.where}: layer_types should hold {depth} of {FULL} and {SLIDING}, not {types}")
    return types


def windows(layers: Sequence[Layer]) -> tuple[int | None, list[str]]:
    """(the window of the layers that have one, the `layer_types`)."""
    found = [layer.mixer.window for layer in layers]
    near = [one.left + 1 for one in found if one.left is not None]
    return (near[0] if near else None), [FULL if one.left is None else SLIDING for one in found]


def one_window(switch: str | None = None) -> Entry:
    """One window for all layers or none; `switch` is a key that turns it on."""
    def read(keys: Keys, v: Values) -> dict[str, Any]:
        window = keys.take("sliding_window", int, None)
        on = switch is None or keys.take(switch, bool, False)
        return {"mixer.window": window_of(SLIDING, window if on else None)}

    def write(pieces: Pieces) -> dict[str, Any]:
        window = windows(pieces.layers)[0]
        return {"sliding_window": window} | ({switch: window is not None} if switch else {})
    return pair("sliding_window", read, write)


def alternating(usual: Callable[[int], str], window: int | None = None) -> Entry:
    """A window in some layers, by `layer_types` or as usual; `window` is that of a config without one."""
    def read(keys: Keys, v: Values) -> dict[str, Any]:
        width = keys.take("sliding_window", int, window)
        return {"each.window": [window_of(kind, width) for kind in types_of(keys, v, usual)]}

    def write(pieces: Pieces) -> dict[str, Any]:
        width, types = windows(pieces.layers)
        return {"layer_types": types, "sliding_window": width or window}
    return pair("layer_types", read, write)


# ------------------------------------------------------------------------------------- generation settings
def complete(folder: Folder, opened: Opened) -> Opened:
    """With the directory's generation settings; where there are none, with the ends that the config names. Raises
    InputError for ends that are no ids."""
    file, found = folder / GENERATION, folder.json(GENERATION)
    if not file.is_file():
        file, found = folder / CONFIG, {ENDS: folder.json(CONFIG).get(ENDS)}
    ends = found.get(ENDS)
    if ends is not None and not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends])):
        raise InputError(f"{file}: {ENDS} should be an id or a list of ids, not {ends!r}")
    return replace(opened, extras=replace(opened.extras, generation=found))


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    """The generation settings, which transformers and vLLM read, and the config with the ids of start, end and padding.
    null in a config keeps out those of transformers' classes."""
    t = extras.tokenizer
    bos, eos, pad = (None, None, None) if t is None else (t.bos_id, t.eos_id, t.pad_id)
    ids = {"bos_token_id": bos, ENDS: eos, "pad_token_id": pad}
    kept = {name: value for name, value in (ids | extras.generation).items() if value is not None}
    return {GENERATION: kept, CONFIG: config | ids}

