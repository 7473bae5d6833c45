"""Small training runs on coloured shapes."""

from __future__ import annotations

import csv
from pathlib import Path

from PIL import Image, ImageDraw
from trial import Trial

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 50), "blue": (30, 60, 220), "black": (10, 10, 10)}
SHAPES = {"circle": "ellipse", "square": "rectangle"}
CONFIG = """
shape:
  dim: 16
  image: {size: 16, patch: 8, width: 32, depth: 1, heads: 2, drop_path: 0.1, patch_dropout: 0.25}
  text: {vocab: 560, context: 10, width: 32, depth: 1, heads: 2}
data: {batch_size: 16}
augment: {crop: 0.8, geometry: {rotation: 10}}
optim: {lr: 0.003, warmup: 5, ema: 0.9}
trainer: {max_steps: 40, save: 10, evaluate: 20, log: 5, threads: 1, accelerator: cpu}
"""


def shapes(folder: Path) -> Path:
    """Coloured shapes, two captions each, and the settings of a small run."""
    with open(folder / "pairs.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for i in range(24):
            (colour, rgb), (shape, draw) = list(COLOURS.items())[i % 4], list(SHAPES.items())[i // 4 % 2]
            image = Image.new("RGB", (24 + i, 24), "white")
            getattr(ImageDraw.Draw(image), draw)((2, 2, 18, 18), fill=rgb)
            image.save(folder / f"{i}.png")
            rows.writerows([[f"{i}.png", f"a {colour} {shape}"], [f"{i}.png", f"{shape} in {colour}"]])
    (folder / "config.yaml").write_text(CONFIG)
    return folder


CLIP_RUNS = Trial("clip", "pairs.csv")
options, train = CLIP_RUNS.options, CLIP_RUNS.train
