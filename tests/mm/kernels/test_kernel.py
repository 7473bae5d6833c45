"""The Triton kernels on any machine: in the interpreter, and compiled ahead of time for GPUs that need not be there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mm.kernels import dispatch, explain
from mm.kernels.operator import kernel_args
from mm.kernels.triton_launch import splits
from mm.kernels.triton_plan import KernelArgs
from mm.positions import rope
from mm.positions.absolute import BucketBias
from mm.positions.visibility import At, along
from mm.recipes.bench.attention_compile import SHARED, compile_all, suite
from mm.recipes.bench.attention_workloads import Workload
from mm.spec import CAUSAL, Buckets, Rope, Window

CHECKS = Path(__file__).parent / "kernel_checks.py"
QUICK = ["head 64, full", "head 128, causal", "head 192/128 (MLA), causal", "head 128, documents, GQA 4:1",
         "head 64, T5 bias", "head 64, rotation on load (ViT)", "head 128, a prefix", "head 128, decode, GQA 8:1",
         "head 128, causal, float32"]


def test_every_feature_in_the_interpreter():
    """kernel_checks.py, in a process that sees TRITON_INTERPRET before it imports Triton."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CHECKS)], text=True,
                          capture_output=True, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=CHECKS.parents[3])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_a_cpu_never_imports_triton():
    """Not by `mm`: torch's own checkpointing, which long runs with gradients use, does."""
    code = """
import sys, torch
from mm.kernels import attend
from mm.spec import CAUSAL
from mm.positions.visibility import along
x = torch.randn(1, 2, 600, 16)
with torch.no_grad():
    for extras in ({}, {"softcap": 2.0}):
        attend(x, x, x, q_at=along(1, 600), k_at=along(1, 600), window=CAUSAL, **extras)
assert "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# -------------------------------------------------------------------------------------------- ahead of time
def fits(name, arch):
    """No spills in the forward pass, at most 32 bytes in the backward; matrix instructions; shared memory enough."""
    workload, dtype = suite()[name]
    for found in compile_all(workload, dtype, arch):
        assert found.shared <= SHARED[arch], found
        assert found.spilled <= found.allowed or arch != 90, found  # tiles are chosen for sm_90
        assert found.kernel != "forward_hopper" or found.fetches and "12 warps" in found.tile, found
        assert found.matrix or dtype == torch.float32 or found.kernel in ("reach_keys", "reach_queries", "join"), found


@pytest.mark.parametrize("name", QUICK)
def test_compiled_for_hopper(name):
    fits(name, 90)


@pytest.mark.full
@pytest.mark.parametrize("name", suite())
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiled_for_every_gpu(name, arch):
    fits(name, arch)


@pytest.mark.parametrize("batch, length, keys, parts", [(1, 1, 4096, 32), (1, 1, 131072, 66), (8, 1, 131072, 8),
                                                        (64, 1, 131072, 1), (64, 1, 100, 0), (1, 40, 4096, 0)])
def test_decoding_fills_the_gpu_whatever_the_batch(batch, length, keys, parts):
    """Of 8 query heads to a key head: with keys in parts, with rows enough in one; 0 is the ordinary forward pass."""
    workload = Workload(batch=batch, heads=32, kv=4, length=length, keys=keys, tokens="ring", window=CAUSAL)
    meta = torch.device("meta")
    call = KernelArgs(*kernel_args(*workload.tensors(meta, torch.bfloat16), workload.options(meta)))
    assert splits(call) == parts


# ------------------------------------------------------------------------------------------------ the choice
@pytest.fixture
def on_a_gpu(monkeypatch):
    """The choice as a GPU would get it; nothing is started."""
    monkeypatch.setattr(dispatch, "problem_with_kernel", dispatch.unsupported)


@pytest.mark.parametrize("path, length, keys, extras", [
    ("sdpa", 2048, 2048, {}),
    ("sdpa causal", 2048, 2048, {"window": CAUSAL}),
    ("kernel", 2048, 2048, {"window": Window(left=1023, right=0)}),
    ("kernel", 2048, 2048, {"softcap": 30.0}),
    ("kernel", 2048, 2048, {"sinks": torch.zeros(4)}),
    ("kernel", 2048, 2048, {"bias": BucketBias(Buckets(), 4)}),
    ("tiled", 2048, 2048, {"bias": lambda q_at, k_at: 0}),
    ("tiled", 2048, 2048, {"window": Window(left=1023, right=0, first=4)}),
    ("kernel", 197, 197, {"q_rope": True}),
    ("sdpa", 2048, 2048, {"q_rope": True}),
    ("kernel", 1, 4096, {"window": CAUSAL}),
])
def test_a_gpu_gets_the_kernel_where_it_is_better(path, length, keys, extras, on_a_gpu):
    q_at = along(1, length) if length > 1 else At(torch.tensor([[keys - 1]]))
    if "q_rope" in extras:
        extras = {"q_rope": rope.rotation(q_at.position, Rope(), 64)}
    q, k = torch.empty(1, 4, length, 64), torch.empty(1, 2, keys, 64)
    said = explain(q, k, k, q_at=q_at, k_at=along(1, keys), **extras)
    assert said.split(": ")[0] == path


def test_explain_says_what_keeps_a_gpu_from_the_kernel(on_a_gpu):
    q, at = torch.empty(1, 2, 40, 20), along(1, 40)
    assert explain(q, q, q, q_at=at, k_at=at, softcap=2.0) == (
        "tiled: SDPA has no softcap; the kernel takes heads of 16, 24, ... 256 channels, and queries have 20")
