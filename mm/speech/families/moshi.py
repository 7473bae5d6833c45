"""Moshi, Hibiki, and Kyutai's speech-to-text and text-to-speech models as Kyutai's package keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm.checkpoint import files as checkpoint
from mm.checkpoint.family import Extras, Family, Keys, Opened, ensure_kept
from mm.checkpoint.files import CONFIG, WEIGHTS, Folder
from mm.errors import InputError
from mm.spec import (
    Attention,
    Choice,
    Condition,
    Conditioning,
    Depth,
    DuplexSpec,
    Layer,
    LayerNorm,
    Mlp,
    Norm,
    RMSNorm,
    Rope,
    Stack,
    TextStream,
    Vectors,
    Window,
)
from mm.speech.families.moshi_weights import CHANGES, MERGED, dequantised, table, with_changes

NORMS: dict[str, Norm] = {"rms_norm_f32": RMSNorm(eps=1e-8, order="scale_then_cast"),
                          "rms_norm": RMSNorm(eps=1e-5, order="scale_then_cast"),
                          "layer_norm": LayerNorm(eps=1e-5), "layer_norm_f32": LayerNorm(eps=1e-8)}
ROPES = {"rope": "interleaved", "rope_concat": "half"}
# Names of other files, and settings of generation that do not change the model.
BESIDE = ("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "model_id", "lm_gen_config", "tts_config",
          "stt_config", "model_type")
HARMLESS = ("depformer_causal", "depformer_context", "gradient_checkpointing", "quantize", "lora", "lora_rank",
            "lora_scaling", "lora_name", "version")
HIBIKI_END = 2
OFFICIAL = {  # Moshi 7B, whose first files had no config
    "dim": 4096, "text_card": 32000, "existing_text_padding_id": 3, "n_q": 16, "dep_q": 8, "card": 2048,
    "num_heads": 32, "num_layers": 32, "hidden_scale": 4.125, "context": 3000, "max_period": 10000, "gating": "silu",
    "norm": "rms_norm_f32", "positional_embedding": "rope", "depformer_dim": 1024, "depformer_dim_feedforward": 4224,
    "depformer_num_heads": 16, "depformer_num_layers": 6, "depformer_multi_linear": True, "depformer_gating": "silu",
    "depformer_pos_emb": "none", "depformer_weights_per_step": True, "delays": [0, 0, *[1] * 7, 0, *[1] * 7]}


# ----------------------------------------------------------------------------------------- reading
def to_spec(config: Mapping[str, Any], where: str) -> DuplexSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    keys = Keys({name: value for name, value in config.items() if name not in BESIDE}, where)
    dim, own = keys.positive("dim"), keys.take("dep_q", int)
    count, delays = keys.positive("n_q"), tuple(keys.take("delays", list))
    if len(delays) != count + 1 or not all(isinstance(delay, int) for delay in delays):
        raise InputError(f"{where}: delays should hold {count + 1} numbers, the text's and one for each of n_q")
    if keys.take("norm_emb", bool, False) or not keys.take("causal", bool, True):
        raise InputError(f"{where}: norm_emb and a model that is not causal are not supported")
    second = any([keys.take(name, bool, False) for name in ("demux_second_text_stream", "demux_second_stream")])
    text = TextStream(vocab=keys.positive("text_card"), outputs=keys.take("text_card_out", int, None), second=second,
                      padding=keys.take("existing_text_padding_id", int, 3),
                      word_end=keys.take("existing_text_end_padding_id", int, 0),
                      end=HIBIKI_END if config.get("model_type") == "hibiki" else None)
    shared = {name: keys.left.get(name) for name in ("layer_scale", "gating", "kv_repeat", "max_period", "num_layers",
                                                     "norm", "hidden_scale")}
    context = keys.positive("context", None) if keys.left.get("context") else None
    stack = temporal(keys, dim, context)
    depth = to_depth(keys, shared, own) if own else None
    heads = (keys.take("extra_heads_dim", int, 6),) * keys.take("extra_heads_num_heads", int, 0)
    spec = DuplexSpec(text=text, stack=stack, card=keys.positive("card"), delays=delays, depth=depth, extra=heads,
                      head_bias=keys.take("bias_proj", bool, False), context=context or 3000,
                      conditioning=to_conditioning(keys))
    left = [name for name in keys.left if name.startswith("depformer_")] if own == 0 else []
    keys.done((*HARMLESS, *left))
    return spec


def norm_of(keys: Keys, name: str | None) -> Norm:
    if name not in NORMS:
        raise InputError(f"{keys.where}: norm should be one of {', '.join(NORMS)}, not {name!r}")
    return NORMS[name]


def rope_of(keys: Keys, kind: str, period: Any) -> Rope | None:
    if kind != "none" and kind not in ROPES:
        raise InputError(f"{keys.where}: positions should be rope, rope_concat or none, not {kind!r}")
    return None if kind == "none" else Rope(theta=float(period or 10000), layout=ROPES[kind])


def attention_of(keys: Keys, dim: int, heads: int, repeat: int, window: Window, rope: Rope | None) -> Attention:
    if dim % heads or heads % repeat:
        raise InputError(f"{keys.where}: {heads} heads do not share a width of {dim} or {heads} / {repeat} keys")
    return Attention(heads=heads, kv_heads=heads // repeat, head_dim=dim // heads, window=window, rope=rope,
                     q_bias=False, k_bias=False, v_bias=False, out_bias=False)


def gated_width(width: int, dim: int) -> int:
    """Returns the width of a gated MLP from that of a plain one."""
    return 21 * dim // 8 if width == 4 * dim else 2 * width // 3


def mlp_of(keys: Keys, gating: str, width: int, dim: int) -> Mlp:
    plain = {"up_bias": False, "down_bias": False}
    if gating == "none":
        return Mlp(hidden=width, act="gelu", **plain)
    if gating not in ("silu", "gelu", "relu"):
        raise InputError(f"{keys.where}: gating should be none, silu, gelu or relu, not {gating!r}")
    return Mlp(hidden=gated_width(width, dim), act=gating, gated=True, **plain)


def temporal(keys: Keys, dim: int, context: int | None) -> Stack:
    heads, norm = keys.positive("num_heads"), norm_of(keys, keys.take("norm", str, "layer_norm"))
    window = Window(left=None if context is None else context - 1, right=0)
    rope = rope_of(keys, keys.take("positional_embedding", str, "sin"), keys.take("max_period", (int, float), None))
    repeat, scale = keys.positive("kv_repeat", 1), keys.take("layer_scale", (int, float), None)
    width = int(keys.take("hidden_scale", (int, float), 4) * dim)
    cross = keys.take("cross_attention", bool, False)
    layer = Layer(
        mixer=attention_of(keys, dim, heads, repeat, window, rope), norm=norm,
        mlp=mlp_of(keys, keys.take("gating", str, "none"), width, dim),
        cross=attention_of(keys, dim, heads, repeat, Window(), None) if cross else None,
        cross_norm=LayerNorm(eps=1e-5) if cross else None, layer_scale=None if scale is None else float(scale))
    return Stack(dim=dim, layers=(layer,) * keys.positive("num_layers"), final_norm=norm)


def to_depth(keys: Keys, shared: Mapping[str, Any], own: int) -> Depth:
    """Reads the depth transformer; where a `depformer_` key is absent, the temporal stack's counts."""
    def take(name: str, kind: Any, default: Any = None) -> Any:
        given = keys.take("depformer_" + name, kind, None) if "depformer_" + name in keys.left else shared.get(name)
        return default if given is None else given
    dim, heads = keys.positive("depformer_dim", 256), keys.positive("depformer_num_heads")
    per_step = keys.take("depformer_weights_per_step", bool, False)
    schedule = keys.take("depformer_weights_per_step_schedule", list, None)
    one_input = not keys.take("depformer_multi_linear", bool, False)
    if not per_step and not (one_input or own == 1):
        raise InputError(f"{keys.where}: a depth transformer with inputs per step has weights per step too")
    weights = tuple(schedule or range(own)) if per_step else (0,) * own
    rope = rope_of(keys, keys.take("depformer_pos_emb", str, "sin"), take("max_period", (int, float)))
    width = keys.take("depformer_dim_feedforward", (int, list), None) or int((shared["hidden_scale"] or 4) * dim)
    gating, scale = take("gating", str, "none"), take("layer_scale", (int, float))
    widths = width if isinstance(width, list) else [width]
    mlps = [mlp_of(keys, gating, one, dim) for one in widths]
    last = keys.take("depformer_norm", str, None)
    if last is not None and not last.startswith("layer_norm"):
        raise InputError(f"{keys.where}: depformer_norm should be a layer_norm, not {last!r}")
    layer = Layer(mixer=attention_of(keys, dim, heads, take("kv_repeat", int, 1), Window(right=0), rope),
                  mlp=mlps[0], norm=norm_of(keys, shared["norm"] or "layer_norm"),
                  layer_scale=None if scale is None else float(scale))
    stack = Stack(dim=dim, layers=(layer,) * take("num_layers", int), final_norm=last and norm_of(keys, last))
    return Depth(stack=stack, weights=weights, one_input=one_input and max(weights) > 0,
                 rank=keys.take("depformer_low_rank_embeddings", int, None),
                 hidden=tuple(one.hidden for one in mlps) if len({one.hidden for one in mlps}) > 1 else ())


