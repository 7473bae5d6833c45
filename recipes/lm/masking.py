"""Masked language modelling (BERT, Devlin et al. 2019): some tokens are hidden, and predicted from both sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mm.errors import InputError
from mm.tokenizer.tokenizer import Tokenizer

from .batch import NONE, LmBatch
from .packing import Row

MASKED, RANDOM = 0.8, 0.1  # of the hidden tokens: become <mask>, become another token; the others stay


class Masked:
    """Of each row's tokens, special ones apart, a `share` is to be predicted: as in BERT most of them as <mask>, one in
    ten as a random token, one in ten as itself. Raises InputError for a tokenizer without a mask token."""

    extra = 0

    def __init__(self, tokenizer: Tokenizer, share: float) -> None:
        name = tokenizer.settings.get("mask_token")
        mask = tokenizer.pieces.token_id(name["content"] if isinstance(name, dict) else name) if name else None
        if mask is None:
            raise InputError("the tokenizer has no mask token, which a masked language model needs: "
                             "mm train tokenizer --mask true makes one")
        self.mask, self.share = mask, share
        self.special = np.array(sorted(tokenizer.special_ids | {mask}))
        self.words = np.setdiff1d(np.arange(tokenizer.vocab_size), self.special)

    def __call__(self, rows: Sequence[Row], randoms: Sequence[np.random.Generator]) -> LmBatch:
        ids, targets = zip(*map(self.hide, rows, randoms), strict=True)
        documents = np.stack([row.documents for row in rows])
        return LmBatch(*(torch.from_numpy(part) for part in (np.stack(ids), np.stack(targets), documents)))

    def hide(self, row: Row, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(T,) ids and targets."""
        usable = np.flatnonzero(row.learned & ~np.isin(row.ids, self.special))
        chosen = random.permutation(usable)[: max(round(len(usable) * self.share), min(len(usable), 1))]
        ids, targets, fate = row.ids.copy(), np.full_like(row.ids, NONE), random.random(len(chosen))
        targets[chosen] = ids[chosen]
        ids[chosen[fate < MASKED]] = self.mask
        other = chosen[(fate >= MASKED) & (fate < MASKED + RANDOM)]
        ids[other] = random.choice(self.words, len(other))
        return ids, targets
