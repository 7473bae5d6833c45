"""Modules that moved since version 0.1 are still there by their old names, and are the same modules."""

import importlib
import subprocess
import sys

import pytest

from mm.lazy import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_new_module(old):
    new = importlib.import_module(MOVED[old])
    assert importlib.import_module(old) is new and new.__name__ == new.__spec__.name == MOVED[old]


def test_as_the_readme_of_0_1_imports_them():
    code = ("import sys, mm; assert 'torch' not in sys.modules\n"
            "from mm.sampling import Sampling\nfrom mm.speculate import PromptLookup\nfrom mm import transformer\n"
            "from mm.spec import Sight, Window\nassert Sight is Window\n"
            "from mm.encoders.flex import flex_batch\nassert Sampling is mm.Sampling\n"
            "assert transformer.Transformer is mm.Transformer\n")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_other_name_is_made_up():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mm.nothing")
