"""Mimi as Kyutai keeps it: a safetensors file beside the language models, and the settings of its package's loaders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mm.checkpoint import files as checkpoint
from mm.checkpoint.family import Extras, Family, Keys, Opened, ensure_kept
from mm.checkpoint.tables import Table
from mm.errors import InputError

from ..spec import MimiSpec, Quantizer, Seanet, mimi_stack
from .common import fixed, steps_per_frame, table_of, together

CONFIG, SETTINGS = "config.json", "mimi_config.json"
FILES = ("mimi.safetensors", "tokenizer-e351c8d8-checkpoint125.safetensors", "mimi-pytorch-e351c8d8@125.safetensors")
OFFICIAL = MimiSpec(encoder=mimi_stack(), decoder=mimi_stack())
NAMES = {
    "encoder": "encoder.model.", "decoder": "decoder.model.", "conv": "conv.conv", "transposed": "convtr.convtr",
    "encoder_stack": "encoder_transformer.transformer.", "decoder_stack": "decoder_transformer.transformer.",
    "downsample": "downsample.conv.conv.conv.weight", "upsample": "upsample.convtr.convtr.convtr.weight",
    "semantic": "quantizer.rvq_first.", "acoustic": "quantizer.rvq_rest.", "codebook": "vq.layers.{n}._codebook",
    "initialized": "_initialized", "usage": "cluster_usage", "sum": "embedding_sum",
    "qkv": ("self_attn.in_proj_weight",), "qkv_way": together, "out": "self_attn.out_proj.weight",
    "mixer_norm": "norm1.{x}", "mlp_norm": "norm2.{x}", "mlp_up": "linear1.weight", "mlp_down": "linear2.weight",
    "mixer_scale": "layer_scale_1.scale", "mlp_scale": "layer_scale_2.scale"}
IN_MEMORY = {"qkv": ("self_attn.in_projs.0.weight",), "out": "self_attn.out_projs.0.weight"}
OLDER = {"initialized": ("inited",), "usage": ("cluster_size",), "sum": ("embed_avg", "embed_sum")}


def to_spec(config: Mapping[str, Any], where: str) -> MimiSpec:
    """The settings beside a language model's config, or the official ones where it names none."""
    name = config.get("mimi_config_name")
    if name is None:
        return OFFICIAL
    path = Path(where).parent / str(name)
    return to_settings(checkpoint.read_json(path), str(path))


def to_settings(config: Mapping[str, Any], where: str) -> MimiSpec:
    """Raises InputError that names settings which are absent, wrong, or not understood."""
    keys = Keys(config, where)
    rate, frame_rate = keys.positive("sample_rate"), keys.take("frame_rate", (int, float))
    parts = {name: Keys(keys.take(name, dict), f"{where}: {name}") for name in ("seanet", "quantizer", "transformer")}
    keys.left.pop("channels", None)  # seanet's
    seanet, dim = to_seanet(parts["seanet"])
    quantizer, stack = to_quantizer(parts["quantizer"], dim), to_stack(parts["transformer"], dim)
    for one in (keys, *parts.values()):
        one.done()
    return MimiSpec(rate=rate, seanet=seanet, encoder=stack, decoder=stack, quantizer=quantizer,
                    stride=steps_per_frame(rate, seanet.hop, frame_rate, where))


def to_seanet(keys: Keys) -> tuple[Seanet, int]:
    """(convolutions, width of the vectors)"""
    fixed(keys, causal=True, activation="ELU", norm="none", pad_mode="constant", true_skip=True,
          disable_norm_outer_blocks=0)
    return Seanet(channels=keys.positive("channels", 1), filters=keys.positive("n_filters"),
                  ratios=tuple(keys.take("ratios", (list, tuple))), residuals=keys.positive("n_residual_layers"),
                  dilation_base=keys.positive("dilation_base"), compress=keys.positive("compress"),
                  kernel=keys.positive("kernel_size"), residual_kernel=keys.positive("residual_kernel_size"),
                  last_kernel=keys.positive("last_kernel_size")), keys.positive("dimension")


def to_quantizer(keys: Keys, dim: int) -> Quantizer:
    fixed(keys, input_dimension=dim, output_dimension=dim)
    return Quantizer(codebooks=keys.positive("n_q"), semantic=keys.positive("n_q_semantic", 1),
                     size=keys.positive("bins"), dim=keys.positive("dimension"))


