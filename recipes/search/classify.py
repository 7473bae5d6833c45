"""`mm classify`: sorts a folder of pictures by labels that were never trained on, or by those of a classifier."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jsonargparse.typing import PositiveInt

from mm.errors import InputError

from ..common.command import argument
from ..common.files import Walk, batches, read_ahead, read_bytes
from ..common.options import choose_device
from ..common.progress import Bar
from .embed import MODEL, Embedder
from .pictures import decode, walk

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Sort a folder of pictures by labels: zero-shot by a CLIP, or by a model that was trained on classes.

    Args:
        folder: pictures, searched with the sub-folders.
        labels: a file with one label per line; none takes those of a trained `model`.
        model: a shipped model, a directory or a hub name; none is a large CLIP of LAION.
        templates: a named set of prompts, or one such as 'a photo of a {}'.
        top: labels per picture.
        batch: pictures per forward pass.
        json: print JSON.
        device: where the model runs, such as cpu or cuda:0; none is a GPU if there is one.
    """

    folder: str = argument()
    labels: str | None = None
    model: str | None = None
    templates: str = "photo"
    top: PositiveInt = 1
    batch: PositiveInt = 32
    json: bool = False
    device: str | None = None

    def run(self) -> None:
        found = walk(self.folder)
        if not found.files:
            raise InputError(f"{self.folder} holds no pictures")
        judge = (zero_shot if self.labels else trained)(self)
        sorter, labels = Sorter(judge), judge.labels
        rows, top = sorter.sort(found, self.batch), min(self.top, len(labels))
        if self.json:
            print(json.dumps(as_json(rows, labels, top, sorter.skipped, judge.name), indent=2, ensure_ascii=False))
        else:
            print("\n".join(line(path, row, labels, top) for path, row in rows.items()))
        print(f"classified {len(rows)}, skipped {sorter.skipped} (bad)", file=sys.stderr if self.json else sys.stdout)


def read_labels(file: str) -> list[str]:
    """One label per line, as it stands; blank lines are left out with a note. Raises InputError for repeated ones."""
    try:
        lines = read_bytes(Path(file).expanduser()).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text (byte {error.start})") from None
    numbers: dict[str, int] = {}
    for number, label in enumerate(map(str.strip, lines), 1):
        if label in numbers:
            raise InputError(f"{file}: line {number} repeats the label {label!r} of line {numbers[label]}")
        if label:
            numbers[label] = number
    if not numbers:
        raise InputError(f"{file} holds no label; expected one per line")
    if blank := len(lines) - len(numbers):
        print(f"{file}: left out {blank} blank line{'s' if blank > 1 else ''}", file=sys.stderr)
    return list(numbers)


def choose_templates(name: str) -> Sequence[str]:
    """A named set, or the one template given. Raises InputError that lists the names."""
    from ...encoders.zeroshot import TEMPLATES

    if "{}" in name:
        return (name,)
    if name not in TEMPLATES:
        raise InputError(f"--templates {name!r}: expected {', '.join(TEMPLATES)}, or a prompt with {{}} for the label")
    return TEMPLATES[name]


@dataclass(frozen=True)
class Judge:
    """What gives pictures (each (3, h, w), as `preprocess` makes them) the probabilities (B, labels)."""

    name: str
    labels: list[str]
    preprocess: Callable[[Any], Tensor]
    shares: Callable[[list[Tensor]], np.ndarray]


def zero_shot(args: Classify) -> Judge:
    """A CLIP and the labels of a file."""
    labels, templates = read_labels(args.labels), choose_templates(args.templates)
    import torch

    from ...encoders import zeroshot

    embedder = Embedder.load(args.model or MODEL, args.device)
    classifier = zeroshot.zeroshot_classifier(embedder.clip, labels, templates).cpu()
    scale = embedder.clip.logit_scale.detach().cpu()

    def shares(pictures: list[Tensor]) -> np.ndarray:
        return zeroshot.classify(torch.from_numpy(embedder.images(pictures)), classifier, scale).numpy()

    return Judge(embedder.name, labels, embedder.clip.preprocess, shares)


def trained(args: Classify) -> Judge:
    """A ViT that was trained on classes. Raises InputError for any other model."""
    if not args.model:
        raise InputError("--labels FILE is needed, or a --model that was trained on classes")
    import torch

    from mm.checkpoint.pretrained import load

    from ...encoders.vision.vit import ViT

    device = choose_device(args.device)
    vit = load(args.model, torch.float32, device, kinds=("clip", "vit"))
    if not isinstance(vit, ViT) or not vit.labels:
        raise InputError(f"{args.model} has no classes of its own: --labels FILE is needed")

    def shares(pictures: list[Tensor]) -> np.ndarray:
        with torch.inference_mode():
            return vit.encode(vit.collate(pictures).to(device)).float().softmax(-1).cpu().numpy()

    return Judge(str(args.model), list(vit.labels), vit.preprocess, shares)


class Sorter:
    """Probabilities of labels for pictures; what cannot be read is reported and counted."""

    def __init__(self, judge: Judge) -> None:
        self.judge, self.skipped = judge, 0

    def sort(self, found: Walk, batch: int) -> dict[str, np.ndarray]:
        """The probabilities (labels,) of every readable picture, by path."""
        rows: dict[str, np.ndarray] = {}
        with Bar("classifying", len(found.files)) as bar:
            for path, reason in found.unreadable.items():
                self.skip(bar, f"{path}: {reason}")
            read = partial(_read, root=found.root, preprocess=self.judge.preprocess)
            for files in batches(read_ahead([picture.path for picture in found.files], read), batch):
                rows |= self.probabilities(files, bar)
                bar.step(len(files))
        return rows

    def probabilities(self, files: list[tuple[str, Tensor | InputError]], bar: Bar) -> dict[str, np.ndarray]:
        good = {path: pixels for path, pixels in files if not isinstance(pixels, InputError)}
        for path, error in files:
            if path not in good:
                self.skip(bar, str(error))
        if not good:
            return {}
        rows = self.judge.shares(list(good.values()))
        for path in (path for path, row in zip(good, rows, strict=True) if np.isnan(row).any()):
            self.skip(bar, f"{path}: the model gave no finite vector")
        return {path: row for path, row in zip(good, rows, strict=True) if not np.isnan(row).any()}

    def skip(self, bar: Bar, reason: str) -> None:
        bar.say(f"skipped {reason}")
        self.skipped += 1


def _read(path: str, *, root: Path, preprocess: Callable[[Any], Tensor]) -> Tensor:
    return preprocess(decode(read_bytes(root / path), path))


def best(row: np.ndarray, labels: list[str], top: int) -> list[tuple[str, float]]:
    """The `top` most probable labels, best first."""
    return [(labels[i], float(row[i])) for i in np.argsort(-row, kind="stable")[:top]]


def line(path: str, row: np.ndarray, labels: list[str], top: int) -> str:
    """path, then label and probability, tab-separated."""
    return "\t".join([path, *(f"{label}\t{share:.3f}" for label, share in best(row, labels, top))])


def as_json(
    rows: dict[str, np.ndarray], labels: list[str], top: int, skipped: int, model: str
) -> dict[str, Any]:
    pictures = [
        {"path": path, "labels": [{"label": name, "probability": share} for name, share in best(row, labels, top)]}
        for path, row in rows.items()
    ]
    return {"model": model, "labels": labels, "skipped": skipped, "pictures": pictures}
