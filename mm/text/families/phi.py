"""transformers' Phi-3, of which Phi-3.5, Phi-4 and Phi-4-mini are: fused projections, partial rotation, LongRoPE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mm.checkpoint.family import Keys
from mm.checkpoint.tables import Rule, rule
from mm.errors import InputError
from mm.spec import DecoderSpec, Layer, LongRope
from mm.text.families.decoder import (
    PRE_NORMS,
    SLIDING,
    Kind,
    Size,
    attention_config,
    attention_of,
    family,
    mlp_config,
    norm_rules,
    window_of,
    windows,
)
from mm.text.families.hf import GATE_UP, rope_of
from mm.text.families.llama import plain


def layers(keys: Keys, size: Size) -> list[Layer]:
    """The original context stands outside the rotary settings."""
    for name in ("resid_pdrop", "embd_pdrop"):
        keys.take(name, (int, float), 0.0)  # how it was trained
    mixer = attention_of(keys, size, rope=None)
    rope = rope_of(keys, size.context, head_dim=mixer.head_dim,
                   original=keys.take("original_max_position_embeddings", int, None))
    window = keys.take("sliding_window", int, None)
    return plain(keys, replace(mixer, rope=rope), [window_of(SLIDING, window)] * size.depth)


def config(spec: DecoderSpec) -> dict[str, Any]:
    told = attention_config(spec) | mlp_config(spec) | {"sliding_window": windows(spec)[0]}
    if told["head_dim"] * told["num_attention_heads"] != spec.stack.dim:
        raise InputError("the hf layout of phi3 has heads that share its width")
    scaling = spec.stack.layers[0].mixer.rope.scaling
    original = scaling.original if isinstance(scaling, LongRope) else spec.context
    return told | {"original_max_position_embeddings": original}


def rules(theirs: str, ours: str, spec: DecoderSpec) -> list[Rule]:
    return [
        rule(theirs + "self_attn.qkv_proj.weight", ours + "mixer.qkv.weight"),
        rule(theirs + "self_attn.o_proj.weight", ours + "mixer.out.weight"),
        rule(theirs + "mlp.gate_up_proj.weight", (ours + "mlp.gate.weight", ours + "mlp.up.weight"), GATE_UP),
        rule(theirs + "mlp.down_proj.weight", ours + "mlp.down.weight"), *norm_rules(theirs, ours, PRE_NORMS)]


PHI_KINDS = (family(Kind(
    model_type="phi3", name="Phi3ForCausalLM", layers=layers, config=config, rules=rules,
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096})),)
