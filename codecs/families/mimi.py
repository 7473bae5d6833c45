"""Mimi on disk, as transformers keeps it (MimiModel: flat names in files, others in the memory of version 5) and as
Kyutai keeps it: a safetensors file beside the language models, and the settings of its package's loaders."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mm.checkpoint import files as checkpoint
from mm.checkpoint.family import Extras, Family, Keys, Opened, ensure_kept
from mm.checkpoint.fields import Entry, Pieces, Values, field, gather, pair, spell
from mm.checkpoint.files import CONFIG
from mm.checkpoint.hf import FILES, HARMLESS, rope_of
from mm.checkpoint.tables import SAME, Rule, Table, WeightTransform, rule
from mm.errors import InputError

from ..spec import MimiSpec, Quantizer, Seanet, mimi_stack

UNREAD = HARMLESS | {"max_position_embeddings", "attention_dropout", "tie_word_embeddings", "use_streaming"}
SETTINGS = "mimi_config.json"
KYUTAI_FILES = ("mimi.safetensors", "tokenizer-e351c8d8-checkpoint125.safetensors",
                "mimi-pytorch-e351c8d8@125.safetensors")
OFFICIAL = MimiSpec(encoder=mimi_stack(), decoder=mimi_stack())


# ------------------------------------------------------------------------------------- fields
def fixed(**wanted: Any) -> Entry:
    """Keys with one value only, which may be a function of the values at other places. Raises InputError for another
    value."""
    def values(at: Callable[[str], Any]) -> dict[str, Any]:
        return {name: value(at) if callable(value) else value for name, value in wanted.items()}

    def read(keys: Keys, v: Values) -> None:
        for name, value in values(v.__getitem__).items():
            given = keys.left.pop(name, value)
            if given != value:
                raise InputError(f"{keys.where}: {name} should be {value!r}, not {given!r}: nothing else is supported")
    return Entry(" ".join(wanted), read, lambda pieces: values(pieces.at))


def width(at: Callable[[str], Any]) -> int:
    return at("stack.dim")


def heads(at: Callable[[str], Any]) -> int:
    return at("stack.heads")


def ratios(key: str, default: Any = ...) -> Entry:
    return field(key, "seanet.ratios", kind=(list, tuple), default=default, load=tuple, save=list)


def spec_of(v: Values, frame_rate: float, where: str) -> MimiSpec:
    """The codec that the values of a config describe. Raises InputError unless frames are a whole number, above one, of
    encoder steps."""
    seanet, stack = Seanet(**v.fields("seanet")), mimi_stack(**v.fields("stack"))
    stride = v["mimi.rate"] / seanet.hop / frame_rate if frame_rate > 0 else 0
    if stride < 2 or abs(stride - round(stride)) > 1e-6:
        raise InputError(f"{where}: {frame_rate} frames a second are not a whole fraction of "
                         f"{v['mimi.rate'] / seanet.hop:g} steps")
    return MimiSpec(rate=v["mimi.rate"], seanet=seanet, encoder=stack, decoder=stack, stride=round(stride),
                    quantizer=Quantizer(**v.fields("quantizer")))


def pieces_of(spec: MimiSpec) -> Pieces:
    """The pieces of a codec that is written. What a layout cannot hold shows when it is read back."""
    stack, layer = spec.encoder, spec.encoder.layers[0]
    return Pieces(mimi=spec, seanet=spec.seanet, quantizer=spec.quantizer, stack=SimpleNamespace(
        dim=stack.dim, depth=len(stack.layers), heads=layer.mixer.heads, hidden=layer.mlp.hidden, eps=layer.norm.eps,
        window=layer.mixer.window.left + 1, theta=layer.mixer.rope.theta, layer_scale=layer.layer_scale))


# ------------------------------------------------------------------------------------- transformers' config
def theta(keys: Keys, v: Values) -> dict[str, float]:
    rope = rope_of(keys, keys.positive("max_position_embeddings", 8000))
    if rope.scaling is not None:
        raise InputError(f"{keys.where}: rope_parameters should not scale positions in Mimi")
    return {"stack.theta": rope.theta}


def codebook_width(keys: Keys, v: Values) -> dict[str, int]:
    dim = keys.positive("vector_quantization_hidden_dimension", 256)
    if dim == v["stack.dim"]:
        raise InputError(f"{keys.where}: codebooks as wide as the model ({dim}) have no projections, which is not "
                         "supported")
    return {"quantizer.dim": dim}


def frame_rate(keys: Keys, v: Values) -> dict[str, Any]:
    given = [keys.take(name, (int, float), None) for name in ("frame_rate", "_frame_rate")]
    return {"frame_rate": given[0] or given[1]}


HF_FIELDS = (
    field("sampling_rate", "mimi.rate", default=24000), field("hidden_size", "stack.dim", default=512),
    field("num_attention_heads", "stack.heads", default=8),
    pair("vector_quantization_hidden_dimension", codebook_width,
         lambda p: {"vector_quantization_hidden_dimension": p.quantizer.dim}),
    fixed(use_causal_conv=True, pad_mode="constant", trim_right_ratio=1.0, use_conv_shortcut=False, hidden_act="gelu",
          attention_bias=False, num_key_value_heads=heads, head_dim=lambda at: width(at) // heads(at),
          codebook_dim=lambda at: at("quantizer.dim"), upsample_groups=width),
    field("audio_channels", "seanet.channels", default=1), field("num_filters", "seanet.filters", default=64),
    ratios("upsampling_ratios", (8, 6, 5, 4)), field("num_residual_layers", "seanet.residuals", default=1),
    field("compress", "seanet.compress", default=2), field("dilation_growth_rate", "seanet.dilation_base", default=2),
    field("kernel_size", "seanet.kernel", default=7), field("last_kernel_size", "seanet.last_kernel", default=3),
    field("residual_kernel_size", "seanet.residual_kernel", default=3),
    pair("frame_rate", frame_rate, lambda p: {"frame_rate": p.mimi.frame_rate}),
    field("num_quantizers", "quantizer.codebooks", default=32), field("codebook_size", "quantizer.size", default=2048),
    field("num_semantic_quantizers", "quantizer.semantic", default=1),
    pair("rope_parameters", theta, lambda p: {
        "rope_parameters": {"rope_type": "default", "rope_theta": p.stack.theta}}),
    field("num_hidden_layers", "stack.depth", default=8), field("intermediate_size", "stack.hidden", default=2048),
    field("sliding_window", "stack.window", default=250), field("norm_eps", "stack.eps", kind=float, default=1e-5),
    field("layer_scale_initial_scale", "stack.layer_scale", kind=float, default=0.01))


def from_hf(config: Mapping[str, Any], where: str) -> MimiSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    keys = Keys(config, where)
    v = gather(HF_FIELDS, keys)
    keys.done(UNREAD)
    return spec_of(v, v["frame_rate"] or v["mimi.rate"] / Seanet(**v.fields("seanet")).hop / 2, where)


def to_hf(spec: MimiSpec) -> dict[str, Any]:
    """Raises InputError for a codec that transformers' class cannot hold."""
    config = {"architectures": ["MimiModel"], "model_type": "mimi"} | spell(HF_FIELDS, pieces_of(spec))
    ensure_kept(spec, from_hf(config, "config"), "hf")
    return config


