import importlib
import subprocess
import sys

import pytest

from mm.recipes.cli import COMMANDS, main
from mm.recipes.commands.bench import BENCHES
from mm.recipes.commands.train import KINDS


def test_help_imports_nothing_heavy():
    code = ("import sys; from mm.recipes.cli import main; main(['--help']); "
            "print([m for m in ('torch', 'lightning', 'numpy', 'lancedb') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("target", [target for target, *_ in [*COMMANDS.values(), *BENCHES.values(), *KINDS.values()]])
def test_every_command_exists(target):
    module, function = target.split(":")
    found = getattr(importlib.import_module(module), function)
    assert callable(found) or isinstance(found, dict)


@pytest.mark.parametrize("argv", [["serch"], ["bench", "clp"], ["search", "/nowhere.lance", "a cat"],
                                  ["info", "/nowhere/at/all"], ["train", "clip", "--config", "/nowhere.yaml"]])
def test_a_mistake_is_one_sentence(argv, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("mm: ") and "Traceback" not in error and len(error.splitlines()) == 1
