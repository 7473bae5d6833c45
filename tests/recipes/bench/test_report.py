"""How benchmarks measure and report, and the search benchmark at a small size."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mm.errors import InputError
from mm.recipes.bench import search
from mm.recipes.bench.report import Case, Timing, interleave, report


def test_both_take_turns_and_no_one_is_always_first():
    calls: list[str] = []
    timing = interleave(lambda: calls.append("o"), lambda: calls.append("p"), repeats=4, warmup=1)
    assert "".join(calls) == "op" + "oppo" * 2
    assert timing.ours > 0 and timing.ratio == timing.peer / timing.ours


def test_a_case_passes_from_its_threshold_on():
    timing = Timing(ours=2.0, peer=3.0)
    assert timing.ratio == 1.5
    assert Case.timed("a", timing, at_least=1.5).ok and not Case.timed("a", timing, at_least=1.6).ok
    assert Case(case="told", ours=1.0, unit="s").ok
    with pytest.raises(InputError, match="'a' has a threshold but no ratio"):
        Case(case="a", ours=1.0, unit="s", at_least=1.0)


def test_a_limit_holds_up_to_itself():
    assert [(case.case, case.ratio, case.ok) for case in (Case.limited("step", ms, 80) for ms in (40, 80, 160))] == [
        ("step, at most 80 ms", 2, True), ("step, at most 80 ms", 1, True), ("step, at most 80 ms", 0.5, False)]


def test_what_could_not_be_measured_is_a_line_too(tmp_path):
    """A peer that cannot is only told; without a number of our own the report falls short."""
    peer = Case(case="a", ours=1.0, unit="s", at_least=2.0, note="the peer cannot: out of memory")
    own = Case(case="b", ours=None, unit="s", note="fails: out of memory")
    assert peer.ok and not own.ok
    assert report("toy", [peer, own], packages=[], json_file=str(tmp_path / "toy.json")) == 1
    told = json.loads((tmp_path / "toy.json").read_text())["cases"]
    assert told[0]["note"] == "the peer cannot: out of memory" and told[1]["ours"] is None


def test_the_report_prints_writes_and_returns_the_status(tmp_path, capsys):
    good = Case.timed("fast", Timing(ours=1.0, peer=6.0), at_least=5.0)
    bad = Case(case="recall", ours=0.9, peer=1.0, ratio=0.9, at_least=0.95, unit="share")
    assert report("toy", [good], packages=["numpy"]) == 0
    assert report("toy", [good, bad], packages=["numpy"], json_file=str(tmp_path / "toy.json")) == 1
    assert "SHORT" in capsys.readouterr().out
    told = json.loads((tmp_path / "toy.json").read_text())
    assert set(told) == {"bench", "machine", "versions", "threads", "cases"}
    assert told["bench"] == "toy" and told["versions"]["numpy"] == np.__version__ and told["threads"] >= 1
    assert told["cases"][1] == {
        "case": "recall", "ours": 0.9, "peer": 1.0, "ratio": 0.9, "at_least": 0.95, "ok": False, "unit": "share"
    }
    endless = Case(case="delay", ours=float("inf"), unit="s", ratio=0.0, at_least=1.0)
    assert report("toy", [endless], packages=[], json_file=str(tmp_path / "toy.json")) == 1
    told = json.loads((tmp_path / "toy.json").read_text(), parse_constant=pytest.fail)  # JSON has no Infinity
    assert told["cases"][0]["ours"] is None and "inf" in capsys.readouterr().out
    with pytest.raises(InputError, match="cannot be written"):
        report("toy", [good], packages=[], json_file=str(tmp_path / "no/toy.json"))


def test_the_search_benchmark_asks_both_the_same(tmp_path):
    cases = {case.case: case for case in search.measure(tmp_path, rows=3000, queries=20)}
    assert cases["recall@10"].ours == 1.0  # below the partitioned size every row is compared
    assert cases["query, 3,000 x 512"].at_least == 5.0


def test_the_vectors_are_the_clusters_that_are_claimed():
    chunks = list(search.unit_vectors(30_000, 20_000, seed=0))
    assert [len(chunk) for chunk in chunks] == [20_000, 10_000]
    vectors = np.concatenate(chunks)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors[:100], axis=1), 1.0, atol=1e-5)
    cosines = np.sort(vectors[:50] @ vectors.T, axis=1)
    assert np.median(cosines[:, -2]) == pytest.approx(0.8, abs=0.03)  # two of a cluster: 1 / (1 + 0.5 ** 2)
    assert not np.array_equal(vectors[:20], next(search.unit_vectors(20, 20, seed=1)))