# ------------------------------------------------------------------------------------- Kyutai's settings
def semantic(keys: Keys, v: Values) -> dict[str, int]:
    return {"quantizer.semantic": keys.positive("n_q_semantic", 1)}


KYUTAI_FIELDS = {
    "seanet": (
        fixed(causal=True, activation="ELU", norm="none", pad_mode="constant", true_skip=True,
              disable_norm_outer_blocks=0),
        field("channels", "seanet.channels", default=1), field("dimension", "stack.dim"),
        field("n_filters", "seanet.filters"), ratios("ratios"), field("n_residual_layers", "seanet.residuals"),
        field("dilation_base", "seanet.dilation_base"), field("compress", "seanet.compress"),
        field("kernel_size", "seanet.kernel"), field("residual_kernel_size", "seanet.residual_kernel"),
        field("last_kernel_size", "seanet.last_kernel")),
    "quantizer": (
        fixed(input_dimension=width, output_dimension=width), field("n_q", "quantizer.codebooks"),
        field("bins", "quantizer.size"), field("dimension", "quantizer.dim"),
        pair("n_q_semantic", semantic,
             lambda p: {} if p.quantizer.semantic == 1 else {"n_q_semantic": p.quantizer.semantic})),
    "transformer": (
        fixed(d_model=width, input_dimension=width, output_dimensions=lambda at: [width(at)], causal=True,
              conv_layout=True, gating="none", norm="layer_norm", positional_embedding="rope"),
        field("num_layers", "stack.depth"), field("num_heads", "stack.heads"),
        field("dim_feedforward", "stack.hidden"), field("context", "stack.window"),
        field("max_period", "stack.theta", kind=float), field("layer_scale", "stack.layer_scale", kind=float))}


