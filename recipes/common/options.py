"""The device that a command runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mm.errors import InputError

if TYPE_CHECKING:
    import torch


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the GPU if there is one. Raises InputError for one that this machine lacks."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: this machine or this torch has no such device") from None
