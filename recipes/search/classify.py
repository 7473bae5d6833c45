"""`mm classify`: sorts a folder of pictures by labels that were never trained on."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mm.errors import InputError

from .arguments import device_option, positive
from .embed import MODEL, Embedder
from .pictures import Walk, batches, decode, read_ahead, read_bytes, walk
from .progress import Bar


def classify(argv: list[str]) -> int:
    args = _arguments().parse_args(argv)
    labels, templates = read_labels(args.labels), choose_templates(args.templates)
    found = walk(args.folder)
    if not found.pictures:
        raise InputError(f"{args.folder} holds no pictures")
    embedder = Embedder.load(args.model or MODEL, args.device)
    results, skipped = sort_pictures(embedder, found, labels, templates, args.batch)
    top = min(args.top, len(labels))
    if args.json:
        print(json.dumps(as_json(results, labels, top, skipped, embedder.name), indent=2, ensure_ascii=False))
    else:
        print("\n".join(line(path, row, labels, top) for path, row in results))
    print(f"classified {len(results)}, skipped {skipped} (bad)", file=sys.stderr if args.json else sys.stdout)
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mm classify", description="Sort pictures by labels, zero-shot.")
    parser.add_argument("folder", metavar="PHOTOS", help="folder of pictures, searched with its sub-folders")
    parser.add_argument("--labels", required=True, metavar="FILE", help="one label per line")
    parser.add_argument("--model", help=f"checkpoint, hub name or directory (default: {MODEL})")
    parser.add_argument("--templates", default="photo", help="named set of prompts, or one such as 'a photo of a {}'")
    parser.add_argument("--top", type=positive, default=1, help="labels per picture (default: 1)")
    parser.add_argument("--batch", type=positive, default=32, help="pictures per forward pass (default: 32)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    device_option(parser)
    return parser


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


def sort_pictures(
    embedder: Embedder, found: Walk, labels: list[str], templates: Sequence[str], batch: int
) -> tuple[list[tuple[str, np.ndarray]], int]:
    """The path and the probabilities (labels,) of every picture, and how many could not be read."""
    from ...encoders.zeroshot import zeroshot_classifier

    weights = zeroshot_classifier(embedder.clip, labels, templates).float().cpu().numpy()
    scale = embedder.clip.logit_scale.detach().float().exp().item()
    results, skipped = [], len(found.unreadable)
    read = _reader(found.root, embedder.clip.preprocess)
    with Bar("classifying", len(found.pictures)) as bar:
        for path, reason in found.unreadable.items():
            bar.say(f"skipped {path}: {reason}")
        for files in batches(read_ahead([picture.path for picture in found.pictures], read), batch):
            good = [(path, pixels) for path, pixels in files if not isinstance(pixels, InputError)]
            for _, error in (item for item in files if isinstance(item[1], InputError)):
                bar.say(f"skipped {error}")
            skipped += len(files) - len(good)
            if good:
                vectors = embedder.images([pixels for _, pixels in good])
                results += zip((path for path, _ in good), softmax(scale * vectors @ weights), strict=True)
            bar.step(len(files))
    return results, skipped


def _reader(root: Path, preprocess: Any) -> Any:
    return lambda path: preprocess(decode(read_bytes(root / path), path))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Logits (B, labels) -> probabilities (B, labels)."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def best(row: np.ndarray, labels: list[str], top: int) -> list[tuple[str, float]]:
    """The `top` most probable labels, best first."""
    return [(labels[i], float(row[i])) for i in np.argsort(-row, kind="stable")[:top]]


def line(path: str, row: np.ndarray, labels: list[str], top: int) -> str:
    """path, then label and probability, tab-separated."""
    return "\t".join([path, *(f"{label}\t{share:.3f}" for label, share in best(row, labels, top))])


def as_json(
    results: list[tuple[str, np.ndarray]], labels: list[str], top: int, skipped: int, model: str
) -> dict[str, Any]:
    pictures = [
        {"path": path, "labels": [{"label": name, "probability": share} for name, share in best(row, labels, top)]}
        for path, row in results
    ]
    return {"model": model, "labels": labels, "skipped": skipped, "pictures": pictures}
