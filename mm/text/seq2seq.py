"""The encoder-decoder: an encoder reads a text from both sides, a decoder answers it (Vaswani et al., 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Unpack

import torch
from torch import Tensor, nn

from mm import spec
from mm.checkpoint.pretrained import Pretrained
from mm.decode.generation import GenerateOptions, Output, generate
from mm.decode.requests import Prompts, check_prompt, prompt_ids
from mm.decode.sampling import GREEDY, Sampling
from mm.errors import InputError
from mm.nn.embed import Embedding
from mm.nn.memory import Memory
from mm.nn.transformer import Transformer
from mm.positions.visibility import At
from mm.text.decoder import TextDecoder
from mm.text.encoder import where
from mm.text.families import FAMILIES
from mm.tokenizer.tokenizer import Tokenizer


class Seq2Seq(Pretrained):
    """ids (B, S) to read, target (B, T) so far -> logits (B, T, V)."""

    kind, families = "seq2seq", FAMILIES

    def __init__(self, settings: spec.Seq2SeqSpec):
        super().__init__()
        self.spec = settings
        self.encoder = Encoder(settings.encoder)
        self.decoder = TextDecoder(settings.decoder)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.decoder.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        self.decoder.tokenizer = tokenizer

    def forward(self, ids: Tensor, target: Tensor, mask: Tensor | None = None, target_mask: Tensor | None = None
                ) -> Tensor:
        """mask, target_mask: bool, False for padding on either side. Raises InputError on wrong shapes."""
        return self.decoder(target, mask=target_mask, memory=self.remember(ids, mask))

    def encode(self, ids: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """ids (B, S) -> (B, S, D). documents: (B, S) ids of packed documents, -1 for padding, which do not see each
        other. Raises InputError on wrong shapes and for more tokens than positions."""
        self.check(ids, mask)
        return self.encoder(self.decoder.embed.look_up(ids), where(ids, mask, documents))

    def remember(self, ids: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> Memory:
        """Encode a text and project it to the keys and values of every decoder layer: `memory` of `decoder.hidden`, for
        many steps. An answer reads the source of its own document."""
        return self.decoder.stack.remember(self.encode(ids, mask, documents), where(ids, mask, documents))

    @torch.no_grad()
    def generate(self, texts: Prompts, sampling: Sampling | Sequence[Sampling] = GREEDY,
                 **options: Unpack[GenerateOptions]) -> list[Output]:
        """Answer each text or row of ids: see `mm.decode.generate` for the options. A text gets the tokens that its
        tokenizer puts around it. Raises InputError for texts that do not fit the model."""
        rows = prompt_ids(self.decoder, texts, whole=True)
        table = self.spec.encoder.embed.positions
        for row in rows:
            check_prompt(row, table.rows if table else len(row), self.spec.encoder.embed.vocab)
        device = self.decoder.embed.tokens.weight.device
        memories = [partial(self.remember, torch.tensor([row], device=device)) for row in rows]
        return generate(self.decoder, [list(self.spec.start)] * len(rows), sampling, eos=(self.spec.end,),
                        memories=memories, remembered=max(map(len, rows)), **options)

    def check_files(self, where: str) -> None:
        vocab = self.spec.decoder.embed.vocab
        if self.tokenizer is not None and self.tokenizer.vocab_size > vocab:
            raise InputError(f"{where}: the tokenizer has {self.tokenizer.vocab_size} entries, the embedding only "
                             f"{vocab}")

    def check(self, ids: Tensor, mask: Tensor | None) -> None:
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(f"ids should be integers (B, S), not {ids.dtype} {tuple(ids.shape)}")
        if mask is not None and mask.shape != ids.shape:
            raise InputError(f"mask {tuple(mask.shape)} does not fit ids {tuple(ids.shape)}")
        table = self.spec.encoder.embed.positions
        if table is not None and ids.shape[1] > table.rows:
            raise InputError(f"{ids.shape[1]} tokens are more than the {table.rows} positions of this encoder")


class Encoder(nn.Module):
    """embeddings (B, S, D) of tokens, and where they are -> (B, S, D)."""

    def __init__(self, settings: spec.EncoderSpec):
        super().__init__()
        self.embed = Embedding(settings.stack.dim, settings.embed, shared=True)
        self.stack = Transformer(settings.stack)

    def forward(self, embeddings: Tensor, at: At) -> Tensor:
        return self.stack(self.embed(None, at, embeddings), at)