def from_kyutai(config: Mapping[str, Any], where: str) -> MimiSpec:
    """The settings beside a language model's config, or the official ones where it names none."""
    name = config.get("mimi_config_name")
    if name is None:
        return OFFICIAL
    path = Path(where).parent / str(name)
    return from_settings(checkpoint.read_json(path), str(path))


def from_settings(config: Mapping[str, Any], where: str) -> MimiSpec:
    """Raises InputError that names settings which are absent, wrong, or not understood."""
    keys, v = Keys(config, where), Values()
    v["mimi.rate"], frames = keys.positive("sample_rate"), keys.take("frame_rate", (int, float))
    keys.left.pop("channels", None)  # seanet's
    for name, fields in KYUTAI_FIELDS.items():
        part = Keys(keys.take(name, dict), f"{where}: {name}")
        for entry in fields:
            entry.read(part, v)
        part.done()
    keys.done()
    return spec_of(v, frames, where)


def to_kyutai(spec: MimiSpec) -> dict[str, Any]:
    """Raises InputError for a codec that the official package cannot hold."""
    pieces = pieces_of(spec)
    config = {"sample_rate": spec.rate, "channels": spec.seanet.channels, "frame_rate": spec.frame_rate}
    config |= {name: spell(fields, pieces) for name, fields in KYUTAI_FIELDS.items()}
    ensure_kept(spec, from_settings(config, "config"), "kyutai")
    return config


# ------------------------------------------------------------------------------------- weights
# Theirs, then ours: (D, C, kernel), (D, kernel, C); (C, D, kernel), (kernel, D, C); (C, 1, kernel), (kernel, C);
# (D, C, 1), (D, C).
WINDOWS = WeightTransform(lambda xs: [xs[0].transpose(1, 2)], lambda xs: [xs[0].transpose(1, 2)])
REVERSED = WeightTransform(lambda xs: [xs[0].permute(2, 1, 0)], lambda xs: [xs[0].permute(2, 1, 0)])
DEPTHWISE = WeightTransform(lambda xs: [xs[0][:, 0].T], lambda xs: [xs[0].T[:, None]])
POINTWISE = WeightTransform(lambda xs: [xs[0][..., 0]], lambda xs: [xs[0][..., None]])


def table_of(spec: MimiSpec, n: Mapping[str, Any]) -> Table:
    """n: the names of a layout, `attention` among them: its rules for one layer, given both prefixes."""
    rules = [rule(n["downsample"], "downsample.weight", WINDOWS), rule(n["upsample"], "upsample.weight", DEPTHWISE)]
    for side, stack in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        rules += [r for theirs, ours, transform in seanet(spec, side, n) for r in affine(theirs, ours, transform)]
        heads = stack.layers[0].mixer.heads
        rules += block(n[f"{side}_stack"] + "layers.{n}.", f"{side}_stack.blocks.{{n}}.", n, heads)
    for part in ("semantic", "acoustic"):
        theirs, ours = n[part], f"quantizer.{part}."
        rules += [rule(f"{theirs}input_proj.weight", ours + "down.weight", POINTWISE),
                  rule(f"{theirs}output_proj.weight", ours + "up.weight", POINTWISE)]
        rules += [rule(f"{theirs}{n['codebook']}.{n[name]}", f"{ours}codebooks.{{n}}.{name}")
                  for name in ("initialized", "usage", "sum")]
    return Table(tuple(rules))


