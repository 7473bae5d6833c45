"""Your own data: a table of pictures and captions, drawn here, on which the shipped CLIP is fine-tuned for 20 steps.

    python examples/own_data.py
"""

import csv
from pathlib import Path

from PIL import Image, ImageDraw

from mm import load
from mm.recipes.cli import main as mm

COLOURS = {"red": "#d22", "green": "#2a2", "blue": "#24d", "yellow": "#dc2"}
SHAPES = {"circle": "ellipse", "square": "rectangle"}


def draw(folder: Path) -> Path:
    """Pictures of coloured shapes and a table with a row each: image, caption."""
    folder.mkdir(exist_ok=True)
    rows = []
    for colour, code in COLOURS.items():
        for shape, method in SHAPES.items():
            image = Image.new("RGB", (48, 48), "white")
            getattr(ImageDraw.Draw(image), method)((8, 8, 40, 40), fill=code)
            image.save(folder / f"{colour}-{shape}.png")
            rows.append((f"{colour}-{shape}.png", f"a {colour} {shape}"))
    with open(folder / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return folder / "pairs.csv"


def main() -> None:
    table = draw(Path("shapes"))
    assert mm(["train", "clip", "--data.path", str(table), "--model", "emoji_clip", "--out", "runs/shapes",
               "--data.batch_size", "8", "--optim.lr", "3e-4", "--optim.warmup", "5", "--optim.ema", "0",
               "--trainer.max_steps", "20", "--trainer.evaluate", "20", "--trainer.save", "20"]) == 0
    clip = load("runs/shapes/model")
    scores = clip.similarity([Image.open("shapes/red-circle.png")], ["a red circle", "a blue square"])
    print([round(score, 2) for score in scores[0].tolist()])
    assert scores[0, 0] > scores[0, 1]


if __name__ == "__main__":
    main()
