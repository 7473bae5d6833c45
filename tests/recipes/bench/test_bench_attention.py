"""`mm bench attention` where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mm.errors import InputError
from mm.recipes.bench.attention import Attention, attention
from mm.recipes.bench.attention_compile import Compiled, cases


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_in_one_sentence():
    with pytest.raises(InputError, match="on a CUDA GPU, and this machine has none"):
        attention(Attention(suite="full"))


def test_an_architecture_that_is_not_known_is_named():
    with pytest.raises(InputError, match="--arch should be one of 80, 90, 100, not 75"):
        attention(Attention(suite="compile", arch=75))


def test_spills_fail_a_report():
    def ok(kernel, spilled):
        return all(case.ok for case in cases("x", Compiled(kernel, "128 x 64", 255, spilled, 1024, 8, 0)))
    assert ok("forward", 0) and not ok("forward", 8)
    assert ok("backward_keys", 32) and not ok("backward_keys", 40)


def test_the_full_suite_in_the_interpreter():
    """attention_dry_run.py, in a process that sees TRITON_INTERPRET before it imports Triton."""
    file = Path(__file__).parent / "attention_dry_run.py"
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)], text=True,
                          capture_output=True, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=file.parents[3])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
