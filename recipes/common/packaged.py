"""Files that lie in an installed package, whose code is not imported."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path


def packaged(distribution: str, ending: str) -> Path | None:
    """The file of an installed distribution whose path ends so, or None."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(file.locate()) for file in files if file.as_posix().endswith(ending))
    return next((path for path in found if path.is_file()), None)
