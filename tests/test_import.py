"""What importing costs and offers: names that are loaded when they are first used."""

import subprocess
import sys
from importlib import import_module

import pytest


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = "print(sorted({'torch', 'numpy', 'lightning', 'timm', 'torchvision', 'PIL'} & set(sys.modules)))"


@pytest.mark.parametrize("name", ["mm", "mm.encoders", "mm.codecs", "mm.recipes", "mm.recipes.cli"])
def test_importing_a_package_loads_nothing_heavy(name):
    assert run(f"import sys, {name}; {HEAVY}") == "[]\n"


def test_help_answers_without_torch():
    out = run(f"import sys; from mm.recipes.cli import main; status = main(['--help']); {HEAVY}; print(status)")
    assert out.startswith("usage: mm ") and out.endswith("[]\n0\n")


@pytest.mark.parametrize("name", ["mm", "mm.encoders", "mm.codecs"])
def test_public_names_are_there(name):
    package = import_module(name)
    assert package.__all__ == sorted(package.__all__) and set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is getattr(package, name)
    with pytest.raises(AttributeError, match="no attribute 'Nonesuch'"):
        _ = package.Nonesuch
