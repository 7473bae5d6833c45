"""Evaluation of a CLIP: zero-shot accuracy on classes, and recall on pictures, sounds and captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from mm.errors import InputError

from ...encoders.clip import CLIP
from ...encoders.zeroshot import zeroshot_classifier
from ..common.files import batches, read_ahead
from ..common.metrics import recall, retrieval, unit
from ..data.pictures import Picture
from .pairs import Pair, Pairs, emojicross_tests, read_pairs


def open_source(path: str, templates: Sequence[str]) -> dict[str, Pairs]:
    """What to measure on, by split: the three of "emojicross", or one without a name of any source of pairs."""
    return emojicross_tests() if path == "emojicross" else {"": read_pairs(path, templates)}


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """("S1 i2t R@1", 12.5) for every measure."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name} ")
        else:
            yield prefix + name, value


@dataclass(kw_only=True)
class Meter:
    """Measures a model, in percent; `skipped` collects what was wrong with pictures that could not be read."""

    clip: CLIP
    templates: Sequence[str]
    batch: int = 64
    skipped: dict[str, str] = field(default_factory=dict)

    def __call__(self, source: dict[str, Pairs]) -> dict[str, Any]:
        """{"top-1", "top-5"} of classes, {"i2t": {"R@1", "R@5", "R@10"}, "t2i": ...} of pairs, by split if it has a
        name. Raises InputError when no picture can be read."""
        training = self.clip.training
        self.clip.eval()
        try:
            with torch.inference_mode():
                values = {split: self._classes(pairs) if pairs.classes else self._recall(pairs)
                          for split, pairs in source.items()}
        finally:
            self.clip.train(training)
        return values.get("", values)

    def _classes(self, pairs: Pairs) -> dict[str, float]:
        classes = zeroshot_classifier(self.clip, list(pairs.classes), self.templates).float().cpu()
        features, items = self.media("image", pairs)
        found = recall(unit(features) @ classes, [pair.group for pair in items], range(len(pairs.classes)), (1, 5))
        return {"top-1": found["R@1"], "top-5": found["R@5"]}

    def _recall(self, pairs: Pairs) -> dict[str, dict[str, float]]:
        """Both ways between every two of image, text and audio that items hold together."""
        values = {}
        for one, other in combinations(("image", "text", "audio"), 2):
            held = replace(pairs, items=[pair for pair in pairs.items if {one, other} <= {*pair.kinds}])
            if len(held):
                a, b, labels, others = self._features(one, other, held)
                there, back = retrieval(a, b, labels, others).values()
                values |= {f"{one[0]}2{other[0]}": there, f"{other[0]}2{one[0]}": back}
        return values

    def _features(self, one: str, other: str, pairs: Pairs) -> tuple[Tensor, Tensor, list[int], list[int]]:
        """Features of both kinds and the groups of their rows, of items that can be read."""
        found = {kind: self.media(kind, pairs) for kind in ("image", "audio") if kind in (one, other)}
        read = [{id(pair) for pair in items} for _, items in found.values()]
        whole = [pair for pair in pairs.items if all(id(pair) in known for known in read)]
        places = {id(pair) for pair in whole}
        features = {kind: rows[[id(pair) in places for pair in items]] for kind, (rows, items) in found.items()}
        labels = {kind: [pair.group for pair in whole] for kind in found}
        if "text" in (one, other):
            features["text"] = self.texts([text for pair in whole for text in pair.captions])
            labels["text"] = [pair.group for pair in whole for _ in pair.captions]
        return features[one], features[other], labels[one], labels[other]

    def media(self, kind: str, pairs: Pairs) -> tuple[Tensor, list[Pair]]:
        """Features (n, E) of the pictures ("image") or sounds ("audio") that can be read, and their items."""
        features, items = [], []
        encode = getattr(self.clip, f"encode_{kind}")
        for rows in batches(read_ahead(pairs.items, partial(self._read, kind)), self.batch):
            good = [(pair, x) for pair, x in rows if not isinstance(x, InputError)]
            bad = [(_file(kind, pair), error) for pair, error in rows if isinstance(error, InputError)]
            self.skipped |= {file.name: str(error) for file, error in bad}
            if good:
                inputs = torch.stack([x for _, x in good]).to(self.clip.logit_scale.device)
                features.append(encode(inputs).float().cpu())
                items += [pair for pair, _ in good]
        if not items:
            things = {"image": "pictures", "audio": "sounds"}[kind]
            raise InputError(f"{pairs.where}: none of {len(pairs)} {things} can be read, the last because "
                             f"{list(self.skipped.values())[-1]}")
        return torch.cat(features), items

    def _read(self, kind: str, pair: Pair) -> Tensor:
        file = _file(kind, pair)
        try:
            return self.clip.preprocess(file.open()) if kind == "image" else self.clip.spectrograms(file.open())[0]
        except OSError as error:
            raise InputError(f"{file.name}: {error.strerror or error}") from None

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features (n, E)."""
        parts = (self.clip.tokenize(texts[i : i + 256]) for i in range(0, len(texts), 256))
        return torch.cat([self.clip.encode_text(ids.to(self.clip.logit_scale.device)).float().cpu() for ids in parts])


def _file(kind: str, pair: Pair) -> Picture:
    return pair.picture if kind == "image" else pair.sound
