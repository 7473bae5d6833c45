"""transformers' GPT-2: learned positions, projections stored as (inputs, outputs)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mm.checkpoint.family import Keys
from mm.checkpoint.fields import Pieces, Values, always, expected, field, pair, unread
from mm.checkpoint.hf import act, below, equal_heads
from mm.checkpoint.tables import TRANSPOSED, Table
from mm.spec import CAUSAL, DecoderSpec, LayerNorm, LearnedTable
from mm.text.families.decoder import Decoder

MASK = "a buffer that old files carry; what is seen follows from positions"


def scales(keys: Keys, v: Values) -> dict[str, Any]:
    """Scores are divided by the root of a head's width, and in some models by the number of the layer too."""
    by_layer = keys.take("scale_attn_by_inverse_layer_idx", bool, False)
    scale = v["mixer.head_dim"] ** -0.5 if keys.take("scale_attn_weights", bool, True) else 1.0
    if by_layer:
        return {"each.scale": [scale / (i + 1) for i in range(v["stack.depth"])]}
    return {"mixer.scale": 1.0 if scale == 1.0 else None}


def scale_keys(pieces: Pieces) -> dict[str, Any]:
    found = [layer.mixer.scale for layer in pieces.layers]
    return {"scale_attn_weights": found[0] != 1.0, "scale_attn_by_inverse_layer_idx": len(set(found)) > 1}


FIELDS = (
    field("n_embd", "stack.dim"), field("n_layer", "stack.depth"), field("n_positions", "spec.context"),
    equal_heads("n_head", "n_embd"), pair("scale_attn_weights", scales, scale_keys),
    field("n_inner", "mlp.hidden", default=lambda v: 4 * v["stack.dim"]),
    act("activation_function", default="gelu_new"), field("vocab_size", "embed.vocab"),
    field("embd_pdrop", "embed.dropout", kind=float, default=0.1),
    field("resid_pdrop", "layer.dropout", kind=float, default=0.1),
    field("attn_pdrop", "mixer.dropout", kind=float, default=0.1),
    field("layer_norm_epsilon", "norm.eps", kind=float, default=1e-5),
    field("tie_word_embeddings", "head.tied", kind=bool, default=True), expected(add_cross_attention=False),
    always(norm__is=LayerNorm, mixer__window=CAUSAL,
           embed__positions=lambda v: LearnedTable(rows=v["spec.context"])),
    unread("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
           "reorder_and_upcast_attn", "n_ctx"))
WEIGHTS = {
    "transformer.wte.weight": "embed.tokens.weight",
    "transformer.wpe.weight": "embed.positions.weight",
    "transformer.h.{n}.ln_1.{x}": "stack.blocks.{n}.mixer_norm.{x}",
    "transformer.h.{n}.attn.c_attn.weight": "stack.blocks.{n}.mixer.qkv.weight | transposed",
    "transformer.h.{n}.attn.c_attn.bias": "stack.blocks.{n}.mixer.qkv.bias",
    "transformer.h.{n}.attn.c_proj.weight": "stack.blocks.{n}.mixer.out.weight | transposed",
    "transformer.h.{n}.attn.c_proj.bias": "stack.blocks.{n}.mixer.out.bias",
    "transformer.h.{n}.ln_2.{x}": "stack.blocks.{n}.mlp_norm.{x}",
    "transformer.h.{n}.mlp.c_fc.weight": "stack.blocks.{n}.mlp.up.weight | transposed",
    "transformer.h.{n}.mlp.c_fc.bias": "stack.blocks.{n}.mlp.up.bias",
    "transformer.h.{n}.mlp.c_proj.weight": "stack.blocks.{n}.mlp.down.weight | transposed",
    "transformer.h.{n}.mlp.c_proj.bias": "stack.blocks.{n}.mlp.down.bias",
    "transformer.ln_f.{x}": "stack.final_norm.{x}",
    "lm_head.weight": "head.weight"}
KIND = Decoder(model_type="gpt2", name="GPT2LMHeadModel", fields=FIELDS, weights=WEIGHTS,
            transforms=lambda spec: {"transposed": TRANSPOSED},
            ignored={f"transformer.h.{{n}}.attn.{name}": MASK for name in ("bias", "masked_bias")})


def table(spec: DecoderSpec, names: Iterable[str]) -> Table:
    """The first files have no `transformer.` before their names."""
    return KIND.table(spec).renamed(below([name for name in names if name != "lm_head.weight"], "transformer."))


KINDS = (KIND.family(table=table),)
