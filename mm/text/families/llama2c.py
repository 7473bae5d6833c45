"""llama2.c: a header of seven numbers, then every weight in float32; the vocabulary lies in a second file, or after the
weights (`.data`, as compiled for browsers)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mm.checkpoint.family import Extras, Keys, Opened
from mm.checkpoint.fields import Values, gather
from mm.checkpoint.files import Weights
from mm.checkpoint.tables import Table, rotary, rules_of
from mm.errors import InputError
from mm.spec import DecoderSpec, Rope
from mm.text.families.decoder import PLAIN, decoder_of
from mm.tokenizer.bpe import TokenizersFile, scored_pipeline, start_with
from mm.tokenizer.tokenizer import Tokenizer

HEADER = struct.Struct("<7i")


def read_llama2c(path: Path) -> Opened:
    """The model in a `.bin` file, with `tokenizer.bin` or `tok*.bin` beside it, or in a `.data` file with its
    vocabulary. Raises InputError."""
    data = path.read_bytes()
    if len(data) < HEADER.size:
        raise InputError(f"{path} is too short for a llama2.c model")
    dim, hidden, depth, heads, kv_heads, vocab, context = HEADER.unpack_from(data)
    if min(dim, hidden, depth, heads, kv_heads, context) < 1 or not vocab or dim % heads or heads % kv_heads:
        raise InputError(f"{path} does not begin with the seven numbers of a llama2.c model")
    spec = spec_of(HEADER.unpack_from(data))
    weights, rest = weights_of(path, data, spec)
    tokenizer = tokenizer_of(*read_vocabulary(path, rest, abs(vocab))) if rest else tokenizer_beside(path, abs(vocab))
    return Opened(spec, weights, table(spec), Extras(tokenizer=tokenizer))


def spec_of(sizes: Sequence[int]) -> DecoderSpec:
    """sizes: the seven numbers of a header; a negative vocabulary means a head that is not tied."""
    dim, hidden, depth, heads, kv_heads, vocab, context = sizes
    v = gather((PLAIN,), Keys({}, "llama2.c")) | {f"mixer.{part}_bias": False for part in "qkv"}
    return decoder_of(Values(v | {
        "stack.dim": dim, "stack.depth": depth, "spec.context": context, "embed.vocab": abs(vocab),
        "head.tied": vocab > 0, "mixer.heads": heads, "mixer.kv_heads": kv_heads, "mixer.head_dim": dim // heads,
        "mixer.rope": Rope(), "mlp.hidden": hidden, "norm.eps": 1e-5}))


def weights_of(path: Path, data: bytes, spec: DecoderSpec) -> tuple[Weights, bytes]:
    """(weights by name: every kind is one array over the layers; the bytes after them)."""
    layers, dim = spec.stack.layers, spec.stack.dim
    mixer, mlp, depth = layers[0].mixer, layers[0].mlp, len(layers)
    kv, width = mixer.kv_heads * mixer.head_dim, mixer.head_dim
    order = [("embed", (spec.embed.vocab, dim)), ("attn_norm", (depth, dim)), ("q", (depth, dim, dim)),
             ("k", (depth, kv, dim)), ("v", (depth, kv, dim)), ("o", (depth, dim, dim)), ("ffn_norm", (depth, dim)),
             ("gate", (depth, mlp.hidden, dim)), ("down", (depth, dim, mlp.hidden)), ("up", (depth, mlp.hidden, dim)),
             ("norm", (dim,)), ("rope", (2, spec.context, width // 2))]
    order += [] if spec.head.tied else [("head", (spec.embed.vocab, dim))]
    end = HEADER.size + 4 * sum(torch.Size(shape).numel() for _, shape in order)
    if len(data) < end:
        raise InputError(f"{path} has {len(data)} bytes, where its header asks for {end}")
    floats = torch.frombuffer(bytearray(data[HEADER.size:end]), dtype=torch.float32)
    held: dict[str, Tensor] = {}
    for name, shape in order:
        size = torch.Size(shape).numel()
        value, floats = floats[:size].view(shape), floats[size:]
        one = name in ("embed", "norm", "rope", "head")
        held |= {name: value} if one else {f"{i}.{name}": value[i] for i in range(depth)}
    shapes = {name: tuple(value.shape) for name, value in held.items()}
    return Weights(str(path), shapes, held.__getitem__), data[end:]


WEIGHTS = {
    "embed": "embed.tokens.weight", "norm": "stack.final_norm.weight", "head": "head.weight",
    "{n}.attn_norm": "stack.blocks.{n}.mixer_norm.weight", "{n}.[q k v]": "stack.blocks.{n}.mixer.qkv.weight | qkv",
    "{n}.o": "stack.blocks.{n}.mixer.out.weight", "{n}.ffn_norm": "stack.blocks.{n}.mlp_norm.weight",
    "{n}.gate": "stack.blocks.{n}.mlp.gate.weight", "{n}.up": "stack.blocks.{n}.mlp.up.weight",
    "{n}.down": "stack.blocks.{n}.mlp.down.weight"}


def table(spec: DecoderSpec) -> Table:
    mixer = spec.stack.layers[0].mixer
    return Table(rules_of(WEIGHTS, {"qkv": rotary(mixer.heads, mixer.kv_heads, mixer.head_dim)}),
                 {"rope": "rotations are computed from positions"})


def tokenizer_beside(path: Path, vocab: int) -> Tokenizer | None:
    """The vocabulary of this size beside a model."""
    for file in (path.with_name("tokenizer.bin"), *sorted(path.parent.glob("tok*.bin"))):
        if file.is_file() and file != path:
            tokens, scores = read_vocabulary(file, file.read_bytes(), vocab)
            if len(tokens) == vocab:
                return tokenizer_of(tokens, scores)
    return None


def tokenizer_of(tokens: list[str], scores: list[float]) -> Tokenizer:
    made = scored_pipeline(tokens, scores)
    made.add_special_tokens(tokens[:3])
    start_with(made, tokens[1], 1)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True,
                "tokenizer_class": "PreTrainedTokenizerFast"}
    return Tokenizer(pieces=TokenizersFile(made), prefix=(1,), bos_id=1, eos_id=2, pad_id=0, settings=settings)


def read_vocabulary(file: Path, data: bytes, vocab: int) -> tuple[list[str], list[float]]:
    """(tokens, scores): the longest token's length, then score, length and bytes of each. Raises InputError."""
    at, tokens, scores = 4, [], []
    try:
        while at < len(data) and len(tokens) < vocab:
            score, length = struct.unpack_from("<fi", data, at)
            tokens.append(data[at + 8:at + 8 + length].decode())
            scores.append(score)
            at += 8 + length
    except (struct.error, UnicodeDecodeError) as error:
        raise InputError(f"{file} holds no llama2.c vocabulary ({error})") from None
    if tokens[3:259] == [chr(byte) for byte in range(256)]:  # the first files spell the bytes out
        tokens[3:259] = [f"<0x{byte:02X}>" for byte in range(256)]
    return ["<unk>", "<s>", "</s>", *(token.replace(" ", "▁") for token in tokens[3:])], scores
