"""`mm convert`: a checkpoint rewritten in another layout, and read back before it counts."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from ..encoders.clip import CLIP
    from ..encoders.vit import ViT

LAYOUTS = ("hf", "open_clip", "timm", "mm")
CONFIGS = ("config.json", "open_clip_config.json")
SAMPLES = ("a photo of a dog", "It's 3.14 & “naïve” 🐱", "")


def convert(argv: list[str]) -> int:
    """The command: writes DST, says what is in it."""
    parser = argparse.ArgumentParser(prog="mm convert", description="Rewrite a checkpoint for another library: "
                                     "transformers (hf), open_clip, timm, or this package (mm).")
    parser.add_argument("source", metavar="SRC", help="a directory with a checkpoint in any layout, or a hub name")
    parser.add_argument("target", metavar="DST", type=Path, help="the directory to write")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="the layout of DST")
    parser.add_argument("--force", action="store_true", help="replace the checkpoint that DST holds")
    parser.add_argument("--allow-pickle", action="store_true", help="read .bin files that hold more than tensors")
    options = parser.parse_args(argv)
    rewrite(options.source, options.target, options.to, force=options.force, allow_pickle=options.allow_pickle)
    return 0


def rewrite(source: str, target: Path, layout: str, *, force: bool = False, allow_pickle: bool = False) -> None:
    """Source in `layout` under `target`, complete and read back, or not there at all.

    Raises InputError where the layout cannot hold the model or `target` is taken.
    """
    from ..encoders.any import open_model

    target = Path(os.path.abspath(target.expanduser()))
    check_target(source, target, force)
    model = open_model(source, allow_pickle=allow_pickle)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as room:
            fresh, old = Path(room) / "new", Path(room) / "old"
            model.save_pretrained(fresh, layout=layout)
            again = open_model(fresh)
            told = compare(model, again, layout)
            if target.exists():
                os.rename(target, old)
            os.rename(fresh, target)
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror})") from None
    show(target, f"{layout} layout, {told}", differences(model, again))


def check_target(source: str, target: Path, force: bool) -> None:
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file, expected a directory to write")
    if Path(source).expanduser().exists() and Path(source).expanduser().resolve() == target.resolve():
        raise InputError(f"{target} is the checkpoint that is read; write to another directory")
    names = sorted(os.listdir(target)) if target.is_dir() else []
    if names and not force:
        raise InputError(f"{target} is not empty (it holds {names[0]}); --force replaces it")
    foreign = [name for name in names if (target / name).is_dir()]
    if names and (foreign or not any(name in names for name in CONFIGS)):
        raise InputError(f"{target} holds more than a checkpoint ({(foreign or names)[0]}) and is not replaced")


def compare(model: CLIP | ViT, again: CLIP | ViT, layout: str) -> str:
    """What was found equal, in words: every tensor bit for bit, and a picture's and a text's features up to rounding.
    Anything lost is an InputError."""
    family, _ = model.families.to_write(model.kind, layout, model.spec)
    before, after = (family.table(one.spec, ()).save(one.state_dict(), layout) for one in (model, again))
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after or not same(before[name], after[name]):
            raise InputError(f"nothing was written: {name} does not come back from the {layout} layout as it was")
    gap = feature_gap(model, again)
    if not gap <= (1e-5 if next(model.parameters()).dtype.itemsize >= 4 else 1e-1):
        raise InputError(f"nothing was written: features from the {layout} layout are {gap:.1e} away")
    return f"{len(before)} tensors read back bit for bit, features {f'within {gap:.0e}' if gap else 'equal'}"


def same(before: Tensor, after: Tensor) -> bool:
    return before.dtype == after.dtype and before.shape == after.shape and bool((before == after).all())


def feature_gap(model: CLIP | ViT, again: CLIP | ViT) -> float:
    import torch

    image = model.spec if model.kind == "vit" else model.spec.image
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, image.channels, *image.image, generator=draw)

    def outputs(one: CLIP | ViT) -> tuple[Tensor, ...]:
        if one.kind == "vit":
            return (one.encode(pixels),)
        text = one.spec.text
        return one(pixels, torch.randint(text.vocab, (1, text.context), generator=draw.manual_seed(1)))

    with torch.inference_mode():
        pairs = zip(outputs(model), outputs(again), strict=True)
        return max(((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item() for a, b in pairs)


def differences(model: CLIP | ViT, again: CLIP | ViT) -> list[str]:
    """What the new layout says otherwise: the preprocessing's finer points, the tokenizer's cleaning."""
    told = []
    before, after = vars(model.preprocessing), vars(again.preprocessing)
    told += [f"preprocessing: {name} is {after[name]}, was {value}" for name, value in before.items()
             if value != after[name]]
    if (model.tokenizer is None) != (again.tokenizer is None):
        told.append("tokenizer: " + ("CLIP's own, the source had none" if model.tokenizer is None else "none"))
    elif model.tokenizer is not None:
        told += [f"tokenizer: {text!r} has other ids" for text in SAMPLES
                 if model.tokenizer.encode(text) != again.tokenizer.encode(text)]
    return told


def show(target: Path, told: str, notes: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("file", "size")
    table.columns[1].justify = "right"
    for path in sorted(target.iterdir()):
        table.add_row(path.name, f"{path.stat().st_size:,}")
    console = Console(highlight=False)
    console.print(f"{target}: {told}", markup=False, soft_wrap=True)
    console.print(table)
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
