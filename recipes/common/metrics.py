"""Recall at k, the one measure of retrieval and of zero-shot accuracy: several right targets, ties, any size; and the
word error rate of transcripts."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.errors import InputError

ROWS = 1024  # queries scored at a time


def recall(scores: Any, query: Sequence[Hashable], target: Sequence[Hashable], ks: Sequence[int] = (1, 5, 10)
           ) -> dict[str, float]:
    """The percentage of queries that find a right target among their k best: {"R@1": ..., "R@5": ...}.

    scores (Q, N), tensor or array; a target is right when its label equals the query's, and one is enough. A tie
    counts by its expectation over random orders of the tied wrong targets and one right one.
    Raises InputError when the shapes differ, a score is not finite or a query has no right target.
    """
    scores = torch.as_tensor(scores)
    if tuple(scores.shape) != (len(query), len(target)) or not len(query):
        raise InputError(f"recall needs a query and scores of shape ({len(query)}, {len(target)}), "
                         f"not {tuple(scores.shape)}")
    return _recall(iter(scores.split(ROWS)), *_numbered(query, target), ks)


def retrieval(images: Any, texts: Any, image_labels: Sequence[Hashable], text_labels: Sequence[Hashable],
              ks: Sequence[int] = (1, 5, 10)) -> dict[str, dict[str, float]]:
    """Recall by cosine from image to text ("i2t") and from text to image ("t2i") of features (n, E) and (m, E)."""
    images, texts = unit(images), unit(texts)
    for name, features, labels in (("image", images, image_labels), ("text", texts, text_labels)):
        if len(features) != len(labels) or not len(labels):
            raise InputError(f"retrieval needs one label for each {name}, not {len(labels)} for {len(features)}")
    i, t = _numbered(image_labels, text_labels)
    return {"i2t": _recall((rows @ texts.T for rows in images.split(ROWS)), i, t, ks),
            "t2i": _recall((rows @ images.T for rows in texts.split(ROWS)), t, i, ks)}


def unit(features: Any) -> Tensor:
    """Rows of length one in float32; a row of zeros stays."""
    return F.normalize(torch.as_tensor(features).float().cpu(), dim=-1)


def _numbered(query: Sequence[Hashable], target: Sequence[Hashable]) -> tuple[Tensor, Tensor]:
    """Labels as integers. Raises InputError for a query without a right target."""
    known = {label: i for i, label in enumerate(dict.fromkeys(target))}
    if lost := [label for label in query if label not in known]:
        raise InputError(f"recall found no target for {len(lost)} queries; the first is {lost[0]!r}")
    return torch.tensor([known[label] for label in query]), torch.tensor([known[label] for label in target])


def _recall(chunks: Iterator[Tensor], query: Tensor, target: Tensor, ks: Sequence[int]) -> dict[str, float]:
    k = torch.tensor(ks, dtype=torch.float64)
    hits, done = torch.zeros(len(ks), dtype=torch.float64), 0
    for scores in chunks:
        if not bool(torch.isfinite(scores).all()):
            raise InputError("recall got scores that are not finite")
        right = query[done : done + len(scores), None] == target
        best = scores.where(right, -torch.inf).amax(dim=1, keepdim=True)
        above = (~right & (scores > best)).sum(dim=1, keepdim=True)
        tied = (~right & (scores == best)).sum(dim=1, keepdim=True)
        hits += ((k - above) / (tied + 1)).clamp(0, 1).sum(dim=0)
        done += len(scores)
    return {f"R@{k}": 100 * hit / len(query) for k, hit in zip(ks, hits.tolist(), strict=True)}


def word_error_rate(heard: Sequence[str], said: Sequence[str]) -> float:
    """Percent of the words in `said` that are wrong, absent or too many in `heard`, over all pairs; case and
    punctuation do not count. Raises InputError for unequal numbers of texts or when nothing was said."""
    if len(heard) != len(said):
        raise InputError(f"word_error_rate got {len(heard)} transcripts of {len(said)} texts")
    pairs = [(spoken(a), spoken(b)) for a, b in zip(heard, said, strict=True)]
    if not (total := sum(len(b) for _, b in pairs)):
        raise InputError("word_error_rate needs texts with words")
    return 100 * sum(edits(a, b) for a, b in pairs) / total


def spoken(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return re.sub(r"[^\w\s']", " ", text.lower().replace("\u2019", "'")).split()


def edits(a: Sequence[str], b: Sequence[str]) -> int:
    """How many insertions, deletions and replacements make b of a (Levenshtein, 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]
