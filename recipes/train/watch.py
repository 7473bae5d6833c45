"""A callback around the steps of a run: logs, evaluation, checkpoints, progress and curves."""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from mm.errors import InputError

from ..common.progress import Bar
from ..data.report import Note
from .run import LAST, CsvLog, read_log
from .settings import Trainer

COLUMNS = ("loss", "lr", "gradient", "scale")
MOST_TOLD = 20  # sentences of one kind
SHOWN = ("R@1", "top-1", "perplexity", "written right", "within 1 s")  # ends of names that the progress bar tells
TRAIN, VALIDATION, CURVES = "train.csv", "validation.csv", "curves.png"
Measure = Callable[[nn.Module], dict[str, float]]


class Watch(lightning.Callback):
    """Logs each step, evaluates the averaged weights with `measure` and saves, at their intervals and at the end.

    Raises InputError when the loss or its gradient is no longer finite; nothing is saved after that step. `tell(step)`
    says what the batch of a step held, for that message. A run that is told to end (SIGTERM) saves first. `measured` is
    the last evaluation, `seconds` the time spent so far, and `notes` holds {kind: {key: sentence}} of unreadable
    pictures and cut captions; a continued run goes on counting.
    """

    def __init__(self, out: Path, settings: Trainer, measure: Measure | None, columns: tuple[str, ...] = COLUMNS,
                 tell: Callable[[int], str] | None = None) -> None:
        self.out, self.settings, self.measure, self.columns, self.tell = out, settings, measure, columns, tell
        self.saved = 0  # the step of the last checkpoint
        self.notes: dict[str, dict[str, str]] = {}
        self.measured: dict[str, float] = {}
        self.seconds = 0.0
        self.rows: list[dict[str, Any]] = []
        self.chief = False  # known when training starts, as is the bar
        self.bar: Bar | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"notes": self.notes, "measured": self.measured, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.notes, self.measured, self.seconds = (state_dict[key] for key in ("notes", "measured", "seconds"))

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.chief, self.began, self.clock = trainer.is_global_zero, trainer.global_step, time.monotonic()
        self.saved = trainer.global_step
        if self.chief:
            self.log, self.validation = CsvLog(self.out / TRAIN, self.columns), None
            self.log.open(self.began)
            self.board = SummaryWriter(self.out / "tensorboard", purge_step=self.began + 1)
            self.bar = Bar("training", trainer.max_steps - self.began).__enter__()

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
                           ) -> None:
        step = trainer.global_step
        self.rows.append({"step": step, **module.last})
        self.take(batch.notes)
        log, evaluate, save = (step == trainer.max_steps or step % every == 0 for every in
                               (self.settings.log, self.settings.evaluate, self.settings.save))
        save = save or (trainer.received_sigterm and trainer.world_size == 1)  # several do not hear it at one step
        if log or evaluate or save:
            self.flush()
        if evaluate and self.measure:
            average = module.whole_average()
            if self.chief:
                self.evaluate(trainer, self.measure(average))
        if save:
            self.save(trainer)
        if self.chief:
            self.bar.step()

    def take(self, notes: list[Note]) -> None:
        """Counts what is new, and tells the first ones of each kind."""
        for kind, key, sentence in notes:
            known = self.notes.setdefault(kind, {})
            if key not in known:
                known[key] = sentence
                if len(known) <= MOST_TOLD:
                    self.say(sentence if len(known) < MOST_TOLD else f"{sentence} (further ones are only counted)")

    def flush(self) -> None:
        """Writes the rows of the steps since the last time."""
        rows = [{name: float(value) for name, value in row.items()} | {"step": row["step"]} for row in self.rows]
        self.rows = []
        good = list(itertools.takewhile(lambda row: bad_value(row) is None, rows))
        if self.chief:
            self.log.write(good)
            for row in good:
                for name in self.columns:
                    self.board.add_scalar(f"train/{name}", row[name], row["step"])
        if len(good) < len(rows):
            raise InputError(self.broken(rows[len(good)]))

    def broken(self, row: Mapping[str, float]) -> str:
        step, name = row["step"], bad_value(row)
        held = f", in a batch of {self.tell(step)}" if self.tell else ""
        kept = f"{self.out / LAST} holds step {self.saved}" if self.saved else "no checkpoint was saved yet"
        return (f"the {name} is {row[name]} at step {step}{held}: the run stops, {kept}; a lower optim.lr, a longer "
                "optim.warmup or a smaller optim.clip may help")

    def evaluate(self, trainer: lightning.Trainer, measured: dict[str, float]) -> None:
        step, self.measured = trainer.global_step, measured
        if self.validation is None:
            self.validation = CsvLog(self.out / VALIDATION, tuple(measured))
            self.validation.open(step - 1)
        self.validation.write([{"step": step, **measured}])
        for name, value in measured.items():
            self.board.add_scalar(name, value, step)
        pace = (time.monotonic() - self.clock) / (step - self.began)
        left = pace * (trainer.max_steps - step) / 60
        table = ", ".join(f"{name} {value:.1f}" for name, value in measured.items() if name.endswith(SHOWN))
        self.say(f"step {step} of {trainer.max_steps}: {table} ({pace:.2f} s a step, {left:.0f} min left)")

    def save(self, trainer: lightning.Trainer) -> None:
        now = time.monotonic()
        self.seconds, self.clock, self.began = self.seconds + now - self.clock, now, trainer.global_step
        trainer.save_checkpoint(self.out / LAST)
        self.saved = trainer.global_step

    def say(self, sentence: str) -> None:
        if self.bar:
            self.bar.say(sentence)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.notes = merged(self.notes, trainer.world_size)
        self.close()
        if self.chief:
            validation = self.out / VALIDATION
            plot(self.out / TRAIN, validation if validation.exists() else None, self.out / CURVES)

    def on_exception(self, trainer: lightning.Trainer, module: Any, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt | SIGTERMException):
            self.say(f"interrupted at step {trainer.global_step}; the same command goes on from step {self.saved}")
        if isinstance(exception, SIGTERMException):
            exception.code = 128 + signal.SIGTERM  # the exit status
        self.close()

    def close(self) -> None:
        if self.chief:
            self.bar.__exit__()
            self.board.close()


def bad_value(row: Mapping[str, float]) -> str | None:
    """The first of loss and gradient that is not finite."""
    return next((name for name in ("loss", "gradient") if not math.isfinite(row[name])), None)


def merged(notes: dict[str, dict[str, str]], world: int) -> dict[str, dict[str, str]]:
    """The notes of all processes."""
    if world == 1:
        return notes
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, notes)
    kinds = {kind for part in parts for kind in part}
    return {kind: {key: text for part in parts for key, text in part.get(kind, {}).items()} for kind in kinds}


def plot(train: Path, validation: Path | None, to: Path) -> None:
    """Loss, learning rate and, where there was one, the recall of every evaluation, over steps (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    log, measured = read_log(train), read_log(validation) if validation else {}
    figure, axes = pyplot.subplots(1, 2 + bool(measured), figsize=(5 * (2 + bool(measured)), 3.6), layout="constrained")
    for axis, name in zip(axes, ("loss", "lr"), strict=False):
        axis.plot(log.get("step", []), log.get(name, []), linewidth=0.8)
        axis.set_ylabel(name)
    for name in [name for name in measured if name != "step"]:
        axes[-1].plot(measured["step"], measured[name], marker=".", label=name)
    if measured:
        axes[-1].set_ylabel("%")
        axes[-1].legend(fontsize=6)
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(to, dpi=110)
    pyplot.close(figure)