def affine(theirs: str, ours: str, transform: WeightTransform) -> list[Rule]:
    return [rule(f"{theirs}.weight", f"{ours}.weight", transform), rule(f"{theirs}.bias", f"{ours}.bias")]


def seanet(spec: MimiSpec, side: str, n: Mapping[str, Any]) -> Iterator[tuple[str, str, WeightTransform]]:
    """(theirs, ours, transform) for every convolution; their lists count activations too."""
    blocks = ["block"] * spec.seanet.residuals
    stage = [*blocks, "conv"] if side == "encoder" else ["transposed", *blocks]
    at = 0
    for i, kind in enumerate(["first", *stage * len(spec.seanet.ratios), "conv"]):
        at += {"first": 0, "block": 1}.get(kind, 2)
        theirs, ours = f"{n[side]}{at}", f"{side}.layers.{i}"
        if kind == "block":
            yield f"{theirs}.block.1.{n['conv']}", f"{ours}.narrow", WINDOWS
            yield f"{theirs}.block.3.{n['conv']}", f"{ours}.wide", WINDOWS
        else:
            transposed = kind == "transposed"
            yield f"{theirs}.{n['transposed' if transposed else 'conv']}", ours, REVERSED if transposed else WINDOWS


def block(theirs: str, ours: str, n: Mapping[str, Any], heads: int) -> list[Rule]:
    names = {"mixer.out.weight": "out", "mlp.up.weight": "mlp_up", "mlp.down.weight": "mlp_down",
             "mixer_norm.{x}": "mixer_norm", "mlp_norm.{x}": "mlp_norm", "mixer_scale": "mixer_scale",
             "mlp_scale": "mlp_scale"}
    projections, transform = n["qkv"], n["qkv_transform"](heads)
    return [rule(tuple(theirs + name for name in projections), ours + "mixer.qkv.weight", transform),
            *(rule(theirs + n[name], ours + mine) for mine, name in names.items())]


