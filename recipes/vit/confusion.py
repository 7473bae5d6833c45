"""Which classes a classifier takes for which, as a table, a picture and a list of the worst."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mm.checkpoint.files import replacing

NAMED = 100  # classes up to which the picture names them


def confusion(labels: Sequence[int], predicted: Sequence[int], classes: int) -> np.ndarray:
    """(C, C) counts: row the true class, column the predicted one."""
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (np.asarray(labels), np.asarray(predicted)), 1)
    return matrix


def most_confused(matrix: np.ndarray, names: Sequence[str], most: int = 10) -> list[dict[str, str | int]]:
    """The pairs of classes taken for each other most often: {"true", "predicted", "count", "of"}, worst first."""
    wrong = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [divmod(int(place), len(matrix)) for place in order]
    return [{"true": names[i], "predicted": names[j], "count": int(wrong[i, j]), "of": int(matrix[i].sum())}
            for i, j in pairs if wrong[i, j]]


def sentences(pairs: list[dict[str, str | int]]) -> list[str]:
    return [f"{pair['count']} of {pair['of']} {pair['true']!r} taken for {pair['predicted']!r}" for pair in pairs]


def write_table(matrix: np.ndarray, names: Sequence[str], to: Path) -> None:
    """CSV: a header of predicted classes, a row for each true one."""
    with replacing(to) as part, open(part, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["true \\ predicted", *names])
        rows.writerows([name, *row] for name, row in zip(names, matrix.tolist(), strict=True))


def draw(matrix: np.ndarray, names: Sequence[str], to: Path) -> None:
    """The share of each true class (row) that went to each predicted one (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(max(4.0, 0.16 * len(names)), 16.0)
    figure, axis = pyplot.subplots(figsize=(side + 2, side + 1), layout="constrained")
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    if len(names) <= NAMED:
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        axis.set_yticks(range(len(names)), names, fontsize=6)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    figure.colorbar(image, shrink=0.6, label="share of the true class")
    figure.savefig(to, dpi=110)
    pyplot.close(figure)
