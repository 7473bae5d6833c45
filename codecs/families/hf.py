"""Mimi as transformers' MimiModel keeps it: flat names on disk, and those of version 5's memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mm.checkpoint.family import Extras, Family, Keys, ensure_kept
from mm.checkpoint.hf import CONFIG, FILES, HARMLESS, rope_of
from mm.checkpoint.tables import Table
from mm.errors import InputError

from ..spec import MimiSpec, Quantizer, Seanet, mimi_stack
from .common import fixed, halved, steps_per_frame, table_of

UNREAD = HARMLESS | {"max_position_embeddings", "attention_dropout", "tie_word_embeddings", "use_streaming"}
NAMES = {
    "encoder": "encoder.layers.", "decoder": "decoder.layers.", "conv": "conv", "transposed": "conv",
    "encoder_stack": "encoder_transformer.", "decoder_stack": "decoder_transformer.",
    "downsample": "downsample.conv.weight", "upsample": "upsample.conv.weight",
    "semantic": "quantizer.semantic_residual_vector_quantizer.",
    "acoustic": "quantizer.acoustic_residual_vector_quantizer.", "codebook": "layers.{n}.codebook",
    "initialized": "initialized", "usage": "cluster_usage", "sum": "embed_sum",
    "qkv": tuple(f"self_attn.{name}_proj.weight" for name in "qkv"), "qkv_way": halved,
    "out": "self_attn.o_proj.weight", "mixer_norm": "input_layernorm.{x}", "mlp_norm": "post_attention_layernorm.{x}",
    "mlp_up": "mlp.fc1.weight", "mlp_down": "mlp.fc2.weight", "mixer_scale": "self_attn_layer_scale.scale",
    "mlp_scale": "mlp_layer_scale.scale"}
IN_HALVES = {
    "encoder": "encoder.encoder_seanet.layers.", "decoder": "decoder.decoder_seanet.layers.",
    "encoder_stack": "encoder.encoder_transformer.", "decoder_stack": "decoder.decoder_transformer.",
    "downsample": "encoder.downsample.conv.weight", "upsample": "decoder.upsample.conv.weight"}


def to_spec(config: Mapping[str, Any], where: str) -> MimiSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    keys = Keys(config, where)
    dim, heads = keys.positive("hidden_size", 512), keys.positive("num_attention_heads", 8)
    width = keys.positive("vector_quantization_hidden_dimension", 256)
    fixed(keys, use_causal_conv=True, pad_mode="constant", trim_right_ratio=1.0, use_conv_shortcut=False,
          hidden_act="gelu", attention_bias=False, num_key_value_heads=heads, head_dim=dim // heads, codebook_dim=width,
          upsample_groups=dim)
    if width == dim:
        raise InputError(f"{where}: codebooks as wide as the model ({dim}) have no projections, which is not supported")
    rate, seanet = keys.positive("sampling_rate", 24000), to_seanet(keys)
    frame_rate = [keys.take(name, (int, float), None) for name in ("frame_rate", "_frame_rate")]
    quantizer = Quantizer(codebooks=keys.positive("num_quantizers", 32), size=keys.positive("codebook_size", 2048),
                          semantic=keys.positive("num_semantic_quantizers", 1), dim=width)
    rope = rope_of(keys, keys.positive("max_position_embeddings", 8000))
    if rope.scaling is not None:
        raise InputError(f"{where}: rope_parameters should not scale positions in Mimi")
    stack = mimi_stack(dim=dim, depth=keys.positive("num_hidden_layers", 8), heads=heads, theta=rope.theta,
                       hidden=keys.positive("intermediate_size", 2048), window=keys.positive("sliding_window", 250),
                       eps=float(keys.take("norm_eps", (int, float), 1e-5)),
                       layer_scale=float(keys.take("layer_scale_initial_scale", (int, float), 0.01)))
    keys.done(UNREAD)
    frames = frame_rate[0] or frame_rate[1] or rate / seanet.hop / 2
    return MimiSpec(rate=rate, seanet=seanet, encoder=stack, decoder=stack, quantizer=quantizer,
                    stride=steps_per_frame(rate, seanet.hop, frames, where))


def to_seanet(keys: Keys) -> Seanet:
    return Seanet(channels=keys.positive("audio_channels", 1), filters=keys.positive("num_filters", 64),
                  ratios=tuple(keys.take("upsampling_ratios", (list, tuple), (8, 6, 5, 4))),
                  residuals=keys.positive("num_residual_layers", 1), compress=keys.positive("compress", 2),
                  dilation_base=keys.positive("dilation_growth_rate", 2), kernel=keys.positive("kernel_size", 7),
                  residual_kernel=keys.positive("residual_kernel_size", 3),
                  last_kernel=keys.positive("last_kernel_size", 3))


def from_spec(spec: MimiSpec) -> dict[str, Any]:
    """Raises InputError for a codec that transformers' class cannot hold."""
    s, q, dim, layer = spec.seanet, spec.quantizer, spec.encoder.dim, spec.encoder.layers[0]
    heads = layer.mixer.heads
    config = {
        "architectures": ["MimiModel"], "model_type": "mimi", "sampling_rate": spec.rate,
        "frame_rate": spec.frame_rate, "audio_channels": s.channels, "hidden_size": dim, "num_filters": s.filters,
        "num_residual_layers": s.residuals, "upsampling_ratios": list(s.ratios), "kernel_size": s.kernel,
        "last_kernel_size": s.last_kernel, "residual_kernel_size": s.residual_kernel,
        "dilation_growth_rate": s.dilation_base, "use_causal_conv": True, "pad_mode": "constant",
        "compress": s.compress, "trim_right_ratio": 1.0, "codebook_size": q.size, "codebook_dim": q.dim,
        "num_quantizers": q.codebooks, "use_conv_shortcut": False, "vector_quantization_hidden_dimension": q.dim,
        "num_semantic_quantizers": q.semantic, "upsample_groups": dim, "num_hidden_layers": len(spec.encoder.layers),
        "intermediate_size": layer.mlp.hidden, "num_attention_heads": heads, "num_key_value_heads": heads,
        "head_dim": dim // heads, "hidden_act": "gelu", "norm_eps": layer.norm.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": layer.mixer.rope.theta},
        "sliding_window": layer.mixer.window.left + 1, "layer_scale_initial_scale": layer.layer_scale,
        "attention_bias": False}
    ensure_kept(spec, to_spec(config, "config"), "hf")
    return config


def table(spec: MimiSpec, names: Iterable[str]) -> Table:
    halves = any(name.startswith("encoder.encoder_seanet.") for name in names)
    return table_of(spec, NAMES | (IN_HALVES if halves else {}))


def files(config: dict[str, Any], extras: Extras) -> dict[str, dict[str, Any]]:
    return {CONFIG: config}


HF = Family(layout="hf", config=CONFIG, weights=FILES, model_types=("mimi",),
            to_spec=to_spec, from_spec=from_spec, table=table, files=files)
HF_HALVES = Family(layout="hf_halves", config=CONFIG, weights=FILES, accepts=lambda config: False, to_spec=to_spec,
                   from_spec=from_spec, files=files, table=lambda spec, names: table_of(spec, NAMES | IN_HALVES))
