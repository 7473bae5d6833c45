"""`mm bench talk`: what it counts, and one short run against a small partner."""

import argparse
import json

import numpy as np
import pytest
import soundfile
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
    file, sound = tmp_path / "x.json", tmp_path / "q.wav"
    soundfile.write(sound, talking.speech(9), 24000)
    status = main(["bench", "talk", "--model", model, "--sounds", str(sound), "--seconds", "2", "--most", "1", "--json",
                   str(file)])
    told = json.loads(file.read_text())
    cases = {case["case"]: case for case in told["cases"]}
    held = cases["conversations that hold, at least 1"]
    assert told["bench"] == "talk" and status == (0 if held["ours"] >= 1 else 1)
    assert 0 < cases["1 at once: speech in to speech out, median"]["ours"] < 3000
    assert cases["1 at once: memory of the server at most"]["ours"] > 50


def test_each_speaker_says_something_else(tmp_path):
    def waves(path, most=3):
        return bench.spoken(argparse.Namespace(sounds=path, seconds=2, most=most))
    for i, side in enumerate(((0.1, 0.2), (0.3, 0.4))):
        soundfile.write(tmp_path / f"{i}.wav", np.tile(np.float32(side), (12000, 1)), 24000, subtype="FLOAT")
    assert [wave.tolist() for wave in waves(tmp_path)] == [pytest.approx([level] * 48000) for level in (
        0.15, 0.35, 0.15)]
    (tmp_path / "val.jsonl").write_text("\n".join(json.dumps({"path": f"{i}.wav"}) for i in range(2)))
    assert [wave[-1] for wave in waves(tmp_path / "val.jsonl", 2)] == pytest.approx([0.2, 0.4])  # the right channels
    noise = waves(None)
    assert noise[0].shape == (48000,) and noise[0].std() > 0.05
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="none holds no sounds"):
        waves(tmp_path / "none")


def test_a_server_that_does_not_start(tmp_path):
    with pytest.raises(InputError, match="the server did not start: mm: "):
        bench.talk(bench.Talk(model=str(tmp_path), seconds=1))
