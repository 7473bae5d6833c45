"""Small runs of `mm train KIND` on a folder that holds config.yaml and the data."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from mm.recipes.commands.train import KINDS
from mm.recipes.common.command import imported, parse


class Trial:
    """Runs of one kind; `data` is what --data.path names in the folder."""

    def __init__(self, kind: str, data: str):
        self.kind, self.data = kind, data

    def options(self, data: Path, out: Path, *more: str) -> list[str]:
        return ["--config", str(data / "config.yaml"), "--data.path", str(data / self.data), "--out", str(out), *more]

    def train(self, data: Path, out: Path, *more: str) -> Path:
        settings, _, fit = KINDS[self.kind]
        imported(fit)(parse(imported(settings), f"mm train {self.kind}", self.options(data, out, *more)))
        return out

    def kill(self, data: Path, out: Path, *more: str) -> int:
        """The step of the checkpoint of a run that is killed a few steps after it."""
        command = [sys.executable, "-m", "mm.recipes.cli", "train", self.kind, *self.options(data, out, *more)]
        run = subprocess.Popen(command, stderr=subprocess.PIPE)
        while not (out / "last.ckpt").exists() or len((out / "train.csv").read_text().splitlines()) % 10 < 4:
            assert run.poll() is None, run.stderr.read().decode()
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
        run.wait()
        return torch.load(out / "last.ckpt", weights_only=True)["global_step"]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs made the same model, bit for bit."""
    ones, others = weights(one), weights(other)
    return ones.keys() == others.keys() and all(torch.equal(ones[name], others[name]) for name in others)
