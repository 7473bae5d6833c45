"""Text to token ids and back, with the cleaning, start, end and padding of a checkpoint."""

from __future__ import annotations

import gzip
import html
import json
import os
import string
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.errors import InputError
from mm.tokenizer.bpe import (
    BOS,
    EOS,
    BytePairs,
    Pieces,
    SentencePiece,
    TokenizersFile,
    byte_level_pipeline,
    clip_pipeline,
)
from mm.tokenizer.chat import Message, answers, render, template_of

CLIP_MERGES = Path(__file__).parent / "data" / "bpe_simple_vocab_16e6.txt.gz"
CLIP_VOCABULARY = 49408
SURROUNDED = {"T5": (False, True), "Llama": (True, False), "Gemma": (True, False),  # start, end; sentencepiece classes
              "Siglip": (False, True)}
_PUNCTUATION = str.maketrans("", "", string.punctuation)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of a data loader


def _mend(text: str) -> str:
    if text.isascii() and text.isprintable() and "&" not in text:  # nothing to mend, and ftfy is slow
        return text
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _squeeze(text: str) -> str:
    return " ".join(text.split())


CLEANERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "whitespace": lambda text: _squeeze(_mend(text)),
    "lower": lambda text: _squeeze(_mend(text)).lower(),
    "lowercase": str.lower,
    "bare": lambda text: _squeeze(text.lower().translate(_PUNCTUATION)),
    "canonicalize": lambda text: _squeeze(_mend(text).replace("_", " ").translate(_PUNCTUATION).lower()),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """Text to ids as a checkpoint wants them.

    `clean` is "none" or one of open_clip's cleanings; `prefix` and `suffix` surround every row that `__call__` makes;
    `settings` is the content of tokenizer_config.json.
    """

    pieces: Pieces
    clean: str = "none"
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.clean not in CLEANERS:
            raise InputError(f"tokenizer: clean is {self.clean!r}, expected one of {', '.join(CLEANERS)}")
        around = (*self.prefix, *self.suffix, self.pad_id)
        if not all(isinstance(i, int) for i in around):
            raise InputError(f"tokenizer: the ids around a text and of its padding are {around}, expected numbers")

    @property
    def vocab_size(self) -> int:
        return self.pieces.size

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text, such as start, end and mask."""
        named = (self.pieces.token_id(name) for name in self._names().values() if name)
        return frozenset({self.bos_id, self.eos_id, *self.prefix, *self.suffix, *named, *self.pieces.special_ids()}
                         - {None})

    def check_fits(self, rows: int, where: str) -> None:
        """Raises InputError for more entries than a table of embeddings has rows; tokens that were only added to the
        vocabulary may be without (Gemma 3's pictures)."""
        if self.pieces.plain > rows:
            raise InputError(f"{where}: the tokenizer has {self.vocab_size} entries, the embedding only {rows}: they "
                             "do not belong together")

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without prefix and suffix."""
        if not isinstance(text, str):
            raise InputError(f"tokenizer: expected a string, got {type(text).__name__}")
        try:
            return self.pieces.encode(CLEANERS[self.clean](text))
        except (TypeError, UnicodeEncodeError):
            raise InputError(f"tokenizer: {text[:40]!r} holds half a surrogate pair, which is no character") from None

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Ids to text, without start, end and trailing padding."""
        row = [int(i) for i in ids]
        if row and not 0 <= min(row) <= max(row) < self.vocab_size:
            raise InputError(f"tokenizer: ids run from {min(row)} to {max(row)}, the vocabulary has {self.vocab_size}")
        text = len(row)
        while text and row[text - 1] == self.pad_id:
            text -= 1
        if text and row[text - 1] == self.eos_id:  # otherwise the last ids are text that happens to look like padding
            row = row[:text]
        around = {self.bos_id, self.eos_id, *self.prefix, *self.suffix}
        return self.pieces.decode([i for i in row if i not in around])

    def __call__(self, texts: str | Sequence[str], context: int, *, strict: bool = False) -> Tensor:
        """Texts -> (B, context) int64: prefix, ids, suffix, padding.

        A longer text loses its end but never the suffix; with `strict` it is an InputError.
        """
        room = self._room(context)
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = [self.encode(text) for text in texts]
        if strict and (long := [text for text, ids in zip(texts, rows, strict=True) if len(ids) > room]):
            raise InputError(f"tokenizer: {len(long)} of {len(texts)} texts do not fit a context of {context} tokens; "
                             f"the first is {long[0][:60]!r}")
        out = torch.full((len(rows), context), self.pad_id, dtype=torch.int64)
        for row, ids in zip(out.numpy(), rows, strict=True):
            whole = (*self.prefix, *ids[:room], *self.suffix)
            row[: len(whole)] = whole
        return out

    def chat(self, messages: Sequence[Message], *, generate: bool = True) -> list[int]:
        """A conversation ({role, content} each) as ids, by the checkpoint's own template, and with `generate` the
        beginning of the answer. Raises InputError where there is no template."""
        return self.encode(render(template_of(self.settings), messages, self._names(), generate=generate))

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[tuple[int, int]]]:
        """A whole conversation as ids, and the spans [a, b) of ids that the assistant is to write: every answer with
        the token that ends its turn. Raises InputError where there is no template, or one that refuses."""
        text, spans = answers(template_of(self.settings), messages, self._names())
        ids, places = self.pieces.encode_with_places(text)
        first, last = [a for a, _ in places], [b for _, b in places]
        return ids, [(bisect_right(last, a), bisect_left(first, b)) for a, b in spans]

    def _names(self) -> dict[str, str | None]:
        """The special tokens by the names that templates use."""
        return {name: _name(value) for name, value in self.settings.items() if name.endswith("_token")}

    def too_long(self, texts: str | Sequence[str], context: int) -> int:
        """Counts the texts that `__call__` would cut at this context."""
        room = self._room(context)
        return sum(len(self.encode(text)) > room for text in ([texts] if isinstance(texts, str) else texts))

    def _room(self, context: int) -> int:
        around = len(self.prefix) + len(self.suffix)
        if context < max(around, 1):
            raise InputError(f"tokenizer: a context of {context} has no room for the {around} tokens around a text")
        return context - around

    def save(self, folder: str | Path) -> None:
        """Writes the files that `load_tokenizer` and transformers read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.pieces.save(folder)
        clean = {"clean": self.clean} if self.clean != "none" else {}
        settings = json.dumps({**self.settings, **clean, "pad_id": self.pad_id}, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(settings + "\n", "utf-8")

    def to_open_clip(self) -> dict[str, Any]:
        """The `text_cfg` entries with which open_clip finds this tokenizer; unless empty, it needs `save` as well."""
        if self.pieces.merges == clip_tokenizer().pieces.merges:
            return {}
        clean = "whitespace" if self.clean == "none" else self.clean
        return {"hf_tokenizer_name": "local-dir", "tokenizer_kwargs": {"clean": clean}}


@lru_cache(maxsize=1)
def clip_tokenizer() -> Tokenizer:
    """CLIP's own tokenizer, 49,408 entries, padded with 0; equal to open_clip's (Radford et al. 2021)."""
    with gzip.open(CLIP_MERGES, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    return _byte_pairs([tuple(line.split()) for line in lines[1 : 1 + CLIP_VOCABULARY - 2 * 256 - 2]], pad_id=0)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A lower-cased tokenizer of CLIP's construction with at most `vocab_size` entries, padded with its end token.

    The start and end tokens are the last two ids, as argmax pooling needs; the same texts give the same tokenizer.
    """
    from tokenizers import Tokenizer as Trained
    from tokenizers import models, pre_tokenizers, trainers

    empty = BytePairs([])
    if vocab_size < empty.size:
        raise InputError(f"train_bpe: vocab_size is {vocab_size}, bytes and special tokens alone need {empty.size}")
    trained = Trained(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(  # listed as special tokens, the bytes get fixed ids and ties always break alike
        vocab_size=vocab_size - 2, special_tokens=empty.tokens, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator((empty.words(CLEANERS["lower"](text)) for text in texts), trainer)
    merges = TokenizersFile(trained).merges
    if not merges:
        raise InputError("train_bpe: the texts hold no word of two letters to learn from")
    return _byte_pairs(merges)


def _byte_pairs(merges: Sequence[tuple[str, str]], pad_id: int | None = None) -> Tokenizer:
    pieces = BytePairs(merges)
    bos, eos = pieces.size - 2, pieces.size - 1
    settings = {"tokenizer_class": "CLIPTokenizer"} | {f"{kind}_token": EOS for kind in ("eos", "unk", "pad")}
    return Tokenizer(pieces=pieces, clean="lower", prefix=(bos,), suffix=(eos,), bos_id=bos, eos_id=eos,
                     pad_id=eos if pad_id is None else pad_id, settings=settings | {"bos_token": BOS})


def load_tokenizer(folder: str | os.PathLike[str], config: Mapping[str, Any] | None = None) -> Tokenizer | None:
    """The tokenizer of a checkpoint's directory, or None where it has none; `config` is the content of its config.json
    where that was read before.

    It comes from open_clip_config.json (where it means CLIP's own), tokenizer.json, vocab.json with merges.txt, or a
    sentencepiece model, and tokenizer_config.json. Raises InputError that names a file which is broken.
    """
    with _reading(Path(folder)):
        return _load(Path(folder), config)


def _load(folder: Path, config: Mapping[str, Any] | None) -> Tokenizer | None:
    settings = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
    if (template := folder / "chat_template.jinja").is_file():  # where transformers 5 writes it
        settings["chat_template"] = template.read_text("utf-8")
    if (folder / "open_clip_config.json").is_file():
        text = _json(folder / "open_clip_config.json").get("model_cfg", {}).get("text_cfg", {})
        if not text.get("hf_tokenizer_name"):
            return clip_tokenizer() if text.get("vocab_size", CLIP_VOCABULARY) >= CLIP_VOCABULARY else None
        settings.setdefault("clean", text.get("tokenizer_kwargs", {}).get("clean", "whitespace"))
    if settings.get("do_lower_case", True) and (cleaning := _siglip_cleaning(folder, settings, config)):
        settings.setdefault("clean", cleaning)
    pieces = _pieces(folder, settings)
    if pieces is None:
        return None
    bos, eos, pad = (_special(pieces, settings, name) for name in ("bos", "eos", "pad"))
    prefix, suffix = _surround(folder, pieces, settings, bos, eos)
    bos = prefix[0] if bos is None and prefix else bos
    eos = suffix[-1] if eos is None and suffix else eos
    padding = next(i for i in (settings.get("pad_id"), pad, eos, 0) if i is not None)
    return Tokenizer(pieces=pieces, clean=settings.get("clean", "none"), prefix=prefix, suffix=suffix,
                     bos_id=bos, eos_id=eos, pad_id=padding, settings=settings)


def _siglip_cleaning(folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any] | None) -> str | None:
    """SigLIP's texts are bare of punctuation, those of SigLIP 2 only lower-cased, also where its files name Gemma's
    tokenizer, which does not do that."""
    kind = settings.get("tokenizer_class", "").removesuffix("Fast")
    if kind == "GemmaTokenizer":
        config = _json(folder / "config.json") if config is None else config
        return "lowercase" if config.get("model_type") in ("siglip", "siglip2") else None
    return {"SiglipTokenizer": "bare", "Siglip2Tokenizer": "lowercase"}.get(kind)


def _pieces(folder: Path, settings: Mapping[str, Any]) -> Pieces | None:
    whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if whole.is_file():
        with _reading(whole):
            return _tokenizers_file(whole.read_text("utf-8"), settings)
    if vocabulary.is_file() and merges.is_file():
        with _reading(merges):
            return _vocabulary_and_merges(_json(vocabulary), merges.read_text("utf-8"), settings)
    for path in (folder / "spiece.model", folder / "tokenizer.model", *sorted(folder.glob("*.model"))):
        if path.is_file():
            with _reading(path):
                return SentencePiece(path.read_bytes(), path.name)
    return None


def _tokenizers_file(text: str, settings: Mapping[str, Any]) -> Pieces:
    from tokenizers import Tokenizer as Stored

    model = json.loads(text)["model"]
    if model.get("end_of_word_suffix") == "</w>" and settings.get("clean", "none") != "none":  # written by `save`
        pieces = BytePairs([tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]])
        if {**pieces.vocabulary(), BOS: pieces.size - 2, EOS: pieces.size - 1} == model["vocab"]:
            return pieces
    return TokenizersFile(Stored.from_str(text))


