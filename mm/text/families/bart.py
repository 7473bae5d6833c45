"""transformers' BART (Lewis et al., 2019), and the rules of layers that Whisper shares with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mm.checkpoint.family import Family, Keys, ensure_kept
from mm.checkpoint.tables import Rule, Table, fused, reshaped, rule
from mm.errors import InputError
from mm.spec import (
    CAUSAL,
    EVERYWHERE,
    Attention,
    DecoderSpec,
    Embed,
    EncoderSpec,
    Layer,
    LayerNorm,
    LearnedTable,
    LMHead,
    Mlp,
    Seq2SeqSpec,
    Stack,
)
from mm.text.families.hf import CONFIG, FILES, HARMLESS, TIED, TO_HF, act_of, answer_ids, padding_id

START = 2  # rows of the table of positions before position 0
UNREAD = HARMLESS | set("""
    init_std classifier_dropout classif_dropout encoder_layerdrop decoder_layerdrop num_hidden_layers
    forced_eos_token_id no_repeat_ngram_size
""".split())  # noqa: SIM905
SILENT = {"normalize_before": False, "add_final_layer_norm": False, "add_bias_logits": False,
          "normalize_embedding": True, "static_position_embeddings": False, "extra_pos_embeddings": START}


# ------------------------------------------------------------------------------------- config to spec
def to_spec(config: Mapping[str, Any], where: str) -> Seq2SeqSpec:
    """Raises InputError that names keys which are absent, wrong, or not understood."""
    keys = Keys(config, where)
    refuse(keys)
    dim, rows = keys.positive("d_model"), keys.positive("max_position_embeddings", 1024)
    dropout = float(keys.take("dropout", (int, float), 0.1))
    act = act_of(keys, "activation_function", "gelu")
    rates = {"attention": float(keys.take("attention_dropout", (int, float), 0.0)),
             "mlp": float(keys.take("activation_dropout", (int, float), 0.0))}
    embed = Embed(vocab=keys.positive("vocab_size"), norm=LayerNorm(), dropout=dropout,
                  positions=LearnedTable(rows=rows, start=START),
                  scale=dim**0.5 if keys.take("scale_embedding", bool, False) else 1.0)
    stacks = {}
    for side in ("encoder", "decoder"):
        mixer = attention_of(keys, side, dim, rates["attention"])
        layer = Layer(mixer=mixer, placement="residual_post", dropout=dropout, mlp=Mlp(
            hidden=keys.positive(f"{side}_ffn_dim"), act=act, dropout=rates["mlp"]))
        if side == "decoder":
            layer = replace(layer, mixer=replace(mixer, window=CAUSAL), cross=mixer)
        stacks[side] = Stack(dim=dim, layers=(layer,) * keys.positive(f"{side}_layers"))
    head = LMHead(tied=keys.take("tie_word_embeddings", bool, True), bias=True)
    spec = Seq2SeqSpec(encoder=EncoderSpec(embed=embed, stack=stacks["encoder"], context=rows),
                       decoder=DecoderSpec(embed=embed, stack=stacks["decoder"], context=rows, head=head),
                       **answer_ids(keys, start=2, end=2))
    keys.done(UNREAD)
    return spec


def refuse(keys: Keys) -> None:
    """Old files spell out what every BART is, or what makes one something else."""
    for name, value in SILENT.items():
        if (given := keys.take(name, (bool, int), value)) != value:
            raise InputError(f"{keys.where}: {name} should be {value}, not {given}")


def attention_of(keys: Keys, side: str, dim: int, dropout: float) -> Attention:
    heads = keys.positive(f"{side}_attention_heads")
    if dim % heads:
        raise InputError(f"{keys.where}: d_model {dim} cannot be shared by {heads} heads")
    return Attention(heads=heads, kv_heads=heads, head_dim=dim // heads, window=EVERYWHERE, dropout=dropout)


# ------------------------------------------------------------------------------------- spec to config
def from_spec(spec: Seq2SeqSpec) -> dict[str, Any]:
    """Raises InputError for a model that transformers' class cannot hold."""
    sides, embed = {"encoder": spec.encoder.stack, "decoder": spec.decoder.stack}, spec.decoder.embed
    layer = spec.encoder.stack.layers[0]
    plain = all(isinstance(stack.layers[0].mlp, Mlp) and isinstance(stack.layers[0].mixer, Attention)
                for stack in sides.values())
    if not plain or embed.positions is None or layer.mlp.act not in TO_HF:
        raise InputError("the hf layout of BART has layers of attention with one MLP and learned positions")
    config = {
        "architectures": ["BartForConditionalGeneration"], "model_type": "bart", "is_encoder_decoder": True,
        "vocab_size": embed.vocab, "d_model": spec.encoder.stack.dim, "max_position_embeddings": embed.positions.rows,
        "activation_function": TO_HF[layer.mlp.act], "dropout": layer.dropout,
        "attention_dropout": layer.mixer.dropout, "activation_dropout": layer.mlp.dropout,
        "scale_embedding": embed.scale != 1.0, "tie_word_embeddings": spec.decoder.head.tied,
        "decoder_start_token_id": spec.start[0], "eos_token_id": spec.end, "pad_token_id": 1, "bos_token_id": 0}
    config |= {"forced_bos_token_id": spec.start[1]} if len(spec.start) > 1 else {}
    for side, stack in sides.items():
        config |= {f"{side}_layers": len(stack.layers), f"{side}_attention_heads": stack.layers[0].mixer.heads,
                   f"{side}_ffn_dim": stack.layers[0].mlp.hidden}
    ensure_kept(spec, to_spec(config, "config"), "hf (bart)")
    return config


# ------------------------------------------------------------------------------------- weights
NAMES = {"blocks": "layers", "self": "self_attn", "cross": "encoder_attn", "q": "q_proj", "k": "k_proj", "v": "v_proj",
         "out": "out_proj", "mixer_norm": "self_attn_layer_norm", "cross_norm": "encoder_attn_layer_norm",
         "mlp_norm": "final_layer_norm", "mlp.up": "fc1", "mlp.down": "fc2"}


def table(spec: Seq2SeqSpec, names: Iterable[str]) -> Table:
    rules = [rule("model.shared.weight", "decoder.embed.tokens.weight"), rule("lm_head.weight", "decoder.head.weight"),
             rule("final_logits_bias", "decoder.head.bias",
                  reshaped((spec.decoder.embed.vocab,), (1, spec.decoder.embed.vocab)))]
    for side, stack in (("encoder", spec.encoder.stack), ("decoder", spec.decoder.stack)):
        theirs = f"model.{side}."
        rules += [rule(theirs + "embed_positions.weight", side + ".embed.positions.weight"),
                  rule(theirs + "layernorm_embedding.{x}", side + ".embed.norm.{x}"),
                  *layer_rules(theirs + "layers.{n}.", side + ".stack.blocks.{n}.", NAMES, stack.layers[0])]
    ignored = {f"model.{side}.embed_tokens.weight": "a copy of the shared table" for side in ("encoder", "decoder")}
    return Table(tuple(rules), ignored | ({"lm_head.weight": TIED} if spec.decoder.head.tied else {}))


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


BART = Family(layout="hf", config=CONFIG, weights=FILES, has_text=True, to_spec=to_spec, from_spec=from_spec,
              table=table, model_types=("bart",),
              files=lambda config, extras: {CONFIG: config | padding_id(extras)})
