"""`mm bench codec` on a small codec: the cases and what they compare, never the times."""

from argparse import Namespace

import codec as small
import pytest
import torch

from mm.recipes.bench import codec

NAMES = ["stream, 1 thread", "the same, 99th percentile", "stream in real time, at most 60 ms",
         "stream, int8 transformers, at most 40 ms", "8 streams in one step, at most 180 ms", "state of one stream",
         "int8: codes as in fp32", "int8: waves over their difference from fp32"]


def test_cases(tmp_path, monkeypatch):
    pytest.importorskip("moshi", reason="the peer")
    monkeypatch.setenv("NO_TORCH_COMPILE", "1")
    monkeypatch.setattr(codec, "SECONDS", 1)
    official = small.official()
    monkeypatch.setattr(codec, "official_model", lambda: official)
    small.write_kyutai(official, tmp_path)
    with torch.no_grad():
        cases = codec.measure(Namespace(frames=13, repeats=1), tmp_path)
    torch.set_num_threads(1)
    assert [case.case for case in cases[:8]] == NAMES
    assert [case.case for case in cases[8:]] == [f"{name} 1 s at once, 2 threads" for name in ("encode", "decode")]
    assert cases[6].ours > 80 and cases[7].ours > 30  # 8 bits change little


def test_without_the_peer(monkeypatch, capsys):
    import sys

    from mm.recipes.cli import main

    monkeypatch.setitem(sys.modules, "moshi.models", None)
    assert main(["bench", "codec"]) == 2
    assert "this needs the official package" in capsys.readouterr().err