def to_conditioning(keys: Keys) -> Conditioning | None:
    given, fuser = keys.take("conditioners", dict, {}), Keys(keys.take("fuser", dict, {}), f"{keys.where}: fuser")
    into = {name: way for way in ("sum", "cross", "prepend") for name in fuser.take(way, list, [])}
    positions = fuser.take("cross_attention_pos_emb", bool, False)
    scale = float(fuser.take("cross_attention_pos_emb_scale", (int, float), 1.0))
    fuser.done()
    if not given:
        return None
    if set(given) != set(into):
        raise InputError(f"{keys.where}: conditioners and fuser name different conditions")
    conditions = tuple(
        Condition(name=name, of=to_condition(Keys(given[name], f"{keys.where}: {name}")), into=into[name])
        for name in into)
    return Conditioning(conditions=conditions, cross_positions=scale if positions else 0.0)


def to_condition(keys: Keys) -> Choice | Vectors:
    kind = keys.take("type", str)
    inner = Keys(keys.take(kind, dict, {}), keys.where)
    keys.done()
    common = {"dim": inner.positive("dim"), "learned_absence": inner.take("learn_padding", bool, True)}
    for name in ("init_scale", "output_dim", "device"):
        inner.left.pop(name, None)
    if kind == "lut":
        inner.take("tokenizer", str, "noop")
        values = tuple(inner.take("possible_values", list, []))
        made = Choice(bins=inner.positive("n_bins"), values=values, **common)
    elif kind == "tensor":
        made = Vectors(**common)
    else:
        raise InputError(f"{keys.where}: conditions of the type {kind!r} are not supported, only lut and tensor")
    inner.done()
    return made


