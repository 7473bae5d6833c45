"""transformers' GPT-2: learned positions, projections stored as (inputs, outputs)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mm.checkpoint.family import Family, Keys, ensure_kept
from mm.checkpoint.tables import TRANSPOSED, Rule, Table, rule
from mm.errors import InputError
from mm.spec import CAUSAL, Attention, DecoderSpec, Embed, Layer, LayerNorm, LearnedTable, LMHead, Mlp, Stack
from mm.text.families import generation
from mm.text.families.hf import CONFIG, FILES, HARMLESS, TIED, TO_HF, act_of

MORE_HARMLESS = HARMLESS | frozenset("""
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    reorder_and_upcast_attn n_ctx
""".split())  # noqa: SIM905
MASK = "a buffer that old files carry; what is seen follows from positions"
DENSE = {"attn.c_attn": "mixer.qkv", "attn.c_proj": "mixer.out", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}
NORMS = {"ln_1": "mixer_norm", "ln_2": "mlp_norm"}


def to_spec(config: Mapping[str, Any], where: str) -> DecoderSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    keys = Keys(config, where)
    dim, depth, context = (keys.positive(name) for name in ("n_embd", "n_layer", "n_positions"))
    rates = [float(keys.take(f"{name}_pdrop", (int, float), 0.1)) for name in ("embd", "resid", "attn")]
    norm = LayerNorm(eps=float(keys.take("layer_norm_epsilon", (int, float), 1e-5)))
    mlp = Mlp(hidden=keys.positive("n_inner", 4 * dim), act=act_of(keys, "activation_function", "gelu_new"))
    layers = tuple(Layer(mixer=replace(mixer, dropout=rates[2]), mlp=mlp, norm=norm, dropout=rates[1])
                   for mixer in mixers_of(keys, dim, depth))
    embed = Embed(vocab=keys.positive("vocab_size"), positions=LearnedTable(rows=context), dropout=rates[0])
    spec = DecoderSpec(embed=embed, stack=Stack(dim=dim, layers=layers, final_norm=norm), context=context,
                       head=LMHead(tied=keys.take("tie_word_embeddings", bool, True)))
    if keys.take("add_cross_attention", bool, False):
        raise InputError(f"{where}: a GPT-2 with cross-attention is not supported")
    keys.done(MORE_HARMLESS)
    return spec


def mixers_of(keys: Keys, dim: int, depth: int) -> list[Attention]:
    """Scores are divided by the root of a head's width, and in some models by the number of the layer too."""
    heads = keys.positive("n_head")
    if dim % heads:
        raise InputError(f"{keys.where}: n_embd {dim} cannot be shared by {heads} heads")
    by_layer = keys.take("scale_attn_by_inverse_layer_idx", bool, False)
    scale = (dim // heads) ** -0.5 if keys.take("scale_attn_weights", bool, True) else 1.0
    plain = Attention(heads=heads, kv_heads=heads, head_dim=dim // heads, window=CAUSAL)
    if by_layer:
        return [replace(plain, scale=scale / (i + 1)) for i in range(depth)]
    return [plain if scale != 1.0 else replace(plain, scale=1.0)] * depth


def from_spec(spec: DecoderSpec) -> dict[str, Any]:
    """Raises InputError for a model that transformers' class cannot hold."""
    layer, stack = spec.stack.layers[0], spec.stack
    mixer, mlp = layer.mixer, layer.mlp
    if not isinstance(mixer, Attention) or not isinstance(mlp, Mlp) or mlp.act not in TO_HF:
        raise InputError("the hf layout of gpt2 has layers of attention with one MLP")
    scales = [one.mixer.scale for one in stack.layers if isinstance(one.mixer, Attention)]
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": spec.embed.vocab, "n_embd": stack.dim,
        "n_layer": len(stack.layers), "n_head": mixer.heads, "n_inner": mlp.hidden, "n_positions": spec.context,
        "activation_function": TO_HF[mlp.act], "layer_norm_epsilon": layer.norm.eps, "embd_pdrop": spec.embed.dropout,
        "resid_pdrop": layer.dropout, "attn_pdrop": mixer.dropout, "scale_attn_weights": scales[0] != 1.0,
        "scale_attn_by_inverse_layer_idx": len(set(scales)) > 1, "tie_word_embeddings": spec.head.tied}
    ensure_kept(spec, to_spec(config, "config"), "hf (gpt2)")
    return config


def table(spec: DecoderSpec, names: Iterable[str]) -> Table:
    """The first files have no `transformer.` before their names."""
    bare = any(name.startswith("wte.") for name in names)
    top = "" if bare else "transformer."
    rules: list[Rule] = [
        rule(top + "wte.weight", "embed.tokens.weight"), rule(top + "wpe.weight", "embed.positions.weight"),
        rule(top + "ln_f.{x}", "stack.final_norm.{x}"), rule("lm_head.weight", "head.weight")]
    theirs, ours = top + "h.{n}.", "stack.blocks.{n}."
    rules += [rule(f"{theirs}{name}.{{x}}", f"{ours}{mine}.{{x}}") for name, mine in NORMS.items()]
    for name, mine in DENSE.items():
        rules += [rule(f"{theirs}{name}.weight", f"{ours}{mine}.weight", TRANSPOSED),
                  rule(f"{theirs}{name}.bias", f"{ours}{mine}.bias")]
    ignored = {theirs + "attn.bias": MASK, theirs + "attn.masked_bias": MASK}
    return Table(tuple(rules), ignored | ({"lm_head.weight": TIED} if spec.head.tied else {}))


GPT2 = Family(
    layout="hf", config=CONFIG, weights=FILES, has_text=True, to_spec=to_spec, table=table, from_spec=from_spec,
    model_types=("gpt2",),
    files=generation.files, complete=generation.complete)
