"""`mm bench talk`: what it counts, and one short run against a small partner."""

import json

import pytest
import talking

from mm.errors import InputError
from mm.recipes.bench import talk as bench
from mm.recipes.cli import main


def test_what_is_counted():
    said = [0.08 * i for i in range(40)]
    prompt = bench.Speaker(said=said, answered=[at + 0.03 for at in said[1:]], lag=1)
    assert prompt.latencies() == pytest.approx([0.03] * 27) and prompt.on_time() == [True] * 27
    late = bench.Speaker(said=said, answered=[at + (0.03 if i < 30 else 0.5) for i, at in enumerate(said[1:])], lag=1)
    assert late.on_time() == [True] * 18 + [False] * 9
    lost = bench.Speaker(said=said, answered=[at + 0.03 for at in said[1:31]], lag=1)
    assert lost.on_time() == [True] * 18 + [False] * 9 and len(lost.latencies()) == 18


def test_a_short_run(tmp_path):
    model = str(talking.written(tmp_path / "model"))
    file = tmp_path / "x.json"
    status = main(["bench", "talk", "--model", model, "--seconds", "2", "--most", "1", "--json", str(file)])
    told = json.loads(file.read_text())
    cases = {case["case"]: case for case in told["cases"]}
    held = cases["conversations that hold, at least 1"]
    assert told["bench"] == "talk" and status == (0 if held["ours"] >= 1 else 1)
    assert 0 < cases["1 at once: speech in to speech out, median"]["ours"] < 3000
    assert cases["1 at once: memory of the server at most"]["ours"] > 50


def test_a_server_that_does_not_start(tmp_path):
    with pytest.raises(InputError, match="the server did not start: mm: "):
        bench.talk(["--model", str(tmp_path), "--seconds", "1"])
