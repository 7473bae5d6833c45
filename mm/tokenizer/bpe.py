"""The three ways in which checkpoints cut text into pieces: CLIP's byte pairs, a `tokenizers` file, sentencepiece."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mm.errors import InputError

if TYPE_CHECKING:
    import tokenizers

BOS, EOS = "<|startoftext|>", "<|endoftext|>"  # as transformers' files name them
SPECIAL = ("<start_of_text>", "<end_of_text>")  # as open_clip names them
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CACHED_WORDS = 1 << 17


class Pieces(Protocol):
    """Cleaned text to ids and back. `plain` counts the entries without tokens that were added to the vocabulary."""

    size: int
    plain: int
    merges: list[tuple[str, str]]

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def token_id(self, token: str) -> int | None: ...
    def special_ids(self) -> set[int]: ...
    def save(self, folder: Path) -> None: ...


@lru_cache
def byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in GPT-2's and CLIP's vocabularies, in their order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class BytePairs:
    """CLIP's tokenizer for any list of merges: 256 bytes, 256 bytes that end a word, the merges, start and end of text.

    Words are split as open_clip's SimpleTokenizer does, and each distinct word is merged once.
    """

    def __init__(self, merges: Sequence[tuple[str, str]]) -> None:
        import regex
        from tokenizers.models import BPE

        letters = list(byte_alphabet().values())
        tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
        self.merges, self.tokens, self.size = list(merges), tokens, len(tokens) + 2
        self.plain = self.size
        self._split = regex.compile("|".join([*SPECIAL, WORDS]), regex.IGNORECASE)
        self._bytes = {letter: byte for byte, letter in byte_alphabet().items()}
        self._bpe = BPE(vocab=self.vocabulary(), merges=self.merges, end_of_word_suffix="</w>")
        self._known = self._specials()

    def _specials(self) -> dict[str, list[int]]:
        return {SPECIAL[0]: [self.size - 2], SPECIAL[1]: [self.size - 1]}

    def vocabulary(self) -> dict[str, int]:
        """Every token but the special two."""
        return {token: i for i, token in enumerate(self.tokens)}

    def words(self, text: str) -> list[str]:
        return self._split.findall(text)

    def __reduce__(self) -> tuple[Any, ...]:
        return BytePairs, (self.merges,)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in self.words(text):
            known = self._known.get(word)
            ids += self._learn(word) if known is None else known
        return ids

    def _learn(self, word: str) -> list[int]:
        if len(self._known) >= CACHED_WORDS:
            self._known = self._specials()
        alphabet = byte_alphabet()
        ids = [token.id for token in self._bpe.tokenize("".join(alphabet[byte] for byte in word.encode()))]
        self._known[word] = ids
        return ids

    def decode(self, ids: list[int]) -> str:
        letters = "".join(self.tokens[i] for i in ids)
        raw = bytes(self._bytes[letter] for letter in letters)
        return raw.decode(errors="replace").replace("</w>", " ").strip()

    def token_id(self, token: str) -> int | None:
        return {BOS: self.size - 2, EOS: self.size - 1}.get(token)

    def special_ids(self) -> set[int]:
        return {self.size - 2, self.size - 1}

    def save(self, folder: Path) -> None:
        special = {BOS: self.size - 2, EOS: self.size - 1}
        TokenizersFile(clip_pipeline(self.vocabulary() | special, self.merges)).save(folder)


class TokenizersFile:
    """A tokenizer of the `tokenizers` library, as its own file describes it."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer, self.size = tokenizer, tokenizer.get_vocab_size()
        self.plain = tokenizer.get_vocab_size(with_added_tokens=False)
        self._suffix = getattr(tokenizer.model, "end_of_word_suffix", None)

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        pairs = json.loads(self._tokenizer.to_str())["model"].get("merges", [])
        return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in pairs]

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the characters [a, b) of the text that each stands for."""
        row = self._tokenizer.encode(text, add_special_tokens=False)
        return row.ids, row.offsets

    def decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text.replace(self._suffix, " ").strip() if self._suffix else text

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def special_ids(self) -> set[int]:
        return {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}

    def surround(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the file's post-processor puts before and after a text."""
        row = self._tokenizer.encode("a")
        special = row.special_tokens_mask
        first = special.index(0) if 0 in special else len(special)
        last = len(special) - special[::-1].index(0) if 0 in special else len(special)
        return tuple(row.ids[:first]), tuple(row.ids[last:])

    def save(self, folder: Path) -> None:
        self._tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        if self._suffix:  # CLIP's older readers want these two
            self._tokenizer.model.save(str(folder))


