"""`mm export`: the towers of a model as ONNX or torch.export programs, compared with the model before they count."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.errors import InputError

from ..common.command import argument

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...encoders.clip import CLIP
    from ...encoders.vision.vit import ViT

OPSET = 20
TRACED, CHECKED = 2, 3  # batch sizes
NEEDED = ("onnx", "onnxscript", "onnxruntime")
LIMITS = {"onnx": 1e-4, "pt2": 1e-5}  # largest difference let through; relative to features above 1


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a file per tower of a model, of any batch size and the model's own picture size, with preprocessing and
    labels beside it: image.onnx (and text.onnx of a CLIP), or .pt2.

    Args:
        model: a shipped model, a directory or a hub name.
        onnx: the directory to write ONNX files to.
        torch_export: the directory to write torch.export files to.
        allow_pickle: read .bin files that hold more than tensors, which can run code.
    """

    model: str = argument()
    onnx: Path | None = None
    torch_export: Path | None = None
    allow_pickle: bool = False

    def run(self) -> None:
        if (self.onnx is None) == (self.torch_export is None):
            raise InputError("mm export wants --onnx OUT or --torch-export OUT, one of the two")
        target, kind = (self.onnx, "onnx") if self.onnx else (self.torch_export, "pt2")
        for name, gap in write(self.model, target, kind, allow_pickle=self.allow_pickle).items():
            print(f"{target / name}: at most {gap:.1e} from the model, in a batch of {CHECKED} (traced with {TRACED})")


def write(name: str, target: Path, kind: str, *, allow_pickle: bool = False) -> dict[str, float]:
    """Largest absolute difference by file of `target`, which is written whole or not at all. Raises InputError."""
    import torch

    from mm.checkpoint.pretrained import load

    check(target := Path(os.path.abspath(target.expanduser())), kind)
    model = load(name, torch.float32, allow_pickle=allow_pickle, kinds=("clip", "vit")).requires_grad_(False)
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
