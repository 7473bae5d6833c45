"""What EmojiCross scores without a neural network,.

pixel-kNN (S1): the nearest training picture at 24 x 24 pixels, mean-subtracted cosine, names the concept.
ridge (S2, S3): pixels -> TF-IDF of name and tags in closed form; a name is its own TF-IDF, the score a cosine. The
best of three penalties is picked on the test split itself, per direction: an optimistic floor.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..data.emojicross import TRAIN_STYLES, EmojiSet
from ..metrics import recall, retrieval

KNN_SIDE = 24  # pixels
PENALTIES = (1.0, 10.0, 30.0)
TEST_SPLITS = ("S1", "S2", "S3")


def pixel_features(images: np.ndarray, side: int = KNN_SIDE) -> np.ndarray:
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


def ridge_floor(data: EmojiSet, penalties: Sequence[float] = PENALTIES) -> dict[str, dict[str, dict[str, float]]]:
    """Recall of ridge regression on S2 and S3: {"S2": {"i2t": {"R@1": ...}, "t2i": ...}, "S3": ...}."""
    images, captions, _ = data.train_pairs()
    texts = [" ".join(words) for words in captions]
    tfidf = TfIdf(texts)
    x, y = pixel_features(images), tfidf(texts)
    centre, offset = x.mean(axis=0), y.mean(axis=0)
    values, vectors = np.linalg.eigh((x - centre).T @ (x - centre))
    cross = vectors.T @ ((x - centre).T @ (y - offset))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for split in ("S2", "S3"):
        test = data.test_queries(split)
        seen = (pixel_features(test.images) - centre) @ vectors
        predicted = [(seen / (values + penalty)) @ cross + offset for penalty in penalties]
        tries = [retrieval(image, tfidf(test.names), test.names, test.names) for image in predicted]
        found[split] = {way: max((t[way] for t in tries), key=lambda r: r["R@1"]) for way in ("i2t", "t2i")}
    return found


def floors(data: EmojiSet) -> dict[str, dict[str, dict[str, float]]]:
    """All floors: pixel-kNN as S1's "i2t", ridge for S2 and S3 both ways."""
    return {"S1": {"i2t": knn_floor(data)}, **ridge_floor(data)}


def near_identical(data: EmojiSet, cosine: float = 0.99) -> int:
    """How many test concepts have a training-style picture all but equal to the test style's (24 x 24 cosine)."""
    count = 0
    for split in TEST_SPLITS:
        test = data.test_queries(split)
        features, near = pixel_features(test.images), np.zeros(len(test.names), dtype=bool)
        for style in TRAIN_STYLES:
            twin = pixel_features(data.images[data.rows(split, (style,))])
            near |= (features * twin).sum(axis=1) > cosine
        count += int(near.sum())
    return count
