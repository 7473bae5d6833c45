"""The house: nothing imports upward, the core knows no trainer and no pictures, the command starts without torch."""

import ast
import tomllib
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"mm": "mm", "encoders": "mm.encoders", "codecs": "mm.codecs", "recipes": "mm.recipes"}
MAY_USE = {"mm": {"mm"}, "encoders": {"mm", "encoders"}, "codecs": {"mm", "codecs"}, "recipes": set(PACKAGES)}
NEVER = {"mm": {"lightning", "timm", "torchvision"}, "encoders": {"lightning"}, "codecs": {"lightning"},
         "recipes": set()}
FILES = [(floor, path) for floor in PACKAGES for path in sorted((ROOT / floor).rglob("*.py"))]
STARTERS = [*(ROOT / floor / "__init__.py" for floor in PACKAGES), ROOT / "recipes/cli.py", ROOT / "mm/lazy.py",
            ROOT / "mm/errors.py"]


def imports(nodes: Iterator[ast.AST], package: str) -> Iterator[tuple[str, bool]]:
    """(absolute name, whether it was written as one) of all that is imported."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, True) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            yield from ((f"{module}.{alias.name}", not node.level) for alias in node.names)


def floor_of(name: str) -> str | None:
    first, _, rest = name.partition(".")
    second = rest.partition(".")[0]
    return None if first != "mm" else second if second in PACKAGES else "mm"


def package_of(floor: str, path: Path) -> str:
    return ".".join([PACKAGES[floor], *path.relative_to(ROOT / floor).parts[:-1]])


@pytest.mark.parametrize("floor, path", FILES, ids=[str(path.relative_to(ROOT)) for _, path in FILES])
def test_nothing_imports_upward(floor, path):
    for name, absolute in imports(ast.walk(ast.parse(path.read_text())), package_of(floor, path)):
        target = floor_of(name)
        assert target is None or target in MAY_USE[floor], f"{floor} imports {name}"
        assert name.partition(".")[0] not in NEVER[floor], f"{floor} imports {name}"
        if target == "mm" and floor != "mm":
            assert absolute, f"{name}: the core is imported by its absolute name"
        elif target is not None and target != "mm":
            assert not absolute, f"{name}: another folder is imported by a relative name"


@pytest.mark.parametrize("path", STARTERS, ids=[str(path.relative_to(ROOT)) for path in STARTERS])
def test_what_starts_imports_no_torch_at_its_top(path):
    top = [name.partition(".")[0] for name, _ in imports(ast.parse(path.read_text()).body, "mm")]
    assert not {"torch", "numpy", "lightning", "timm"} & set(top)


def test_the_rules_catch_what_they_forbid():
    source = "from ..recipes import cli\nfrom mm.nn.block import Block\nimport torchvision.io\nfrom mm import codecs"
    found = list(imports(ast.walk(ast.parse(source)), "mm.encoders"))
    assert found == [("mm.recipes.cli", False), ("mm.nn.block.Block", True), ("torchvision.io", True),
                     ("mm.codecs", True)]
    assert [floor_of(name) for name, _ in found] == ["recipes", "mm", None, "codecs"]


def test_no_package_folder_is_left_out_of_the_distribution():
    listed = (ROOT / "pyproject.toml").read_text()
    folders = {package_of(floor, path) for floor, path in FILES}
    assert not [name for name in folders if f'"{name}"' not in listed]


def test_shipped_weights_are_in_the_distribution():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    weights = ROOT / "recipes" / "weights"
    held = {path for pattern in settings["mm.recipes.weights"] for path in weights.glob(pattern)}
    assert {path for path in weights.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")} <= held


def test_no_init_files_under_tests():
    assert not list((ROOT / "tests").rglob("__init__.py"))