class SentencePiece:
    """A sentencepiece model, raw: no start or end token, as its file describes it."""

    def __init__(self, model: bytes, name: str) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model)
        self._model, self.name, self.size, self.merges = model, name, self._processor.GetPieceSize(), []
        self.plain = self.size

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePiece, (self._model, self.name)

    def encode(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(text)

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the characters [a, b) of the text that each stands for."""
        pieces = self._processor.EncodeAsImmutableProto(text).pieces
        return [piece.id for piece in pieces], [(piece.begin, piece.end) for piece in pieces]

    def decode(self, ids: list[int]) -> str:
        return self._processor.DecodeIds(ids)

    def token_id(self, token: str) -> int | None:
        found = self._processor.PieceToId(token)
        return found if self._processor.IdToPiece(found) == token else None

    def special_ids(self) -> set[int]:
        return {i for i in range(self.size) if self._processor.IsControl(i)}

    def control_ids(self) -> dict[str, int | None]:
        """The model's own start, end and padding ids."""
        found = {"bos": self._processor.bos_id(), "eos": self._processor.eos_id(), "pad": self._processor.pad_id()}
        return {name: i if i >= 0 else None for name, i in found.items()}

    def save(self, folder: Path) -> None:
        (folder / self.name).write_bytes(self._model)


def clip_pipeline(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> tokenizers.Tokenizer:
    """The pipeline of transformers' CLIPTokenizer: no mending of unicode or HTML, otherwise as `BytePairs`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    missing = [name for name in (BOS, EOS) if name not in vocabulary]
    if missing:
        raise ValueError(f"the vocabulary lacks {missing[0]!r}")
    model = BPE(vocab=dict(vocabulary), merges=list(merges), end_of_word_suffix="</w>", continuing_subword_prefix="",
                unk_token=EOS, fuse_unk=False)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    escaped = [name.replace("|", r"\|") for name in (BOS, EOS)]
    split = pre_tokenizers.Split(Regex("|".join([*escaped, WORDS])), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        (EOS, vocabulary[EOS]), (BOS, vocabulary[BOS]), trim_offsets=False, add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    return tokenizer


def byte_level_pipeline(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> tokenizers.Tokenizer:
    """The pipeline of GPT-2's tokenizer."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE(vocab=dict(vocabulary), merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def scored_pipeline(tokens: Sequence[str], scores: Sequence[float], *, space: bool = True) -> tokenizers.Tokenizer:
    """Sentencepiece's byte pairs (Llama 2): of all neighbours that join to a token, the best scored join first. `space`
    puts one before the text; bytes outside the vocabulary are tokens such as `<0x0A>`."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    rank = {token: (-score, i) for i, (token, score) in enumerate(zip(tokens, scores, strict=True))}
    splits = [(token[:cut], token[cut:]) for token in tokens for cut in range(1, len(token))]
    merges = [pair for pair in splits if pair[0] in rank and pair[1] in rank]
    merges.sort(key=lambda pair: (rank["".join(pair)], rank[pair[0]][1], rank[pair[1]][1]))
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, unk_token="<unk>",
                              fuse_unk=True, byte_fallback=True))
    first = [normalizers.Prepend("▁")] if space else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return tokenizer


def start_with(tokenizer: tokenizers.Tokenizer, token: str, i: int) -> None:
    """Every text that is encoded with special tokens gets this one before it, in other libraries too."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, i)])


GPT4_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
              r"\s*[\r\n]+|\s+(?!\S)|\s+")


def split_pipeline(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], kind: str,
                   where: str) -> tokenizers.Tokenizer:
    """Byte-level pairs with the word splitting that a GGUF file names. Raises InputError for another name."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    words = {"llama-bpe": GPT4_WORDS, "qwen2": GPT4_WORDS.replace("{1,3}", "")}.get(kind)
    tokenizer = byte_level_pipeline(vocabulary, merges)
    if words is not None:
        plain = ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = Sequence([Split(Regex(words), "isolated"), plain])
    elif kind == "smollm":
        tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    elif kind not in ("default", "gpt-2"):
        raise InputError(f"{where}: the word splitting {kind} is not known, only llama-bpe, qwen2, smollm and gpt-2")
    return tokenizer