# ----------------------------------------------------------------------------------------- writing
def from_spec(spec: DuplexSpec) -> dict[str, Any]:
    """Raises InputError for a model that Kyutai's package cannot hold."""
    layer, text, window = spec.stack.layers[0], spec.text, None
    if not isinstance(layer.mixer, Attention) or not isinstance(layer.mlp, Mlp):
        raise InputError("the kyutai layout has layers of attention with one MLP")
    window = layer.mixer.window
    config = {
        "dim": spec.stack.dim, "text_card": text.vocab, "existing_text_padding_id": text.padding,
        "existing_text_end_padding_id": text.word_end, "n_q": spec.codebooks, "dep_q": spec.own, "card": spec.card,
        "num_heads": layer.mixer.heads, "num_layers": len(spec.stack.layers), "causal": True,
        "hidden_scale": scale_of(plain_width(layer.mlp, spec.stack.dim), spec.stack.dim),
        "layer_scale": layer.layer_scale, "context": None if window.left is None else window.left + 1,
        "gating": layer.mlp.act if layer.mlp.gated else "none", "norm": name_of(layer.norm),
        "kv_repeat": layer.mixer.heads // layer.mixer.kv_heads, **positions("", layer.mixer.rope),
        "delays": list(spec.delays), "bias_proj": spec.head_bias, "cross_attention": layer.cross is not None}
    if spec.extra:
        config |= {"extra_heads_num_heads": len(spec.extra), "extra_heads_dim": spec.extra[0]}
    if text.outputs is not None:
        config["text_card_out"] = text.outputs
    if text.second:
        config["demux_second_stream"] = True
    if text.end is not None:
        config["model_type"] = "hibiki"
    config |= depth_config(spec.depth) if spec.depth else {"depformer_multi_linear": True}
    config |= conditioning_config(spec.conditioning) if spec.conditioning else {}
    ensure_kept(spec, replace(to_spec(config, "config"), context=spec.context), "kyutai")
    return config


def name_of(norm: Norm | None) -> str | None:
    found = [name for name, known in NORMS.items() if known == norm]
    if norm is not None and not found:
        raise InputError(f"the kyutai layout has no norm like {norm}")
    return found[0] if found else None


def positions(prefix: str, rope: Rope | None) -> dict[str, Any]:
    kind = "none" if rope is None else next(name for name, layout in ROPES.items() if layout == rope.layout)
    key = "depformer_pos_emb" if prefix else "positional_embedding"
    return {key: kind, prefix + "max_period": 10000.0 if rope is None else rope.theta}


