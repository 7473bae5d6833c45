"""`mm bench duplex` on a small model: the cases and what they compare, never the times."""

import json

import pytest
import torch

from mm.recipes.bench import duplex as bench
from mm.recipes.cli import main

EIGHT = "duplex_small, 8 sessions in one step, one thread, at most 80 ms"
SMALL = {"dim": 20, "num_layers": 1, "card": 16, "text_card": 24, "depformer_dim": 12,
         "depformer_dim_feedforward": 24, "depformer_num_layers": 1}


def test_cases(tmp_path, monkeypatch):
    pytest.importorskip("moshi", reason="the peer")
    monkeypatch.setenv("NO_TORCH_COMPILE", "1")
    monkeypatch.setattr(bench, "CONFIG", bench.CONFIG | SMALL)
    for name, value in {"CONTEXT": 4, "FRAMES": 2, "ROWS": 1, "LENGTH": 12}.items():
        monkeypatch.setattr(bench, name, value)
    file = tmp_path / "x.json"
    main(["bench", "duplex", "--threads", "1", "--repeats", "1", "--json", str(file)])
    cases = {case["case"]: case for case in json.loads(file.read_text())["cases"]}
    assert list(cases) == ["0M, 2 steps of a session, one thread", EIGHT, "0M, 1 x 12 frames, a training step",
                           "0M, 1 x 12 frames, peak memory beside weights and AdamW"]
    assert all(case["ours"] > 0 and case["at_least"] >= 1 for case in cases.values())
    assert cases[EIGHT]["peer"] is None and cases[EIGHT]["ratio"] == pytest.approx(80 / cases[EIGHT]["ours"])


def test_eight_sessions_of_the_shipped_models_on_one_thread(monkeypatch):
    asked = []

    def timed(partner, count, steps):
        asked.append((partner.name, count, steps, torch.get_num_threads()))
        return 0.1
    monkeypatch.setattr(bench, "step_seconds", timed)
    (case,) = bench.sessions(3)
    assert asked == [("duplex_small", 8, 60, 1)]
    assert (case.case, case.ours, case.ratio, case.at_least, case.ok) == (EIGHT, 100, 0.8, 1, False)
