"""OpenAI's `.pt` files of Whisper, and the `.tiktoken` vocabularies that belong to them."""

from __future__ import annotations

import base64
import binascii
import gzip
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mm.tokenizer
from mm.checkpoint import files as checkpoint
from mm.checkpoint.family import Extras, Keys, Opened
from mm.checkpoint.files import Weights
from mm.checkpoint.tables import Table
from mm.errors import InputError
from mm.tokenizer.bpe import TokenizersFile, byte_alphabet, byte_level_pipeline
from mm.tokenizer.tokenizer import Tokenizer

from ..spectrogram import LogMel
from ..speech_tokens import MULTILINGUAL, SpeechTokens

GPT2 = Path(mm.tokenizer.__file__).parent / "data" / "gpt2_merges.txt.gz"


def read_openai(path: Path, spec_of: Callable[..., Any], names_of: Callable[..., Table]) -> Opened:
    """A file {"dims": sizes, "model_state_dict": weights}, tensors and numbers only; the vocabulary of a multilingual
    model is `multilingual.tiktoken` beside it. Raises InputError."""
    content = checkpoint.unpickle(path, False)
    if not isinstance(content, dict) or not {"dims", "model_state_dict"} <= set(content):
        raise InputError(f"{path} is not OpenAI's Whisper: it lacks dims or model_state_dict")
    spec, state = spec_of_dims(content["dims"], str(path), spec_of), content["model_state_dict"]
    weights = Weights(str(path), {name: tuple(value.shape) for name, value in state.items()}, state.__getitem__)
    extras = Extras(LogMel(bins=spec.mels), tokenizer_of(path, spec.decoder.embed.vocab))
    return Opened(spec, weights, names_of("openai", spec), extras)


def spec_of_dims(dims: Any, where: str, spec_of: Callable[..., Any]) -> Any:
    keys = Keys(dims, f"{where}: dims")
    dim, text_dim = keys.positive("n_audio_state"), keys.positive("n_text_state")
    if dim != text_dim:
        raise InputError(f"{where}: an encoder of width {dim} and a decoder of width {text_dim} are not supported")
    sides = [(keys.positive(f"n_{side}_layer"), keys.positive(f"n_{side}_head"), 4 * dim) for side in ("audio", "text")]
    return spec_of(mels=keys.positive("n_mels"), frames=keys.positive("n_audio_ctx"), dim=dim,
                   context=keys.positive("n_text_ctx"), vocab=keys.positive("n_vocab"), encoder=sides[0],
                   decoder=sides[1])


def tokenizer_of(path: Path, vocab: int) -> Tokenizer | None:
    """GPT-2's for English models, `multilingual.tiktoken` for others (None where it is absent)."""
    tokens = SpeechTokens(vocab)
    if vocab < MULTILINGUAL:
        with gzip.open(GPT2, "rt", encoding="utf-8") as file:
            merges = [tuple(line.split(" ")) for line in file.read().split("\n")]
        pieces = [*byte_alphabet().values(), *(a + b for a, b in merges)]
        return built({piece: i for i, piece in enumerate(pieces)}, merges, tokens)
    beside = path.with_name("multilingual.tiktoken")
    return read_tiktoken(beside, tokens) if beside.is_file() else None


def read_tiktoken(file: Path, tokens: SpeechTokens) -> Tokenizer:
    """Lines of a token in base 64 and its rank."""
    try:
        rows = [line.split() for line in file.read_text("utf-8").splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
    except (ValueError, binascii.Error) as error:
        raise InputError(f"{file} is not a tiktoken vocabulary ({error})") from None
    letters = byte_alphabet()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [(spelled[a], spelled[b]) for a, b in merges_of(ranks)]
    return built({spelled[token]: rank for token, rank in ranks.items()}, merges, tokens)


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts of every token of several bytes, by rank: what the merges before it make of its bytes."""
    found = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            best, i = min((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
            if best >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
    return found


def built(vocabulary: dict[str, int], merges: list[tuple[str, str]], tokens: SpeechTokens) -> Tokenizer:
    pipeline = byte_level_pipeline(vocabulary, merges)
    pipeline.add_special_tokens(tokens.names())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "add_eos_token": False}
    settings |= {f"{kind}_token": "<|endoftext|>" for kind in ("bos", "eos", "unk", "pad")}
    return Tokenizer(pieces=TokenizersFile(pipeline), bos_id=tokens.end, eos_id=tokens.end, pad_id=tokens.end,
                     settings=settings)
