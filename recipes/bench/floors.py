"""What EmojiCross scores without a neural network.

pixel-kNN (S1): the nearest training picture at 24 x 24 pixels, mean-subtracted cosine, names the concept.
ridge (S2, S3): pixels -> TF-IDF of name and tags in closed form, both centred; a name is its own TF-IDF, the score a
cosine. The best of three penalties is picked on the test split itself, for each number: an optimistic floor.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..common.metrics import recall, retrieval
from ..data.emojicross import TRAIN_STYLES, EmojiSet

SIDE = 24  # pixels
PENALTIES = (1.0, 10.0, 30.0)
TEST_SPLITS = ("S1", "S2", "S3")


def pixel_features(images: np.ndarray, side: int = SIDE) -> np.ndarray:
    """(n, h, w, 3) uint8 -> (n, side * side * 3) unit rows, each picture's mean subtracted."""
    small = [np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX)) for image in images]
    flat = np.stack(small).reshape(len(small), -1).astype(np.float32) / 255
    return _unit(flat - flat.mean(axis=1, keepdims=True))


def _unit(x: np.ndarray) -> np.ndarray:
    """Rows of length one; a row of zeros stays."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class TfIdf:
    """Unit TF-IDF rows over the words of the texts it was built from; unknown words are dropped."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = Counter(word for text in texts for word in set(_words(text)))
        self.column = {word: i for i, word in enumerate(sorted(counts))}
        self.idf = np.array([np.log((1 + len(texts)) / (1 + counts[word])) + 1 for word in self.column])

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Texts (n) -> (n, V)."""
        rows = np.zeros((len(texts), len(self.column)), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in _words(text):
                if word in self.column:
                    row[self.column[word]] += 1
        return _unit(rows * self.idf)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def knn_floor(data: EmojiSet) -> dict[str, float]:
    """Recall of pixel-kNN on S1: a concept's score is that of its nearest training picture."""
    images, _, concept = data.train_pairs()
    test = data.test_queries("S1")
    scores = pixel_features(test.images) @ pixel_features(images).T
    concepts = np.unique(concept)
    by_concept = np.stack([scores[:, concept == i].max(axis=1) for i in concepts], axis=1)
    return recall(by_concept, test.concept.tolist(), concepts.tolist())


def ridge_floor(
    data: EmojiSet, penalties: Sequence[float] = PENALTIES, side: int = SIDE
) -> dict[str, dict[str, dict[str, float]]]:
    """Recall of ridge regression on S2 and S3: {"S2": {"i2t": {"R@1": ...}, "t2i": ...}, "S3": ...}."""
    images, captions, _ = data.train_pairs()
    texts = [" ".join(words) for words in captions]
    tfidf = TfIdf(texts)
    x, y = pixel_features(images, side), tfidf(texts)
    centre = x.mean(axis=0)
    values, vectors = np.linalg.eigh((x - centre).T @ (x - centre))
    cross = vectors.T @ ((x - centre).T @ (y - y.mean(axis=0)))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for split in ("S2", "S3"):
        test = data.test_queries(split)
        seen = (pixel_features(test.images, side) - centre) @ vectors
        predicted = [(seen / (values + penalty)) @ cross for penalty in penalties]
        tries = [retrieval(image, tfidf(test.names), test.names, test.names) for image in predicted]
        found[split] = {way: {k: max(t[way][k] for t in tries) for k in tries[0][way]} for way in ("i2t", "t2i")}
    return found


def floors(data: EmojiSet) -> dict[str, dict[str, dict[str, float]]]:
    """All floors: pixel-kNN as S1's "i2t", ridge for S2 and S3 both ways."""
    return {"S1": {"i2t": knn_floor(data)}, **ridge_floor(data)}


def near_identical(data: EmojiSet, cosine: float = 0.99) -> dict[str, int]:
    """How many test pictures of each split have a twin, a training style's picture of the same concept that is all
    but equal (cosine at 24 x 24 pixels)."""
    count = {}
    for split in TEST_SPLITS:
        features = pixel_features(data.test_queries(split).images)
        twins = [pixel_features(data.images[data.rows(split, (style,))]) for style in TRAIN_STYLES]
        count[split] = int(((features * np.stack(twins)).sum(axis=2).max(axis=0) > cosine).sum())
    return count
