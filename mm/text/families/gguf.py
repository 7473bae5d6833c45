"""GGUF: one file with weights (often of few bits), config and tokenizer; Llama, Mistral, Qwen2 and Qwen3 are read.

The weights are widened to float32 with the `gguf` package, which also knows every quantised format.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.checkpoint.family import Extras, Keys, Opened
from mm.checkpoint.fields import field, gather
from mm.checkpoint.files import Weights
from mm.checkpoint.tables import Table, fused, rotary, rules_of
from mm.errors import InputError
from mm.spec import DecoderSpec, LinearScaling, LongRope, QKNorm, Rope, Scaling
from mm.text.families.decoder import PLAIN, decoder_of, widths
from mm.tokenizer.bpe import TokenizersFile, scored_pipeline, split_pipeline, start_with
from mm.tokenizer.tokenizer import Tokenizer

ARCHITECTURE, FREQS = "general.architecture", "rope_freqs.weight"
KINDS = ("llama", "qwen2", "qwen3")  # Mistral's files call themselves llama
CONTROL = 3  # the token_type of tokens that no text spells


def read_gguf(path: Path) -> Opened:
    """The model in a GGUF file. Raises InputError for a file that is not one, or of another architecture."""
    from gguf import GGUFReader, dequantize

    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise InputError(f"{path} is truncated or not a GGUF file ({error})") from None
    fields = {name: field.contents() for name, field in reader.fields.items()}
    found = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in found.items()}

    def read(name: str) -> Tensor:
        tensor = found[name]
        try:
            return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).reshape(shapes[name])
        except NotImplementedError:
            raise InputError(f"{path}: {name} has the type {tensor.tensor_type.name}, which gguf cannot read") from None
    spec = to_spec(fields, found, read, str(path))
    extras = Extras(tokenizer=tokenizer_of(fields, str(path)))
    return Opened(spec, Weights(str(path), shapes, read), table(fields[ARCHITECTURE], spec), extras)


FIELDS = (
    field("embedding_length", "stack.dim"), field("block_count", "stack.depth"),
    field("context_length", "spec.context"), field("feed_forward_length", "mlp.hidden"),
    field("attention.head_count", "mixer.heads"),
    field("attention.head_count_kv", "mixer.kv_heads", default=lambda v: v["mixer.heads"]),
    field("attention.key_length", "mixer.head_dim", default=lambda v: v["stack.dim"] // v["mixer.heads"]),
    field("attention.layer_norm_rms_epsilon", "norm.eps", kind=float), PLAIN)


def to_spec(fields: Mapping[str, Any], names: Container[str], read: Callable[[str], Tensor], where: str
            ) -> DecoderSpec:
    """Raises InputError for another architecture and for keys which are absent, wrong, or not understood."""
    kind = fields.get(ARCHITECTURE)
    if kind not in KINDS:
        raise InputError(f"{where} holds a model of the architecture {kind}, only {', '.join(KINDS)} are read")
    start = f"{kind}."
    keys = Keys({name.removeprefix(start): value for name, value in fields.items() if name.startswith(start)}, where)
    v = gather(FIELDS, keys)
    scaling = rope_scaling(keys, v["spec.context"], read(FREQS) if FREQS in names else None)
    width = v["mixer.head_dim"]
    rotated = keys.positive("rope.dimension_count", width)
    v["mixer.rope"] = Rope(theta=float(keys.take("rope.freq_base", float, 10000.0)), scaling=scaling,
                           dim=None if rotated == width else rotated)
    v |= {f"mixer.{part}_bias": "blk.0.attn_q.bias" in names for part in "qkv"}
    if "blk.0.attn_q_norm.weight" in names:
        v["mixer.qk_norm"] = QKNorm(norm=v.make("norm"))
    v["embed.vocab"] = keys.positive("vocab_size", len(fields.get("tokenizer.ggml.tokens", ())) or ...)
    v["head.tied"] = "output.weight" not in names
    keys.done({"attention.value_length"})
    return decoder_of(v)


def rope_scaling(keys: Keys, context: int, freqs: Tensor | None) -> Scaling | None:
    """Linear, or a divisor per angle, in which Llama 3.1's files keep their scaling."""
    kind, factor = keys.take("rope.scaling.type", str, "none"), keys.take("rope.scaling.factor", float, 1.0)
    if kind not in ("none", "linear") or (kind == "linear" and freqs is not None):
        raise InputError(f"{keys.where}: the rope scaling {kind} is not supported")
    if freqs is not None:
        divisors = tuple(freqs.tolist())
        return LongRope(original=context, factor=1.0, short=divisors, long=divisors, gain=1.0)
    return LinearScaling(factor=factor) if kind == "linear" else None


