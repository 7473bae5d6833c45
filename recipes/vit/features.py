"""Pictures as a classifier is evaluated on them, and their features under a frozen backbone, computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mm.checkpoint.files import replacing
from mm.errors import InputError

from ...encoders.vision.vit import ViT
from ..common.files import batches, read_ahead
from ..common.progress import Bar
from ..data.pictures import Picture
from .labelled import Labelled

BATCH = 64  # pictures per forward pass
Skipped = dict[str, str]  # what was wrong with a picture, by its name


def read_pictures(source: Labelled, vit: ViT, skipped: Skipped, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """(pixels (B, 3, h, w), classes (B,)) of the pictures that can be read. Raises InputError when none can."""

    def read(item: tuple[Picture, int]) -> Tensor:
        try:
            return vit.preprocess(item[0].open())
        except OSError as error:
            raise InputError(f"{item[0].name}: {error.strerror or error}") from None

    count, problems = 0, Skipped()
    for rows in batches(read_ahead(zip(source.pictures, source.labels, strict=True), read), size):
        good = [(pixels, label) for (_, label), pixels in rows if not isinstance(pixels, InputError)]
        problems |= {item[0].name: str(error) for item, error in rows if isinstance(error, InputError)}
        count += len(good)
        if good:
            pixels, labels = zip(*good, strict=True)
            yield vit.collate(pixels), torch.tensor(labels)
    skipped |= problems
    if not count:
        raise InputError(f"{source.where}: none of {len(source)} pictures can be read, the last because "
                         f"{list(problems.values())[-1]}")


def features(source: Labelled, vit: ViT, file: Path, skipped: Skipped, device: torch.device
             ) -> tuple[Tensor, Tensor]:
    """(features (n, D), classes (n,)) of the pictures that can be read, on the CPU; kept in `file` for the next time,
    as long as model and pictures are the same."""
    key = digest(source, vit)
    kept = stored(file, key)
    if kept is not None:
        return kept
    parts, training = [], vit.training
    vit.eval().to(device)
    with torch.inference_mode(), Bar("features", len(source)) as bar:
        for pixels, labels in read_pictures(source, vit, skipped):
            parts.append((vit.pool(vit(pixels.to(device))).float().cpu(), labels))
            bar.step(len(labels))
    vit.train(training)
    made = {"features": torch.cat([part[0] for part in parts]), "labels": torch.cat([part[1] for part in parts])}
    if not made["features"].isfinite().all():
        raise InputError("the backbone gives features that are not finite: its weights cannot be used")
    with replacing(file) as part:
        save_file(made, part, {"key": key})
    return made["features"].clone(), made["labels"].clone()


def digest(source: Labelled, vit: ViT) -> str:
    made = hashlib.sha256(vit.fingerprint().encode())
    for picture, label in zip(source.pictures, source.labels, strict=True):
        made.update(f"{picture.name} {label}\n".encode())
    return made.hexdigest()


def stored(file: Path, key: str) -> tuple[Tensor, Tensor] | None:
    try:
        with safe_open(file, "pt") as held:
            if (held.metadata() or {}).get("key") == key:
                return held.get_tensor("features"), held.get_tensor("labels")
    except (OSError, SafetensorError):
        pass  # not there, or cut short
    return None
