"""What several commands accept."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mm.errors import InputError

if TYPE_CHECKING:
    import torch


def positive(text: str) -> int:
    """A whole number from 1 on."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return number


def device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="where the model runs, such as cpu or cuda:0 (default: a GPU if there is one)")


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the GPU if there is one. Raises InputError for one that this machine lacks."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: this machine or this torch has no such device") from None
