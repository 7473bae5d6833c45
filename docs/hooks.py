"""Lays the four top folders out as the package that they make, for the tool that reads docstrings from files."""

import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "build" / "docs" / "mm"


def on_startup(**_: Any) -> None:
    shutil.rmtree(PACKAGE, ignore_errors=True)
    for top in ("mm", "encoders", "codecs", "recipes"):
        for file in (ROOT / top).rglob("*.py"):
            place = PACKAGE / file.relative_to(ROOT / "mm" if top == "mm" else ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
