"""`mm bench codec-quality` on a small codec and short sounds, and its figures by themselves."""

from __future__ import annotations

import json

import codec
import numpy as np
import pytest
import soundfile
import torch

from mm.errors import InputError
from mm.recipes.bench import codec_quality as bench
from mm.recipes.cli import main


def speech(seconds: float, seed: int = 0, rate: int = 24000) -> torch.Tensor:
    """Noise in syllables, which PESQ takes for an utterance."""
    random = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    return torch.from_numpy(0.1 * random.normal(size=len(t)) * (np.sin(2 * np.pi * 3 * t) > 0)).float()


@pytest.fixture
def room(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    codec.small(codec.SPEC).save_pretrained("model")
    (tmp_path / "clips" / "wavs").mkdir(parents=True)
    rows = ["file\tspeaker\ttext"]
    for i in range(4):
        soundfile.write(f"clips/wavs/{i}.flac", speech(1.0, i).numpy(), 24000)
        rows.append(f"{i}.flac\t{'AB'[i % 2]}\tword {i}")
    (tmp_path / "clips" / "transcripts.tsv").write_text("\n".join(rows))
    return tmp_path


def test_figures_of_every_speaker_beside_opus(room, capsys, monkeypatch):
    pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    monkeypatch.setattr(bench.Judge, "errors", lambda self, waves, texts: float(len(texts)))
    assert main(["bench", "codec-quality", "clips", "--model", "model", "--json", "out.json"]) == 0
    cases = {case["case"]: case for case in json.loads((room / "out.json").read_text())["cases"]}
    for speaker in "AB":
        assert cases[f"{speaker}, 2 clips: rate"]["ours"] == pytest.approx(0.6)
        for what in ("SI-SDR", "STOI", "PESQ", "mel distance"):
            case = cases[f"{speaker}, 2 clips: {what}"]
            assert np.isfinite(case["ours"]) and case["ours"] != case["peer"]
        assert cases[f"{speaker}, 2 clips: STOI"]["peer"] > cases[f"{speaker}, 2 clips: STOI"]["ours"]
        assert cases[f"{speaker}, 2 clips: word errors in the original"]["ours"] == 2
    assert 0 < cases["entries of the codebooks that occur"]["ours"] <= 100
    assert main(["bench", "codec-quality", "clips", "--model", "model", "--speakers", "C"]) == 2
    assert "holds no sounds of C" in capsys.readouterr().err


def test_clips_are_found_in_every_layout(room):
    assert [clip.text for clip in bench.chosen(room / "clips", ["B"], 9)] == ["word 1", "word 3"]
    assert len(bench.chosen(room / "clips", None, 1)) == 2
    (room / "clips" / "transcripts.tsv").unlink()
    assert [clip.text for clip in bench.chosen(room / "clips", None, 9)] == [None] * 4
    (room / "clips" / "metadata.csv").write_text('0|"Quoted, so|"Quoted, so\n2|Other|Other\n')
    assert [clip.text for clip in bench.chosen(room / "clips", None, 9)] == ['"Quoted, so', "Other"]
    (room / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no sounds"):
        bench.chosen(room / "empty", None, 9)


def test_figures_are_best_for_the_original():
    pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    judge, wave = bench.Judge(24000, None), speech(2.0)
    same, near = judge([wave], [wave], None), judge([wave + 0.02 * torch.randn_like(wave)], [wave], None)
    assert same["STOI"] > 0.99 and same["PESQ"] > 4.5 and same["mel distance"] == 0 and same["SI-SDR"] > 100
    assert near["STOI"] < same["STOI"] and near["PESQ"] < same["PESQ"] and 5 < near["SI-SDR"] < 20


def test_opus_is_small_and_as_long_as_the_original():
    wave = speech(4.0)
    out, size = bench.opus(wave, 24000)
    assert out.shape == wave.shape and 4000 < size * 8 / 4 < 12000 and out.abs().max() > 0.01


def test_perplexity_counts_codes():
    assert bench.perplexity(torch.tensor([[0, 1, 2, 3], [5, 5, 5, 5]]), 8) == pytest.approx((4 + 1) / 2)
