"""GGUF: one file with weights (often of few bits), config and tokenizer; Llama-shaped models are read.

The weights are widened to float32 with the `gguf` package, which also knows every quantised format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.checkpoint import Weights
from mm.errors import InputError
from mm.family import Extras, Keys, Opened
from mm.pieces import TokenizersFile, scored_pipeline, split_pipeline, start_with
from mm.spec import CAUSAL, Attention, DecoderSpec, Embed, Layer, LMHead, Mlp, RMSNorm, Rope, Stack
from mm.tables import Rule, Table, Way, rule
from mm.tokenizer import Tokenizer

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
        return torch.from_numpy(dequantize(found[name].data, found[name].tensor_type).copy()).reshape(shapes[name])
    spec = to_spec(fields, tied="output.weight" not in found, where=str(path))
    extras = Extras(tokenizer=tokenizer_of(fields, str(path)))
    return Opened(spec, Weights(str(path), shapes, read), table(spec), extras)


def to_spec(fields: Mapping[str, Any], tied: bool, where: str) -> DecoderSpec:
    kind = fields.get("general.architecture")
    if kind != "llama":
        raise InputError(f"{where} holds a model of the architecture {kind}, only llama is read from GGUF")
    own = {name: value for name, value in fields.items() if name.startswith("llama.")}
    keys = Keys({name.removeprefix("llama."): value for name, value in own.items()}, where)
    dim, heads = keys.positive("embedding_length"), keys.positive("attention.head_count")
    width = keys.positive("attention.key_length", dim // heads)
    context = keys.positive("context_length")
    norm = RMSNorm(eps=float(keys.take("attention.layer_norm_rms_epsilon", float)))
    theta = float(keys.take("rope.freq_base", float, 10000.0))
    rope = Rope(theta=theta, dim=keys.positive("rope.dimension_count", width))
    mixer = Attention(heads=heads, kv_heads=keys.positive("attention.head_count_kv", heads), head_dim=width,
                      sight=CAUSAL, rope=rope, q_bias=False, k_bias=False, v_bias=False, out_bias=False)
    mlp = Mlp(hidden=keys.positive("feed_forward_length"), act="silu", gated=True, up_bias=False, down_bias=False)
    layers = (Layer(mixer=mixer, mlp=mlp, norm=norm),) * keys.positive("block_count")
    vocab = keys.positive("vocab_size", len(fields.get("tokenizer.ggml.tokens", ())) or ...)
    keys.done({"attention.value_length"})
    return DecoderSpec(embed=Embed(vocab=vocab), stack=Stack(dim=dim, layers=layers, final_norm=norm), context=context,
                       head=LMHead(tied=tied))


def table(spec: DecoderSpec) -> Table:
    t, o = "blk.{n}.", "stack.blocks.{n}."
    mixer = spec.stack.layers[0].mixer
    rules: list[Rule] = [
        rule("token_embd.weight", "embed.tokens.weight"), rule("output_norm.weight", "stack.final_norm.weight"),
        rule("output.weight", "head.weight"),
        rule(tuple(f"{t}attn_{part}.weight" for part in "qkv"), o + "mixer.qkv.weight", dealt(mixer)),
        rule(t + "attn_output.weight", o + "mixer.out.weight"), rule(t + "attn_norm.weight", o + "mixer_norm.weight"),
        rule(t + "ffn_norm.weight", o + "mlp_norm.weight"),
        *(rule(f"{t}ffn_{part}.weight", f"{o}mlp.{part}.weight") for part in ("gate", "up", "down"))]
    return Table(tuple(rules), {"rope_freqs.weight": "rotations are computed from positions"})


def dealt(mixer: Attention) -> Way:
    """Queries, keys and values side by side, the first two from interleaved rotary pairs to halves."""
    sizes = (mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim)

    def deal(x: Tensor, heads: int) -> Tensor:
        return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def riffle(x: Tensor, heads: int) -> Tensor:
        return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def save(xs: Sequence[Tensor]) -> list[Tensor]:
        q, k, v = xs[0].split(sizes)
        return [riffle(q, mixer.heads), riffle(k, mixer.kv_heads), v]
    return Way(lambda xs: [torch.cat([deal(xs[0], mixer.heads), deal(xs[1], mixer.kv_heads), xs[2]])], save)


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