def plain_width(mlp: Mlp, dim: int) -> int:
    """Inverts `gated_width`. Raises InputError for a width that no plain MLP gives."""
    if not mlp.gated:
        return mlp.hidden
    width = -(-3 * mlp.hidden // 2)
    found = [one for one in (4 * dim, width, width + 1) if gated_width(one, dim) == mlp.hidden]
    if not found:
        raise InputError(f"the kyutai layout has no gated MLP of width {mlp.hidden} in a stack of width {dim}")
    return found[0]


def scale_of(width: int, dim: int) -> float:
    """Returns a scale of which `int(scale * dim)` is the width, whatever rounding does."""
    return next(scale for scale in (width / dim, (width + 0.5) / dim) if int(scale * dim) == width)


def depth_config(depth: Depth) -> dict[str, Any]:
    if depth.stack.final_norm is not None and (depth.sets == 1 or not isinstance(depth.stack.final_norm, LayerNorm)):
        raise InputError("the kyutai layout has no norm after the depth transformer but a LayerNorm per step")
    layer, dim, sets = depth.stack.layers[0], depth.stack.dim, depth.sets
    widths = [plain_width(replace(layer.mlp, hidden=one), dim) for one in depth.hidden or [layer.mlp.hidden]]
    config = {
        "depformer_dim": dim, "depformer_dim_feedforward": widths if depth.hidden else widths[0],
        "depformer_num_heads": layer.mixer.heads, "depformer_num_layers": len(depth.stack.layers),
        "depformer_layer_scale": layer.layer_scale, "depformer_gating": layer.mlp.act,
        "depformer_multi_linear": not depth.one_input and sets > 1, "depformer_weights_per_step": sets > 1,
        "depformer_kv_repeat": layer.mixer.heads // layer.mixer.kv_heads, "depformer_causal": True,
        **positions("depformer_", layer.mixer.rope)}
    if depth.codebooks == 1:
        config |= {"depformer_multi_linear": True, "depformer_weights_per_step": True}
    if sets > 1 and depth.weights != tuple(range(sets)):
        config["depformer_weights_per_step_schedule"] = list(depth.weights)
    if depth.rank is not None:
        config["depformer_low_rank_embeddings"] = depth.rank
    if depth.stack.final_norm is not None:
        config["depformer_norm"] = name_of(depth.stack.final_norm)
    return config


def conditioning_config(settings: Conditioning) -> dict[str, Any]:
    written, fuser = {}, {"sum": [], "cross": [], "prepend": []}
    for one in settings.conditions:
        fuser[one.into].append(one.name)
        common = {"dim": one.of.dim, "learn_padding": one.of.learned_absence}
        if isinstance(one.of, Choice):
            more = {"possible_values": list(one.of.values)} if one.of.values else {}
            written[one.name] = {"type": "lut", "lut": common | {"n_bins": one.of.bins, "tokenizer": "noop"} | more}
        else:
            written[one.name] = {"type": "tensor", "tensor": common}
    if settings.cross_positions:
        fuser |= {"cross_attention_pos_emb": True, "cross_attention_pos_emb_scale": settings.cross_positions}
    return {"conditioners": written, "fuser": fuser}


# ----------------------------------------------------------------------------------------- files
def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    kept = {name: value for name, value in extras.generation.items() if name in BESIDE and name != "moshi_name"}
    return {CONFIG: kept | {"moshi_name": WEIGHTS} | config}


def complete(folder: Folder, opened: Opened) -> Opened:
    """Widens int8 weights and merges low-rank changes; the config's settings of generation are kept."""
    config = folder.json(CONFIG)
    weights = dequantised(opened.weights)
    weights = with_changes(folder.path, config, weights) if config.get("lora") else weights
    extras = replace(opened.extras, generation={name: config[name] for name in BESIDE if config.get(name)})
    return replace(opened, weights=weights, table=table(opened.spec, weights.shapes), extras=extras)


def read_file(path: Path) -> Opened:
    """Reads a file on its own: Moshi 7B, whose first files had no config. Raises InputError for another."""
    weights = dequantised(checkpoint.open_files([path], False))
    if "text_emb.weight" not in weights.shapes:
        raise InputError(f"{path} does not hold a Moshi under Kyutai's names; name the directory of another layout")
    spec = to_spec(OFFICIAL, str(path))
    return Opened(spec, weights, table(spec, weights.shapes), Extras())


KYUTAI = Family(
    layout="kyutai", config=CONFIG, weights=(WEIGHTS, MERGED, CHANGES), to_spec=to_spec, from_spec=from_spec,
    table=table, files=files, complete=complete, has_text=True,
    accepts=lambda config: "dep_q" in config and "n_q" in config,
    named=lambda config: (str(config["moshi_name"]),) if config.get("moshi_name") else ())