def _vocabulary_and_merges(vocabulary: dict[str, int], merges: str, settings: Mapping[str, Any]) -> TokenizersFile:
    lines = [line for line in merges.split("\n") if line.strip() and not line.startswith("#version")]
    pairs = [tuple(line.split()) for line in lines]
    if any(token.endswith("</w>") for token in vocabulary):
        return TokenizersFile(clip_pipeline(vocabulary, pairs))
    tokenizer = byte_level_pipeline(vocabulary, pairs)
    names = {_name(settings.get(f"{kind}_token")) for kind in ("bos", "eos", "unk", "pad")} - {None}
    tokenizer.add_special_tokens(sorted(names))
    return TokenizersFile(tokenizer)


def _surround(folder: Path, pieces: Pieces, settings: Mapping[str, Any], bos: int | None, eos: int | None
              ) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ids before and after a text: as the configuration says, else the file's own, else its class's custom.
    """
    starts, ends = settings.get("add_bos_token"), settings.get("add_eos_token")
    if starts is None and ends is None:
        if isinstance(pieces, TokenizersFile):
            return pieces.surround()
        if isinstance(pieces, BytePairs):
            return (bos,), (eos,)
        kind = settings.get("tokenizer_class", "").removesuffix("Fast").removesuffix("Tokenizer")
        if kind and kind not in SURROUNDED:
            raise InputError(f"{folder}: {kind}Tokenizer over a sentencepiece model is not known, only "
                             f"{', '.join(SURROUNDED)}; its tokenizer.json would do as well")
        starts, ends = SURROUNDED.get(kind, (False, False))
    return ((bos,) if starts and bos is not None else ()), ((eos,) if ends and eos is not None else ())


def _special(pieces: Pieces, settings: Mapping[str, Any], kind: str) -> int | None:
    name = _name(settings.get(f"{kind}_token"))
    if name is not None:
        return pieces.token_id(name)
    return pieces.control_ids()[kind] if isinstance(pieces, SentencePiece) else None


def _name(token: str | Mapping[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, Mapping) else token


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with _reading(path):
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        return found


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns any error of a parser into one sentence that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(f"{path}: not a readable tokenizer file ({error})") from None
