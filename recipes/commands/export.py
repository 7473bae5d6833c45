"""`mm export`: the towers of a model as ONNX or torch.export programs, compared with the model before they count."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...encoders.clip import CLIP
    from ...encoders.vision.vit import ViT

OPSET = 20
TRACED, CHECKED = 2, 3  # batch sizes
NEEDED = ("onnx", "onnxscript", "onnxruntime")
LIMITS = {"onnx": 1e-4, "pt2": 1e-5}  # largest difference let through; relative to features above 1


def export(argv: list[str]) -> int:
    """The command: writes a directory with image.onnx (and text.onnx of a CLIP), or .pt2, and preprocessing.json."""
    parser = argparse.ArgumentParser(prog="mm export", description="A file per tower, of any batch size and the "
                                     "model's own picture size, with preprocessing and labels beside it.")
    parser.add_argument("model", metavar="MODEL", help="a directory with a checkpoint, or a hub name")
    to = parser.add_mutually_exclusive_group(required=True)
    to.add_argument("--onnx", metavar="OUT", type=Path, help="the directory to write ONNX files to")
    to.add_argument("--torch-export", metavar="OUT", type=Path, help="the directory to write torch.export files to")
    parser.add_argument("--allow-pickle", action="store_true", help="read .bin files that hold more than tensors")
    options = parser.parse_args(argv)
    target, kind = (options.onnx, "onnx") if options.onnx else (options.torch_export, "pt2")
    for name, gap in write(options.model, target, kind, allow_pickle=options.allow_pickle).items():
        print(f"{target / name}: at most {gap:.1e} from the model, in a batch of {CHECKED} (traced with {TRACED})")
    return 0


def write(name: str, target: Path, kind: str, *, allow_pickle: bool = False) -> dict[str, float]:
    """Largest absolute difference by file of `target`, which is written whole or not at all. Raises InputError."""
    import torch

    from ...encoders.any import open_model

    check(target := Path(os.path.abspath(target.expanduser())), kind)
    model = open_model(name, torch.float32, allow_pickle=allow_pickle).requires_grad_(False)
    gaps = {}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as room, torch.no_grad():
            fresh = Path(room) / "new"
            fresh.mkdir()
            facts = describe(model)
            for tower, (module, draw) in towers(model).items():
                path = fresh / f"{tower}.{kind}"
                run = WRITERS[kind](module, draw(TRACED), path, facts)
                value = draw(CHECKED)
                expected = module(value)
                gaps[path.name] = gap = (run(value) - expected).abs().max().item()
                if not gap <= LIMITS[kind] * max(1.0, expected.abs().max().item()):
                    raise InputError(f"nothing was written: {path.name} is {gap:.1e} away from the model")
            (fresh / "preprocessing.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
            os.rename(fresh, target)
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror})") from None
    return gaps


def check(target: Path, kind: str) -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None] if kind == "onnx" else []
    if missing:
        raise InputError(f"ONNX files need {', '.join(missing)}: pip install {' '.join(missing)}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists; give the name of a new or empty directory")


def towers(model: CLIP | ViT) -> dict[str, tuple[nn.Module, Callable[[int], Tensor]]]:
    """By file name: the tower as a module of one input, and what draws a batch of inputs."""
    import torch

    image = model.spec if model.kind == "vit" else model.spec.image
    found = {"image": (single(model.encode if model.kind == "vit" else model.encode_image, model),
                       lambda batch: torch.randn(batch, image.channels, *image.image))}
    if model.kind == "clip":
        text = model.spec.text
        found["text"] = (single(model.encode_text, model),
                         lambda batch: torch.randint(text.vocab, (batch, text.context)))
    return found


def single(call: Callable[[Tensor], Tensor], model: nn.Module) -> nn.Module:
    from torch import nn

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return call(x)

    return Tower().eval()


def describe(model: CLIP | ViT) -> dict[str, Any]:
    return {"kind": model.kind, "preprocessing": model.preprocessing and asdict(model.preprocessing),
            "labels": list(model.labels)}


def write_program(module: nn.Module, value: Tensor, path: Path, facts: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    import torch

    torch.export.save(program(module, value), path)
    return torch.export.load(path).module()


def write_onnx(module: nn.Module, value: Tensor, path: Path, facts: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    import onnxruntime
    import torch

    made = torch.onnx.export(program(module, value), dynamo=True, opset_version=OPSET, verbose=False,
                             input_names=["input"], output_names=["features"])
    made.model.metadata_props.update({key: json.dumps(fact, ensure_ascii=False) for key, fact in facts.items()})
    made.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def program(module: nn.Module, value: Tensor) -> Any:
    import torch

    return torch.export.export(module, (value,), dynamic_shapes=({0: torch.export.Dim("batch")},))


WRITERS = {"onnx": write_onnx, "pt2": write_program}