def halved(heads: int) -> WeightTransform:
    """Separate projections whose query and key rows hold rotary pairs as two halves per head; ours are interleaved."""
    def riffle(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def deal(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def load(xs):
        return [torch.cat([riffle(xs[0]), riffle(xs[1]), xs[2]])]

    def save(xs):
        q, k, v = xs[0].chunk(3)
        return [deal(q), deal(k), v]
    return WeightTransform(load, save)


def together(heads: int) -> WeightTransform:
    return SAME


HF_NAMES = {
    "encoder": "encoder.layers.", "decoder": "decoder.layers.", "conv": "conv", "transposed": "conv",
    "encoder_stack": "encoder_transformer.", "decoder_stack": "decoder_transformer.",
    "downsample": "downsample.conv.weight", "upsample": "upsample.conv.weight",
    "semantic": "quantizer.semantic_residual_vector_quantizer.",
    "acoustic": "quantizer.acoustic_residual_vector_quantizer.", "codebook": "layers.{n}.codebook",
    "initialized": "initialized", "usage": "cluster_usage", "sum": "embed_sum",
    "qkv": tuple(f"self_attn.{name}_proj.weight" for name in "qkv"), "qkv_transform": halved,
    "out": "self_attn.o_proj.weight", "mixer_norm": "input_layernorm.{x}", "mlp_norm": "post_attention_layernorm.{x}",
    "mlp_up": "mlp.fc1.weight", "mlp_down": "mlp.fc2.weight", "mixer_scale": "self_attn_layer_scale.scale",
    "mlp_scale": "mlp_layer_scale.scale"}
IN_HALVES = {
    "encoder": "encoder.encoder_seanet.layers.", "decoder": "decoder.decoder_seanet.layers.",
    "encoder_stack": "encoder.encoder_transformer.", "decoder_stack": "decoder.decoder_transformer.",
    "downsample": "encoder.downsample.conv.weight", "upsample": "decoder.upsample.conv.weight"}
KYUTAI_NAMES = {
    "encoder": "encoder.model.", "decoder": "decoder.model.", "conv": "conv.conv", "transposed": "convtr.convtr",
    "encoder_stack": "encoder_transformer.transformer.", "decoder_stack": "decoder_transformer.transformer.",
    "downsample": "downsample.conv.conv.conv.weight", "upsample": "upsample.convtr.convtr.convtr.weight",
    "semantic": "quantizer.rvq_first.", "acoustic": "quantizer.rvq_rest.", "codebook": "vq.layers.{n}._codebook",
    "initialized": "_initialized", "usage": "cluster_usage", "sum": "embedding_sum",
    "qkv": ("self_attn.in_proj_weight",), "qkv_transform": together, "out": "self_attn.out_proj.weight",
    "mixer_norm": "norm1.{x}", "mlp_norm": "norm2.{x}", "mlp_up": "linear1.weight", "mlp_down": "linear2.weight",
    "mixer_scale": "layer_scale_1.scale", "mlp_scale": "layer_scale_2.scale"}
IN_MEMORY = {"qkv": ("self_attn.in_projs.0.weight",), "out": "self_attn.out_projs.0.weight"}
OLDER = {"initialized": ("inited",), "usage": ("cluster_size",), "sum": ("embed_avg", "embed_sum")}


def hf_table(spec: MimiSpec, names: Iterable[str]) -> Table:
    halves = any(name.startswith("encoder.encoder_seanet.") for name in names)
    return table_of(spec, HF_NAMES | (IN_HALVES if halves else {}))


def table(spec: MimiSpec, names: Iterable[str]) -> Table:
    """The names that the file uses: as in files, as in the package's memory, or those of older versions."""
    names = list(names)
    layout = KYUTAI_NAMES | (IN_MEMORY if any(".in_projs." in name for name in names) else {})
    found = {name.rpartition(".")[2] for name in names if "._codebook." in name}
    older = {ours: theirs for ours, several in OLDER.items() for theirs in several if theirs in found}
    return table_of(spec, layout | older)


def read_file(path: Path) -> Opened:
    """A file on its own, which has Kyutai's keys: with the settings beside it, or the official ones and as many
    codebooks as it holds. Raises InputError for another file."""
    weights = checkpoint.open_files([path], False)
    if KYUTAI_NAMES["downsample"] not in weights.shapes:
        raise InputError(f"{path} does not hold a Mimi under Kyutai's names; name the directory of another layout")
    beside, spec = path.with_name(SETTINGS), OFFICIAL
    if beside.is_file():
        spec = from_settings(checkpoint.read_json(beside), str(beside))
    else:
        held = {found[0] for name in weights.shapes if (found := re.match(r"quantizer\.\w+\.vq\.layers\.\d+", name))}
        spec = MimiSpec(encoder=spec.encoder, decoder=spec.decoder, quantizer=Quantizer(codebooks=max(len(held), 2)))
    return Opened(spec, weights, table(spec, weights.shapes), Extras())


# ------------------------------------------------------------------------------------- families
def kyutai_files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    return {SETTINGS: config, CONFIG: {"mimi_name": KYUTAI_FILES[0], "mimi_config_name": SETTINGS}}


def in_memory(known: Family, layout: str, names: Mapping[str, Any]) -> Family:
    """The same layout by the names of its package's memory, which is written and not read."""
    return replace(known, layout=layout, model_types=(), accepts=lambda config: False,
                   table=lambda spec, _: table_of(spec, names))


HF = Family(layout="hf", weights=FILES, model_types=("mimi",), to_spec=from_hf, from_spec=to_hf, table=hf_table)
KYUTAI = Family(layout="kyutai", weights=KYUTAI_FILES, accepts=lambda config: "mimi_name" in config,
                to_spec=from_kyutai, from_spec=to_kyutai, table=table, files=kyutai_files)
LAYOUTS = (HF, in_memory(HF, "hf_halves", HF_NAMES | IN_HALVES), KYUTAI,
           in_memory(KYUTAI, "kyutai_memory", KYUTAI_NAMES | IN_MEMORY))
