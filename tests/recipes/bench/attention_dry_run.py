"""`mm bench attention --suite full` at toy sizes in Triton's interpreter, with clocks that stand still.

Run by test_bench_attention.py in a process of its own, as TRITON_INTERPRET=1 must be set before Triton is imported:
    TRITON_INTERPRET=1 python -m pytest tests/recipes/bench/attention_dry_run.py
"""

import json
from dataclasses import replace

import pytest
import torch
from triton_interpreter import bfloat16_as_in_hardware

from mm.kernels import triton_launch
from mm.recipes.bench import attention as bench
from mm.recipes.bench import attention_check, attention_peers, attention_time
from mm.recipes.bench.report import report

CPU = torch.device("cpu")


def toy(workload):
    """As small as shows the same features."""
    group = min(workload.heads // workload.kv, 2)
    return replace(workload, batch=1, heads=group, kv=1, length=min(workload.length, 20), width=min(workload.width, 32),
                   keys=workload.keys and 40, value_width=workload.value_width and 32)


def shrink(monkeypatch, module, *names):
    for name in names:
        monkeypatch.setattr(module, name, {key: (toy(one[0]), *one[1:]) if isinstance(one, tuple) else toy(one)
                                           for key, one in getattr(module, name).items()})


@pytest.fixture(autouse=True)
def small(monkeypatch):
    bfloat16_as_in_hardware(monkeypatch)
    shrink(monkeypatch, bench, "PLAIN", "BEYOND", "ROTATED", "DECODED")
    shrink(monkeypatch, attention_check, "CHECKED")
    monkeypatch.setattr(attention_check, "LONG", toy(attention_check.LONG))
    monkeypatch.setattr(attention_check, "REPEATED", replace(toy(attention_check.REPEATED), length=80))
    monkeypatch.setattr(bench, "CACHES", 1)
    monkeypatch.setattr(attention_peers, "compiled", lambda call: call)
    for name in ("forward_tile", "query_tile", "key_tile"):
        monkeypatch.setattr(triton_launch, name, lambda call: triton_launch.Tile(32, 32, 4, 1))
    for name in ("matmul_ceiling", "copy_bandwidth"):
        monkeypatch.setattr(bench, name, lambda device: 2.0)


def still(run):
    """A clock: runs the call once and says one millisecond."""
    run()
    return 1.0


def clocks(monkeypatch, clock):
    for module in (bench, attention_time):
        for name in ("milliseconds", "captured"):
            monkeypatch.setattr(module, name, clock)


def test_every_line_of_the_full_suite(monkeypatch, tmp_path):
    clocks(monkeypatch, still)
    cases = bench.full(CPU)
    report("attention", cases, packages=("torch", "triton"), json_file=str(tmp_path / "all.json"))
    told = {case["case"]: case for case in json.loads((tmp_path / "all.json").read_text())["cases"]}
    assert len(told) == len(cases)
    checks = [case for name, case in told.items() if name.startswith("check: ")]
    assert all(case["ok"] for case in checks) and len(checks) == 6, [case for case in checks if not case["ok"]]
    failed = {name: case["note"] for name, case in told.items() if "note" in case}
    lacking = [(name, f"SDPA {kind}_attention") for name in bench.PLAIN for kind in ("cudnn", "efficient")]  # on a CPU
    lacking += [(name, "FlexAttention") for name in (*bench.PLAIN, *bench.BEYOND)]
    assert set(failed) == {f"{name}, {way}, against {peer}" for name, peer in lacking
                           for way in ("forward", "backward")}, failed
    assert sum(name.startswith("decode") for name in told) == len(bench.DECODED)
    window = told["window 1024 in 16384, GQA 4:1, forward, against SDPA with a mask"]
    assert window["ours"] == window["peer"] == 1e-3 and window["ratio"] == 1 and not window["ok"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", bench.BEYOND)
def test_flex_attention_is_asked_the_same(name):
    """Without gradients, which it has none of on a CPU."""
    with torch.no_grad():
        q, k, v, options, mine = bench.made(bench.BEYOND[name][0], CPU)
        ours, theirs = mine().float(), attention_peers.flex(q.detach(), k.detach(), v.detach(), options)().float()
    assert (ours - theirs).abs().max() < attention_time.ALIKE * ours.abs().max()


def test_a_feature_that_is_off_is_a_line_and_timing_goes_on(monkeypatch):
    clocks(monkeypatch, still)
    monkeypatch.setattr(attention_check, "CHECKED", {"full": attention_check.CHECKED["full"],
                                                     "sinks": attention_check.CHECKED["softcap and sinks"]})
    monkeypatch.setattr(attention_check, "repeated", lambda device: 1e-6)
    monkeypatch.setattr(attention_check, "weights", lambda options: 1 / 0 if options.sinks is not None else [])
    monkeypatch.setattr(bench, "measure", lambda device: iter(()))
    bad = [case for case in bench.full(CPU) if not case.ok]
    sinks = [f"check: sinks, torch.{bits} " for bits in ("float32", "float16", "bfloat16")]
    assert [case.case for case in bad] == [*sinks, "check: gradients twice, difference"]
    assert bad[0].note == "ZeroDivisionError: division by zero" and bad[3].ours == 1e-6


def test_what_fails_on_either_side_is_a_line(monkeypatch):
    def once(run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    clocks(monkeypatch, once)
    (name, (workload, *floors)), *_ = bench.PLAIN.items()
    lines = list(bench.plain_run(name, workload, floors, 2.0, CPU))
    assert not any(case.ok for case in lines)
    assert all("OutOfMemoryError: CUDA out of memory" in case.note for case in lines) and len(lines) == 17
    assert not bench.decoded("decode", bench.DECODED["decode, batch 1, context 4096, GQA 8:1"], 2.0, CPU).ok


def test_a_peer_that_answers_another_question_is_not_timed(monkeypatch):
    clocks(monkeypatch, still)
    x = torch.ones(1, 1, 2, 4)
    peers = {name: attention_time.Peer(lambda factor=factor: lambda: factor * x, 1.5)
             for name, factor in (("wrong", 2), ("right", 1))}
    passes = {"forward": attention_time.forward}
    wrong, right = attention_time.compare("case", lambda: x, {"forward": (1.0, None)}, peers, [], passes)
    assert wrong.note == "ValueError: its answer is 1.0e+00 from ours" and wrong.peer is None and wrong.ok
    assert right.peer == 1e-3


@pytest.mark.parametrize("error", [
    attention_time.Lost("AcceleratorError: CUDA error: an illegal memory access was encountered"), KeyboardInterrupt()])
def test_a_lost_gpu_or_an_interruption_ends_the_list_and_not_the_report(error, monkeypatch):
    def lost(device):
        yield bench.Case(case="first", ours=1.0, unit="s")
        raise error
    monkeypatch.setattr(bench, "checks", lost)
    first, rest = bench.full(CPU)
    assert first.ok and not rest.ok and rest.note == f"{type(error).__name__}: {error}"
