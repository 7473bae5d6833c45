"""The documentation holds: its Python runs, its commands parse, its links lead somewhere, the README is short."""

import re
import shlex
from pathlib import Path

import pytest

from mm.recipes.cli import COMMANDS
from mm.recipes.common.command import imported, parse

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
RUN = ("README.md", "docs/design.md", "docs/how-to/shapes.md", "docs/how-to/trainer.md")
TUTORIALS = ("search", "vit", "codec", "duplex")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of every `$ mm ...` line, without comments."""
    lines = [line for block in blocks(page, "(?:console)?") for line in block.splitlines() if line.startswith("$ mm ")]
    return [shlex.split(line[2:].replace('"$REPO"', str(ROOT)), comments=True)[1:] for line in lines]


@pytest.mark.parametrize("name", RUN)
def test_python_of_a_page_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    held = {"__name__": "page"}
    for block in blocks(ROOT / name, "python"):
        exec(compile(block, name, "exec"), held)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_of_a_page_is_one(page):
    """Its name exists and its options are accepted; pages with `...` or words in capitals stand for other words."""
    for words in commands(page):
        table, name = COMMANDS, words.pop(0)
        while name in table and isinstance(imported(table[name][0]), dict):
            table, name = imported(table[name][0]), words.pop(0)
        assert name in table, f"{page.name}: mm has no {name}"
        if not any(mark in word for word in words for mark in ("...", "[", "|")):
            parse(imported(table[name][0]), f"mm {name}", words)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


@pytest.mark.full
@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_runs_from_top_to_bottom(name, tmp_path):
    """As a person would, in an empty folder."""
    import os
    import subprocess
    import sys

    text = (ROOT / f"docs/tutorials/{name}.md").read_text("utf-8")
    shim = tmp_path / "bin"
    shim.mkdir()
    (shim / "mm").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mm.recipes.cli "$@"\n')
    (shim / "mm").chmod(0o755)
    env = os.environ | {"PATH": f"{shim}:{os.environ['PATH']}", "REPO": str(ROOT)}
    for kind, block in re.findall(r"```(console|python)\n(.*?)```", text, re.DOTALL):
        code = block if kind == "python" else "\n".join(
            line[2:] for line in block.splitlines() if line.startswith("$ "))
        run = [sys.executable, "-c", code] if kind == "python" else ["bash", "-euc", code]
        done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stderr[-2000:]}"