WEIGHTS = {
    "token_embd.weight": "embed.tokens.weight",
    "blk.{n}.attn_norm.weight": "stack.blocks.{n}.mixer_norm.weight",
    "blk.{n}.attn_[q k v].{x}": "stack.blocks.{n}.mixer.qkv.{x} | qkv",
    "blk.{n}.attn_q_norm.weight": "stack.blocks.{n}.mixer.q_norm.weight",
    "blk.{n}.attn_k_norm.weight": "stack.blocks.{n}.mixer.k_norm.weight",
    "blk.{n}.attn_output.weight": "stack.blocks.{n}.mixer.out.weight",
    "blk.{n}.ffn_norm.weight": "stack.blocks.{n}.mlp_norm.weight",
    "blk.{n}.ffn_gate.weight": "stack.blocks.{n}.mlp.gate.weight",
    "blk.{n}.ffn_up.weight": "stack.blocks.{n}.mlp.up.weight",
    "blk.{n}.ffn_down.weight": "stack.blocks.{n}.mlp.down.weight",
    "output_norm.weight": "stack.final_norm.weight",
    "output.weight": "head.weight"}


def table(kind: str, spec: DecoderSpec) -> Table:
    """llama's queries and keys have their rotary pairs side by side, the others' as halves."""
    mixer = spec.stack.layers[0].mixer
    qkv = rotary(mixer.heads, mixer.kv_heads, mixer.head_dim) if kind == "llama" else fused(*widths(mixer))
    return Table(rules_of(WEIGHTS, {"qkv": qkv}), {FREQS: "a part of the config: a divisor per angle"})


# ------------------------------------------------------------------------------------------ tokenizer
def tokenizer_of(fields: Mapping[str, Any], where: str) -> Tokenizer | None:
    given = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    tokens, kind = given.get("tokens"), given.get("model")
    if not tokens:
        return None
    special = [token for token, sort in zip(tokens, given.get("token_type", ()), strict=False) if sort == CONTROL]
    if kind == "gpt2":
        merges = [tuple(pair.split(" ")) for pair in given["merges"]]
        made = split_pipeline({token: i for i, token in enumerate(tokens)}, merges, given.get("pre", "default"), where)
    elif kind == "llama":
        made = scored_pipeline(tokens, given["scores"], space=given.get("add_space_prefix", True))
    else:
        raise InputError(f"{where}: a tokenizer of the model {kind} is not known, only gpt2 and llama")
    made.add_special_tokens(special)
    ids = {name: given.get(f"{name}_token_id") for name in ("bos", "eos", "padding")}
    template = fields.get("tokenizer.chat_template")
    settings = {f"{name}_token": tokens[i] for name, i in (("bos", ids["bos"]), ("eos", ids["eos"]),
                                                           ("pad", ids["padding"])) if i is not None}
    starts = given.get("add_bos_token", kind == "llama") and ids["bos"] is not None
    if starts:
        start_with(made, tokens[ids["bos"]], ids["bos"])
    return Tokenizer(
        pieces=TokenizersFile(made), prefix=(ids["bos"],) if starts else (), bos_id=ids["bos"], eos_id=ids["eos"],
        pad_id=next(i for i in (ids["padding"], ids["eos"], 0) if i is not None),
        settings=settings | {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bool(starts)}
        | ({"chat_template": template} if template else {}))
