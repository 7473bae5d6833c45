"""Real weights among the files of installed packages, whose code is never imported."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path


def packaged(package: str, end: str) -> Path | None:
    """The file of an installed package whose name ends so, or None."""
    try:
        found = [file for file in importlib.metadata.files(package) or [] if file.name.endswith(end)]
    except importlib.metadata.PackageNotFoundError:
        found = []
    return Path(found[0].locate()) if found else None
