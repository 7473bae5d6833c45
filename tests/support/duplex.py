"""Small duplex models of every published shape with re-drawn weights: the official package's, and ours from its
files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mm import DuplexLM, spec

BASE = {
    "dim": 64, "text_card": 48, "existing_text_padding_id": 3, "n_q": 16, "dep_q": 8, "card": 32, "num_heads": 4,
    "num_layers": 2, "hidden_scale": 4.125, "causal": True, "layer_scale": None, "context": 20, "max_period": 10000,
    "gating": "silu", "norm": "rms_norm_f32", "positional_embedding": "rope", "depformer_dim": 32,
    "depformer_dim_feedforward": 132, "depformer_num_heads": 4, "depformer_num_layers": 2,
    "depformer_layer_scale": None, "depformer_multi_linear": True, "depformer_context": 8,
    "depformer_max_period": 10000, "depformer_gating": "silu", "depformer_pos_emb": "none",
    "depformer_weights_per_step": True, "delays": [0, 0, *[1] * 7, 0, *[1] * 7]}
QUALITY = {"description": {"type": "lut", "lut": {"n_bins": 5, "dim": 6, "tokenizer": "noop",
                                                  "possible_values": ["bad", "good", "very_good"]}}}
SPEAKERS = {"speaker": {"type": "tensor", "tensor": {"dim": 10}}}
SHAPES: dict[str, dict[str, Any]] = {
    "moshi": {},
    "personaplex": {"dep_q": 16},
    "2b": {"n_q": 8, "dep_q": 4, "max_period": 100000, "delays": [0, 0, 2, 2, 2, 0, 2, 2, 2], "conditioners": QUALITY,
           "fuser": {"sum": ["description"]}, "num_heads": 2},
    "hibiki": {"model_type": "hibiki", "delays": [0, 0, *[2] * 7, 0, *[2] * 7], "depformer_dim_feedforward": None,
               "conditioners": QUALITY, "fuser": {"sum": ["description"], "cross": []}},
    "hibiki_zero": {
        "kv_repeat": 2, "depformer_kv_repeat": 1, "positional_embedding": "rope_concat", "depformer_norm": "layer_norm",
        "hidden_scale": 6.0, "max_period": 20000.0, "depformer_weights_per_step_schedule": [0, 1, 2, 3, 3, 3, 3, 3]},
    "stt": {"n_q": 8, "dep_q": 0, "delays": [0] * 9, "extra_heads_num_heads": 3, "text_card_out": 40},
    "tts": {"n_q": 8, "delays": [0, 2, *[4] * 7], "depformer_low_rank_embeddings": 8, "demux_second_stream": True,
            "depformer_weights_per_step_schedule": [0, 1, 2, 3, 4, 4, 4, 4], "cross_attention": True,
            "conditioners": QUALITY | SPEAKERS, "fuser": {"sum": ["description"], "cross": ["speaker"],
                                                          "cross_attention_pos_emb": True}},
    "odd": {"gating": "none", "depformer_gating": "gelu", "norm": "layer_norm", "layer_scale": 0.1, "bias_proj": True,
            "depformer_layer_scale": 0.2, "depformer_dim_feedforward": [96, 128, 64, 66, 68, 70, 72, 74],
            "depformer_norm": "layer_norm", "depformer_low_rank_embeddings": 8},
}


def settings(shape: str) -> dict[str, Any]:
    return copy.deepcopy(BASE | SHAPES[shape])


def official(config: dict[str, Any]) -> nn.Module:
    """Kyutai's model with every weight random."""
    from moshi.models import loaders

    told = {name: value for name, value in copy.deepcopy(config).items() if name != "model_type"}
    model = loaders.get_moshi_lm(None, told, device="cpu", dtype=torch.float32)
    redraw(model)
    if config.get("model_type") == "hibiki":
        model.text_emb.weight.data[2] = model.text_emb.weight.data[3]
    return model.eval()


