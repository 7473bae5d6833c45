"""What can be set about training a tokenizer, as plain dataclasses that import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from .data_settings import CorpusData


@dataclass(frozen=True, kw_only=True)
class TokenizerJob:
    """Train a byte-level BPE tokenizer on a corpus.

    Args:
        out: the directory for tokenizer.json and tokenizer_config.json, which transformers opens too.
        vocab: entries, with the 256 bytes and the special tokens.
        chat: add a chat template and its tokens (none: if the corpus holds conversations).
        mask: add <mask>, for masked language models.
        sentinels: how many <extra_id_0>, <extra_id_1>, ... to add, for span corruption.
    """

    data: CorpusData
    out: str = "tokenizer"
    vocab: int = 4096
    chat: bool | None = None
    mask: bool = False
    sentinels: int = 0
