"""Byte-level BPE tokenizers trained on a corpus: `mm train tokenizer`, and for models that have none yet."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from mm.errors import InputError
from mm.tokenizer.bpe import TokenizersFile, byte_alphabet, split_pipeline
from mm.tokenizer.tokenizer import Tokenizer

from ..data.corpus import Corpus, Document, open_corpus
from .settings import TokenizerJob
from .token_file import watched

FILES = {"tokenizer.json", "tokenizer_config.json"}
PAD, BOS, EOS, MASK, SENTINEL = "<pad>", "<s>", "</s>", "<mask>", "<extra_id_{}>"
TURN, TURN_END = "<|im_start|>", "<|im_end|>"
CHAT = ("{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
SPLIT = "smollm"  # words as GPT-2 splits them, and every digit alone
SAMPLE = 1000  # documents by which the bytes of a token are measured


def fit(job: TokenizerJob) -> None:
    """Trains and writes to `job.out`."""
    out = Path(job.out)
    if out.exists() and (not out.is_dir() or {file.name for file in out.iterdir()} - FILES):
        raise InputError(f"{out} exists and holds other things than a tokenizer: choose another --out")
    corpus = open_corpus(job.data.path, job.data.split)
    tokenizer = train_tokenizer(corpus, job.vocab, chat=job.chat, mask=job.mask, sentinels=job.sentinels)
    told = corpus.account.sentences()
    tokenizer.save(out)
    print("\n".join([*told, f"wrote {out}: {tokenizer.vocab_size} entries, {bytes_per_token(tokenizer, corpus):.2f} "
                     "bytes of the corpus a token"]), file=sys.stderr)


def train_tokenizer(corpus: Corpus, vocab: int, *, chat: bool | None = None, mask: bool = False, sentinels: int = 0
                    ) -> Tokenizer:
    """At most `vocab` entries: special tokens, bytes, merges; the same corpus gives the same ones. Texts begin with
    <s>; `chat` None adds chat tokens where there are conversations. Raises InputError for too small a `vocab`."""
    seen: set[bool] = set()
    merges = learned_merges(texts(corpus, seen), vocab) if vocab > 256 else []
    chat = True in seen if chat is None else chat
    eos = TURN_END if chat else EOS
    special = [PAD, BOS, eos, *([TURN] if chat else []), *([MASK] if mask else []),
               *(SENTINEL.format(i) for i in range(sentinels))]
    tokens = [*special, *byte_alphabet().values()]
    if vocab <= len(tokens):
        raise InputError(f"vocab is {vocab}: bytes and special tokens alone take {len(tokens)}")
    merges = merges[: vocab - len(tokens)]
    if not merges:
        raise InputError(f"{corpus.where} holds no word of two letters to learn from")
    return assembled([*tokens, *dict.fromkeys(a + b for a, b in merges)], merges, special, eos, chat)


def learned_merges(words: Iterable[str], vocab: int) -> list[tuple[str, str]]:
    """The merges of a vocabulary of bytes and merges, the most frequent ones first."""
    from tokenizers import Tokenizer as Trained
    from tokenizers import models, trainers

    trained = Trained(models.BPE())
    trained.pre_tokenizer = split_pipeline({}, [], SPLIT, "").pre_tokenizer
    trained.train_from_iterator(words, trainers.BpeTrainer(  # as special tokens, bytes get fixed ids: ties break alike
        vocab_size=vocab, special_tokens=list(byte_alphabet().values()), show_progress=False))
    return TokenizersFile(trained).merges


def assembled(tokens: list[str], merges: list[tuple[str, str]], special: list[str], eos: str, chat: bool) -> Tokenizer:
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    whole = split_pipeline({token: i for i, token in enumerate(tokens)}, merges, SPLIT, "")
    whole.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bos = tokens.index(BOS)
    whole.post_processor = TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B",
                                              special_tokens=[(BOS, bos)])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": eos, "pad_token": PAD,
                "clean_up_tokenization_spaces": False}
    settings |= {"mask_token": MASK} if MASK in special else {}
    settings |= {"chat_template": CHAT} if chat else {}
    return Tokenizer(pieces=TokenizersFile(whole), prefix=(bos,), bos_id=bos, eos_id=tokens.index(eos),
                     pad_id=tokens.index(PAD), settings=settings)


def texts(corpus: Corpus, seen: set[bool]) -> Iterator[str]:
    """All that is written in a corpus, under a progress bar; `seen` gets whether a document is a conversation."""
    for document in watched(f"words of {corpus.where}", corpus, corpus):
        seen.add(bool(document.messages))
        yield from written(document)


def written(document: Document) -> list[str]:
    return [message["content"] for message in document.messages] or [document.text]


def bytes_per_token(tokenizer: Tokenizer, corpus: Corpus) -> float:
    """Of the first documents."""
    said = [text for document in islice(corpus, SAMPLE) for text in written(document)]
    return sum(len(text.encode()) for text in said) / max(sum(len(tokenizer.encode(text)) for text in said), 1)