def redraw(model: nn.Module) -> nn.Module:
    """Norms and biases too; logits with a std of about 1."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            matrix = value.ndim > 1 and not name.endswith(("alpha", "padding"))
            value.normal_(std=value.shape[-1] ** -0.5 if matrix else 0.3)
            if not matrix and not name.endswith("bias"):
                value.add_(1)
            if name.startswith(("linears", "text_linear")):
                value.mul_(0.5)
    return model


def write(model: nn.Module, config: dict[str, Any], folder: Path, *, joined: bool = True) -> Path:
    """A directory as Kyutai publishes them: attention's projections joined."""
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if joined and (".in_projs." in name or ".out_projs." in name):
            place, _, rest = name.partition("in_projs." if ".in_projs." in name else "out_projs.")
            at = place + ("in_proj_weight" if ".in_projs." in name else "out_proj.weight")
            state[at] = torch.cat([state[at], value]) if at in state else value
            assert rest.endswith(".weight")
        else:
            state[name] = value
    save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def codes(config: dict[str, Any], batch: int, frames: int, holes: float = 0.0) -> Tensor:
    """Random text and audio; with `holes`, some tokens that are not there."""
    text = torch.randint(config.get("text_card_out", config["text_card"]), (batch, 1, frames))
    audio = torch.randint(config["card"], (batch, config["n_q"], frames))
    both = torch.cat([text, audio], 1)
    return both.masked_fill(torch.rand(both.shape) < holes, -1)


def told(config: dict[str, Any], batch: int) -> dict[str, Any]:
    """Random conditions, some of them absent."""
    values = {}
    for name, one in config.get("conditioners", {}).items():
        if one["type"] == "lut":
            values[name] = (["good", None, "bad"] * batch)[:batch]
        else:
            values[name] = [None if i == 1 else torch.randn(3 + i, 10) for i in range(batch)]
    return values


def official_conditions(model: nn.Module, values: dict[str, Any]) -> Any:
    """The same for Kyutai's package; None where the model has none."""
    from moshi.conditioners import ConditionAttributes, TensorCondition

    if model.condition_provider is None:
        return None
    batch = len(next(iter(values.values())))
    rows = []
    for i in range(batch):
        row = ConditionAttributes()
        for name, value in values.items():
            if isinstance(value[i], str) or name == "description":
                row.text[name] = value[i]
            elif value[i] is None:
                row.tensor[name] = TensorCondition(torch.zeros(1, 1, 10), torch.zeros(1, 1, dtype=torch.bool))
            else:
                row.tensor[name] = TensorCondition.from_tensor(value[i][None])
        rows.append(row)
    return model.condition_provider(model.condition_provider.prepare(rows))


def pair(shape: str, folder: Path) -> tuple[nn.Module, DuplexLM, dict[str, Any]]:
    config = settings(shape)
    theirs = official(config)
    return theirs, DuplexLM.from_pretrained(write(theirs, config, folder)), config


NORM = spec.RMSNorm(eps=1e-8, order="scale_then_cast")


def layer(heads: int = 4, width: int = 8, hidden: int = 40, left: int | None = None, **changes: Any) -> spec.Layer:
    """A layer as Moshi's are, with grouped queries."""
    mixer = spec.Attention(heads=heads, kv_heads=heads // 2, head_dim=width, window=spec.Window(left=left, right=0),
                           q_bias=False, k_bias=False, v_bias=False, out_bias=False, **changes)
    mlp = spec.Mlp(hidden=hidden, act="silu", gated=True, up_bias=False, down_bias=False)
    return spec.Layer(mixer=mixer, mlp=mlp, norm=NORM)


def small(**changes) -> DuplexLM:
    """Two delays, GQA, weights that steps share, narrow embeddings."""
    one = layer(left=5, rope=spec.Rope(layout="interleaved"))
    depth = spec.Depth(stack=spec.Stack(dim=16, layers=(layer(heads=2, hidden=24),) * 2),
                       weights=(0, 1, 2, 2), rank=8)
    fields = {"text": spec.TextStream(vocab=20), "stack": spec.Stack(dim=32, layers=(one,) * 2,
              final_norm=NORM), "card": 12, "delays": (0, 0, 2, 2, 2, 0, 2), "context": 6, "depth": depth}
    return redraw(DuplexLM(spec.DuplexSpec(**fields | changes))).eval()


def random_codes(model: DuplexLM, batch: int, frames: int) -> Tensor:
    s = model.spec
    return torch.cat([torch.randint(s.text.vocab, (batch, 1, frames)),
                      torch.randint(s.card, (batch, s.codebooks, frames))], 1)


class SimpleFrame(NamedTuple):
    """What stands for a step's frame where only its text counts."""

    written: Tensor
