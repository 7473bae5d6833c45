"""`mm info` and `mm convert` of codecs, in every layout."""

import json

import codec
import pytest
import torch

from mm.codecs import Mimi
from mm.codecs.families.mimi import OFFICIAL
from mm.recipes.cli import main
from mm.recipes.commands.info_codec import codec_facts, count_parameters

LAYOUTS = ("mm", "kyutai", "kyutai_memory", "hf", "hf_halves")


def test_the_official_size():
    """79.3 M parameters, and 0.43 GFLOP either way for a frame of 80 ms."""
    with torch.device("meta"):
        model = Mimi(OFFICIAL)
    counts = count_parameters(model)
    assert counts["encoder layers"] == counts["decoder layers"] and counts["entries of codebooks"] == 32 * 2048 * 256
    assert sum(counts.values()) == 79_308_609 + 32 * 2048 * 256
    facts = codec_facts(model)
    assert (facts["rate"], facts["frame"], facts["bits_per_second"]) == (24000, 1920, 137.5)
    assert facts["stack"]["remembers"] == 10 and 19e6 < facts["stream_bytes"] < 20e6
    assert 0.42e9 < facts["flops"]["encode"] < 0.47e9 and 0.42e9 < facts["flops"]["decode"] < 0.45e9


def test_every_layout_is_told_and_made_into_the_next(tmp_path, capsys):
    model = codec.small(codec.SPEC)
    model.save_pretrained(tmp_path / LAYOUTS[-1], LAYOUTS[-1])
    source = LAYOUTS[-1]
    for layout in LAYOUTS:
        assert main(["convert", str(tmp_path / source), str(tmp_path / layout / "made"), "--to", layout]) == 0
        told = capsys.readouterr().out
        assert f"{layout} layout" in told and "latents and waves equal" in told
        source = f"{layout}/made"
        assert main(["info", str(tmp_path / source), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["layout"] == layout
        for name, value in Mimi.from_pretrained(tmp_path / source).state_dict().items():
            assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize("layout", ["kyutai", "kyutai_memory"])
def test_a_single_file_for_a_person(tmp_path, capsys, monkeypatch, layout):
    monkeypatch.setenv("COLUMNS", "200")
    codec.small(codec.SPEC).save_pretrained(tmp_path, layout)
    assert main(["info", str(tmp_path / "mimi.safetensors")]) == 0
    told = capsys.readouterr().out
    for part in (f"Mimi in the {layout} layout", "24,000 Hz, mono, 12.5 frames", "8 of 64 entries", "0.6 in all",
                 "2 layers of width 32", "0.4 s remembered", "MB of state", "MFLOP to encode"):
        assert part in " ".join(told.split()), part


def test_a_codec_beside_a_language_model_is_not_it(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert main(["info", str(tmp_path / "model.safetensors")]) == 2
    assert "safetensors" in capsys.readouterr().err
