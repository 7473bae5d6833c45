"""Names of the weights of a layer where each projection has its own, as in BART, Whisper and HuBERT."""

from __future__ import annotations

from collections.abc import Mapping

from mm.checkpoint.tables import Rule, fused, rule
from mm.spec import Attention, Layer

NAMES = {"blocks": "layers", "self": "self_attn", "cross": "encoder_attn", "q": "q_proj", "k": "k_proj", "v": "v_proj",
         "out": "out_proj", "mixer_norm": "self_attn_layer_norm", "cross_norm": "encoder_attn_layer_norm",
         "mlp_norm": "final_layer_norm", "mlp.up": "fc1", "mlp.down": "fc2"}


def layer_rules(theirs: str, ours: str, n: Mapping[str, str], layer: Layer) -> list[Rule]:
    """A block's weights where each projection has a name of its own, by the names `n`."""
    mixer, cross = theirs + n["self"] + ".", theirs + n["cross"] + "."
    rules = [*projections(mixer, ours + "mixer.qkv.", n, layer.mixer, "qkv"),
             rule(mixer + n["out"] + ".{x}", ours + "mixer.out.{x}"),
             *(rule(f"{theirs}{n[name]}.{{x}}", f"{ours}{name}.{{x}}")
               for name in ("mixer_norm", "mlp_norm", "mlp.up", "mlp.down"))]
    if layer.cross is not None:
        rules += [rule(cross + n["q"] + ".{x}", ours + "cross.q.{x}"),
                  *projections(cross, ours + "cross.kv.", n, layer.cross, "kv"),
                  rule(cross + n["out"] + ".{x}", ours + "cross.out.{x}"),
                  rule(f"{theirs}{n['cross_norm']}.{{x}}", ours + "cross_norm.{x}")]
    return rules


def projections(theirs: str, ours: str, n: Mapping[str, str], attention: Attention, parts: str) -> list[Rule]:
    """Several projections side by side, with the biases that there are."""
    width = attention.heads * attention.head_dim
    biased = [part for part in parts if getattr(attention, f"{part}_bias")]
    return [rule(tuple(f"{theirs}{n[part]}.{kind}" for part in chosen), ours + kind, fused(*[width] * len(chosen)))
            for kind, chosen in (("weight", list(parts)), ("bias", biased)) if chosen]
