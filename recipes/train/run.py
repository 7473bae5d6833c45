"""A run's directory: settings that may not change half-way, checkpoints written whole, a log that survives a kill."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mm.checkpoint.files import read_json, replacing, write_json
from mm.errors import InputError

SETTINGS, LAST = "settings.json", "last.ckpt"


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that appear under their name only when they are complete and on disk. Raises InputError where that
    fails, as on a full disk; what had the name before keeps it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        kept = "the previous one is still there" if Path(path).exists() else "there is none yet"
        try:
            with replacing(Path(path)) as part, open(part, "wb") as file:
                torch.save(checkpoint, file)
        except InputError as error:
            raise InputError(f"{error}; {kept}") from None
        except (OSError, RuntimeError) as error:  # torch's writer turns the one into the other
            cause = error if isinstance(error, OSError) else error.__context__
            reason = cause.strerror if isinstance(cause, OSError) else error
            raise InputError(f"the checkpoint {path} cannot be written ({reason}); {kept}") from None


def begin(out: Path, settings: Mapping[str, Any], free: frozenset[str]) -> Path | None:
    """The checkpoint to go on from, or None in a new directory, where the settings are kept.

    Raises InputError when the directory holds a run with other settings, `free` ones (by dotted name) excepted.
    """
    settings, file, last = json.loads(json.dumps(settings)), out / SETTINGS, out / LAST
    if file.exists() and last.exists():
        for name, old, new in differences(read_json(file), settings):
            if name not in free:
                raise InputError(f"{out} holds a run with {name} {old!r}, not {new!r}: give the same settings to go on "
                                 "with it, or another --out")
    elif not file.exists() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and holds no run: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)
    return last if last.exists() else None


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every value that differs, of those that the old settings know."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old:
            yield from differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield name, old, new


class CsvLog:
    """Rows of numbers by step in one file; they are there for good once `write` returns."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path, self.columns = path, ("step", *columns)

    def open(self, step: int) -> None:
        """Keeps the whole lines up to `step`: a killed run may have written more."""
        text = self.path.read_text("utf-8") if self.path.exists() else ""
        lines = [line for line in text.splitlines(keepends=True)[1:] if line.endswith("\n")]
        kept = [line for line in lines if int(line.split(",")[0]) <= step]
        with replacing(self.path) as part:
            part.write_text(",".join(self.columns) + "\n" + "".join(kept), "utf-8")

    def write(self, rows: list[Mapping[str, float]]) -> None:
        """Raises InputError where that fails, as on a full disk."""
        try:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerows(rows)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written ({error.strerror}); the checkpoint beside it stays as it "
                             "was") from None


def read_log(path: Path) -> dict[str, list[float]]:
    """The columns of a log; what earlier rows did not hold yet is NaN."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name] or "nan") for row in rows] for name in (rows[0] if rows else ())}
