"""GGUF: one file with weights (often of few bits), config and tokenizer; Llama, Mistral, Qwen2 and Qwen3 are read.

The weights are widened to float32 with the `gguf` package, which also knows every quantised format.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.checkpoint.family import Extras, Keys, Opened
from mm.checkpoint.files import Weights
from mm.checkpoint.tables import Rule, Table, WeightTransform, fused, rule
from mm.errors import InputError
from mm.spec import (
    CAUSAL,
    Attention,
    DecoderSpec,
    Embed,
    Layer,
    LinearScaling,
    LMHead,
    LongRope,
    Mlp,
    QKNorm,
    RMSNorm,
    Rope,
    Scaling,
    Stack,
)
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


def to_spec(fields: Mapping[str, Any], names: Container[str], read: Callable[[str], Tensor], where: str
            ) -> DecoderSpec:
    """Raises InputError for another architecture and for keys which are absent, wrong, or not understood."""
    kind = fields.get(ARCHITECTURE)
    if kind not in KINDS:
        raise InputError(f"{where} holds a model of the architecture {kind}, only {', '.join(KINDS)} are read")
    start = f"{kind}."
    keys = Keys({name.removeprefix(start): value for name, value in fields.items() if name.startswith(start)}, where)
    dim, context = keys.positive("embedding_length"), keys.positive("context_length")
    norm = RMSNorm(eps=float(keys.take("attention.layer_norm_rms_epsilon", float)))
    freqs = read(FREQS) if FREQS in names else None
    mixer = attention_of(keys, dim, "blk.0.attn_q.bias" in names, rope_scaling(keys, context, freqs))
    if "blk.0.attn_q_norm.weight" in names:
        mixer = replace(mixer, qk_norm=QKNorm(norm=norm))
    mlp = Mlp(hidden=keys.positive("feed_forward_length"), act="silu", gated=True, up_bias=False, down_bias=False)
    layers = (Layer(mixer=mixer, mlp=mlp, norm=norm),) * keys.positive("block_count")
    vocab = keys.positive("vocab_size", len(fields.get("tokenizer.ggml.tokens", ())) or ...)
    keys.done({"attention.value_length"})
    return DecoderSpec(embed=Embed(vocab=vocab), stack=Stack(dim=dim, layers=layers, final_norm=norm), context=context,
                       head=LMHead(tied="output.weight" not in names))


def attention_of(keys: Keys, dim: int, biased: bool, scaling: Scaling | None) -> Attention:
    heads = keys.positive("attention.head_count")
    width = keys.positive("attention.key_length", dim // heads)
    turned = keys.positive("rope.dimension_count", width)
    rope = Rope(theta=float(keys.take("rope.freq_base", float, 10000.0)), dim=None if turned == width else turned,
                scaling=scaling)
    return Attention(heads=heads, kv_heads=keys.positive("attention.head_count_kv", heads), head_dim=width,
                     window=CAUSAL, rope=rope, q_bias=biased, k_bias=biased, v_bias=biased, out_bias=False)


def rope_scaling(keys: Keys, context: int, freqs: Tensor | None) -> Scaling | None:
    """Linear, or a divisor per angle, in which Llama 3.1's files keep their scaling."""
    kind, factor = keys.take("rope.scaling.type", str, "none"), keys.take("rope.scaling.factor", float, 1.0)
    if kind not in ("none", "linear") or (kind == "linear" and freqs is not None):
        raise InputError(f"{keys.where}: the rope scaling {kind} is not supported")
    if freqs is not None:
        divisors = tuple(freqs.tolist())
        return LongRope(original=context, factor=1.0, short=divisors, long=divisors, gain=1.0)
    return LinearScaling(factor=factor) if kind == "linear" else None


def table(kind: str, spec: DecoderSpec) -> Table:
    """llama's queries and keys have their rotary pairs side by side, the others' as halves."""
    t, o = "blk.{n}.", "stack.blocks.{n}."
    mixer = spec.stack.layers[0].mixer
    heads, kv = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    transform = dealt(mixer) if kind == "llama" else fused(heads, kv, kv)
    rules: list[Rule] = [
        rule("token_embd.weight", "embed.tokens.weight"), rule("output_norm.weight", "stack.final_norm.weight"),
        rule("output.weight", "head.weight"),
        *(rule(tuple(f"{t}attn_{part}.{x}" for part in "qkv"), f"{o}mixer.qkv.{x}", transform)
          for x in ("weight", "bias")),
        *(rule(f"{t}attn_{part}.weight", f"{o}mixer.{part}.weight") for part in ("q_norm", "k_norm")),
        rule(t + "attn_output.weight", o + "mixer.out.weight"), rule(t + "attn_norm.weight", o + "mixer_norm.weight"),
        rule(t + "ffn_norm.weight", o + "mlp_norm.weight"),
        *(rule(f"{t}ffn_{part}.weight", f"{o}mlp.{part}.weight") for part in ("gate", "up", "down"))]
    return Table(tuple(rules), {FREQS: "a part of the config: a divisor per angle"})


def dealt(mixer: Attention) -> WeightTransform:
    """Queries, keys and values side by side, the first two from interleaved rotary pairs to halves."""
    sizes = (mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim)

    def deal(x: Tensor, heads: int) -> Tensor:
        return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def riffle(x: Tensor, heads: int) -> Tensor:
        return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def save(xs: Sequence[Tensor]) -> list[Tensor]:
        q, k, v = xs[0].split(sizes)
        return [riffle(q, mixer.heads), riffle(k, mixer.kv_heads), v]
    return WeightTransform(lambda xs: [torch.cat([deal(xs[0], mixer.heads), deal(xs[1], mixer.kv_heads), xs[2]])], save)


# ------------------------------------------------------------------------------------------ tokenizer
def tokenizer_of(fields: Mapping[str, Any], where: str) -> Tokenizer | None:
    told = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    tokens, kind = told.get("tokens"), told.get("model")
    if not tokens:
        return None
    special = [token for token, sort in zip(tokens, told.get("token_type", ()), strict=False) if sort == CONTROL]
    if kind == "gpt2":
        merges = [tuple(pair.split(" ")) for pair in told["merges"]]
        made = split_pipeline({token: i for i, token in enumerate(tokens)}, merges, told.get("pre", "default"), where)
    elif kind == "llama":
        made = scored_pipeline(tokens, told["scores"], space=told.get("add_space_prefix", True))
    else:
        raise InputError(f"{where}: a tokenizer of the model {kind} is not known, only gpt2 and llama")
    made.add_special_tokens(special)
    ids = {name: told.get(f"{name}_token_id") for name in ("bos", "eos", "padding")}
    template = fields.get("tokenizer.chat_template")
    settings = {f"{name}_token": tokens[i] for name, i in (("bos", ids["bos"]), ("eos", ids["eos"]),
                                                           ("pad", ids["padding"])) if i is not None}
    starts = told.get("add_bos_token", kind == "llama") and ids["bos"] is not None
    if starts:
        start_with(made, tokens[ids["bos"]], ids["bos"])
    return Tokenizer(
        pieces=TokenizersFile(made), prefix=(ids["bos"],) if starts else (), bos_id=ids["bos"], eos_id=ids["eos"],
        pad_id=next(i for i in (ids["padding"], ids["eos"], 0) if i is not None),
        settings=settings | {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bool(starts)}
        | ({"chat_template": template} if template else {}))