def to_stack(keys: Keys, dim: int):
    fixed(keys, d_model=dim, input_dimension=dim, output_dimensions=[dim], causal=True, conv_layout=True, gating="none",
          norm="layer_norm", positional_embedding="rope")
    return mimi_stack(dim=dim, depth=keys.positive("num_layers"), heads=keys.positive("num_heads"),
                      hidden=keys.positive("dim_feedforward"), window=keys.positive("context"),
                      theta=float(keys.take("max_period", (int, float))),
                      layer_scale=float(keys.take("layer_scale", (int, float))))


def from_spec(spec: MimiSpec) -> dict[str, Any]:
    """Raises InputError for a codec that the official package cannot hold."""
    s, q, dim, layer = spec.seanet, spec.quantizer, spec.encoder.dim, spec.encoder.layers[0]
    seanet = {"channels": s.channels, "dimension": dim, "causal": True, "n_filters": s.filters,
              "n_residual_layers": s.residuals, "activation": "ELU", "compress": s.compress,
              "dilation_base": s.dilation_base, "disable_norm_outer_blocks": 0, "kernel_size": s.kernel,
              "residual_kernel_size": s.residual_kernel, "last_kernel_size": s.last_kernel, "norm": "none",
              "pad_mode": "constant", "ratios": list(s.ratios), "true_skip": True}
    quantizer = {"dimension": q.dim, "n_q": q.codebooks, "bins": q.size, "input_dimension": dim,
                 "output_dimension": dim}
    if q.semantic != 1:
        quantizer["n_q_semantic"] = q.semantic
    stack = {"d_model": dim, "num_heads": layer.mixer.heads, "num_layers": len(spec.encoder.layers), "causal": True,
             "layer_scale": layer.layer_scale, "context": layer.mixer.window.left + 1, "conv_layout": True,
             "max_period": layer.mixer.rope.theta, "gating": "none", "norm": "layer_norm",
             "positional_embedding": "rope", "dim_feedforward": layer.mlp.hidden, "input_dimension": dim,
             "output_dimensions": [dim]}
    config = {"sample_rate": spec.rate, "channels": s.channels, "frame_rate": spec.frame_rate, "seanet": seanet,
              "quantizer": quantizer, "transformer": stack}
    ensure_kept(spec, to_settings(config, "config"), "kyutai")
    return config


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    return {SETTINGS: config, CONFIG: {"mimi_name": FILES[0], "mimi_config_name": SETTINGS}}


def table(spec: MimiSpec, names: Iterable[str]) -> Table:
    """The names that the file uses: as in files, as in the package's memory, or those of older versions."""
    names = list(names)
    layout = NAMES | (IN_MEMORY if any(".in_projs." in name for name in names) else {})
    found = {name.rpartition(".")[2] for name in names if "._codebook." in name}
    older = {ours: theirs for ours, several in OLDER.items() for theirs in several if theirs in found}
    return table_of(spec, layout | older)


def read_file(path: Path) -> Opened:
    """A file on its own, which has Kyutai's keys: with the settings beside it, or the official ones and as many
    codebooks as it holds. Raises InputError for another file."""
    weights = checkpoint.open_files([path], False)
    if NAMES["downsample"] not in weights.shapes:
        raise InputError(f"{path} does not hold a Mimi under Kyutai's names; name the directory of another layout")
    beside, spec = path.with_name(SETTINGS), OFFICIAL
    if beside.is_file():
        spec = to_settings(checkpoint.read_json(beside), str(beside))
    else:
        held = {found[0] for name in weights.shapes if (found := re.match(r"quantizer\.\w+\.vq\.layers\.\d+", name))}
        spec = MimiSpec(encoder=spec.encoder, decoder=spec.decoder, quantizer=Quantizer(codebooks=max(len(held), 2)))
    return Opened(spec, weights, table(spec, weights.shapes), Extras())


KYUTAI = Family(layout="kyutai", config=CONFIG, weights=FILES, accepts=lambda config: "mimi_name" in config,
                to_spec=to_spec, from_spec=from_spec, table=table, files=files)
KYUTAI_MEMORY = Family(layout="kyutai_memory", config=CONFIG, weights=FILES, accepts=lambda config: False,
                       to_spec=to_spec, from_spec=from_spec, files=files,
                       table=lambda spec, names: table_of(spec, NAMES | IN_MEMORY))
