"""One run of `mm train vit`, from settings to a model directory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.checkpoint.files import write_json

from ...encoders.vision.vit import ViT
from ..train.launch import METRICS, MODEL, export, facts, lightning_trainer, start
from ..train.watch import CURVES, Watch
from .confusion import confusion, draw, most_confused, sentences, write_table
from .data import ClassBatches, ClassModule, FeatureBatches, changes
from .features import BATCH, Skipped, features, read_pictures
from .labelled import Sets, read_labelled
from .module import VitRecipe, classify
from .settings import VitJob
from .start import check_classes, kept_classes, opened, starting_model

COLUMNS = ("loss", "lr", "gradient")
CONFUSION = "confusion"
Source = Callable[[], Iterator[tuple[Tensor, Tensor]]]  # batches of inputs and their classes


def fit(job: VitJob) -> None:
    """Trains, or goes on with what `job.out` holds, and writes the averaged weights to `job.out`/model."""
    out, checkpoint = start(job)
    given = opened(job)
    kept = kept_classes(job, given)
    sets = read_labelled(job.data.path, job.data.val, job.data.holdout, kept)
    check_classes(job, kept, sets.train.classes)
    vit = starting_model(job, given, sets.train.classes, keep=kept is not None)
    exam = Exam()
    watch = Watch(out, job.trainer, exam if sets.val else None, COLUMNS)
    trainer = lightning_trainer(job.trainer, watch)
    if trainer.is_global_zero:
        introduce(job, sets, vit, checkpoint)
    prepare = prepare_features if job.freeze == "backbone" else prepare_pictures
    module, data, exam.source = prepare(job, sets, vit, exam.skipped, trainer.strategy.root_device)
    recipe = VitRecipe(vit.spec, job.optim, job.loss, job.trainer.seed, module is not vit, module)
    trainer.fit(recipe, data, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        told = conclude(job, sets, recipe, watch, exam)
        if module is not vit:
            vit.head.proj.load_state_dict(recipe.average.state_dict())
        export(vit if module is not vit else recipe.average, out / MODEL, job.export.dtype)
        print("\n".join(told), file=sys.stderr)


def prepare_pictures(job: VitJob, sets: Sets, vit: ViT, skipped: Skipped, device: torch.device
                     ) -> tuple[nn.Module, ClassModule, Source | None]:
    """What trains, what it trains on and what it is evaluated on: the whole model, and pictures."""
    make = partial(ClassBatches, sets.train, changes(vit.preprocessing, job.augment))
    data = ClassModule(make, len(sets.train), len(vit.labels), job.data, job.augment, job.trainer.seed)
    return vit, data, sets.val and partial(read_pictures, sets.val, vit, skipped)


def prepare_features(job: VitJob, sets: Sets, vit: ViT, skipped: Skipped, device: torch.device
                     ) -> tuple[nn.Module, ClassModule, Source | None]:
    """The last layer alone, and the features of a frozen backbone."""
    names = ("train", "val")
    found = {name: features(getattr(sets, name), vit, Path(job.out) / f"features_{name}.safetensors", skipped, device)
             for name in names if getattr(sets, name)}
    data = ClassModule(partial(FeatureBatches, *found["train"]), len(found["train"][1]), len(vit.labels), job.data,
                       job.augment, job.trainer.seed)
    held = found.get("val")
    return vit.head.proj, data, held and (lambda: zip(*(part.split(BATCH) for part in held), strict=True))


@dataclass
class Exam:
    """Measures a module on `source`; `skipped` collects what was wrong with pictures that could not be read."""

    source: Source | None = None
    skipped: Skipped = field(default_factory=dict)

    def answers(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """(logits (n, C), classes (n,))"""
        training, device = module.training, next(module.parameters()).device
        module.eval()
        try:
            with torch.inference_mode():
                rows = [(classify(module, inputs.to(device)).float().cpu(), labels) for inputs, labels in self.source()]
        finally:
            module.train(training)
        logits, labels = zip(*rows, strict=True)
        return torch.cat(logits), torch.cat(labels)

    def __call__(self, module: nn.Module) -> dict[str, float]:
        """Accuracy in percent, and the cross-entropy."""
        return measures(*self.answers(module))


def measures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return {"top-1": 100 * best[:, 0].float().mean().item(), "top-5": 100 * best.any(1).float().mean().item(),
            "loss": F.cross_entropy(logits, labels).item()}


def introduce(job: VitJob, sets: Sets, vit: ViT, checkpoint: Path | None) -> None:
    parts = vit.head.proj if job.freeze == "backbone" else vit
    all_, trained = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (vit, parts))
    passes = job.trainer.max_steps * job.data.batch_size / len(sets.train)
    held = f"{len(sets.val)} to evaluate on" if sets.val else "none to evaluate on"
    lines = [*sets.notes, f"{len(sets.train)} pictures of {len(vit.labels)} classes, {held}, {all_:.2f} million "
             f"parameters, {trained:.2f} trained, {job.trainer.max_steps} steps of {job.data.batch_size}: "
             f"{passes:.1f} passes"]
    print("\n".join(lines + ([f"continuing {checkpoint}"] if checkpoint else [])), file=sys.stderr)


def conclude(job: VitJob, sets: Sets, recipe: VitRecipe, watch: Watch, exam: Exam) -> list[str]:
    """Writes the metrics and the confusion matrix; what there is to tell."""
    out, confused = Path(job.out), []
    if exam.source:
        logits, labels = exam.answers(recipe.average)
        watch.measured, names = measures(logits, labels), sets.train.classes
        matrix = confusion(labels.tolist(), logits.argmax(1).tolist(), len(names))
        confused = most_confused(matrix, names)
        write_table(matrix, names, out / f"{CONFUSION}.csv")
        draw(matrix, names, out / f"{CONFUSION}.png")
    unreadable = exam.skipped | watch.notes.get("picture", {})
    write_json(out / METRICS, account(job, sets, recipe, watch) | {"most_confused": confused,
                                                                   "unreadable": sorted(unreadable.values())})
    measured = ", ".join(f"{name} {value:.2f}" for name, value in watch.measured.items())
    lost = [*list(exam.skipped.values())[:5], f"{len(unreadable)} pictures could not be read"] if unreadable else []
    wrote = ", ".join(str(out / name) for name in (MODEL, METRICS, *([f"{CONFUSION}.csv", f"{CONFUSION}.png"]
                                                                     if exam.source else []), CURVES))
    return [*lost, *sentences(confused), *([measured] if measured else []), f"wrote {wrote}"]


def account(job: VitJob, sets: Sets, recipe: VitRecipe, watch: Watch) -> dict[str, Any]:
    """What a run was and came to; times in seconds, accuracy in percent."""
    return facts(job, recipe, watch) | {
        "pictures": len(sets.train), "validation_pictures": len(sets.val) if sets.val else 0,
        "classes": len(sets.train.classes), "left_out": list(sets.notes), "frozen": job.freeze == "backbone",
        "trained_parameters": sum(p.numel() for p in recipe.module.parameters())}
