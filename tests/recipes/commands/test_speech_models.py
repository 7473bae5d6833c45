"""`mm info` and `mm convert` of models that speak."""

import json

import codec
import duplex
import pytest
import talking
import torch

from mm import DuplexLM
from mm.codecs import Mimi
from mm.errors import InputError
from mm.recipes.cli import main
from mm.recipes.commands.info_speech import count_parameters
from mm.recipes.talk.partner import Partner
from mm.speech.families.moshi import OFFICIAL, to_spec


@torch.no_grad()
def test_moshis_published_size():
    """7.688 billion parameters, of which the depth transformer's layers have 616.6 million."""
    with torch.device("meta"):
        counts = count_parameters(DuplexLM(to_spec(OFFICIAL, "test")))
    assert sum(counts.values()) == 7_687_729_152
    assert counts["temporal layers"] == 6_576_934_912 and counts["depth layers"] == 616_574_976


@pytest.fixture
def saved(tmp_path):
    model = duplex.small(delays=(0, 0, 1, 1, 1, 0, 1, 1, 1), depth=None, context=6)
    model.save_pretrained(tmp_path / "stt", layout="kyutai")
    duplex.small(extra=(3, 2)).save_pretrained(tmp_path / "duplex")
    return tmp_path


def test_a_report(saved, capsys):
    assert main(["info", str(saved / "duplex"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["family"], report["layout"]) == ("duplex model", "mm")
    assert report["streams"] == {"own": 4, "heard": 2, "delays": [0, 0, 2, 2, 2, 0, 2]}
    assert report["session_bytes"] == 2 * 2 * 2 * 7 * 8 * 4  # layers, keys and values, heads, slots, width, bytes
    assert main(["info", str(saved / "stt")]) == 0
    told = capsys.readouterr().out
    assert "0 codebooks said, 8 heard" in told and "kyutai layout" in told


def test_layouts(saved, capsys):
    assert main(["convert", str(saved / "duplex"), str(saved / "kyutai"), "--to", "kyutai"]) == 2
    assert "cannot hold this model" in capsys.readouterr().err
    assert main(["convert", str(saved / "stt"), str(saved / "mm"), "--to", "mm"]) == 0
    assert DuplexLM.from_pretrained(saved / "mm").fingerprint() == DuplexLM.from_pretrained(
        saved / "stt").fingerprint()


def test_a_codec_beside_a_model_goes_with_it(tmp_path, capsys):
    source, target = talking.written(tmp_path / "source"), tmp_path / "target"
    for more in ([], ["--force"]):
        assert main(["convert", str(source), str(target), "--to", "mm", *more]) == 0
        told = capsys.readouterr().out
        assert "codec/model.safetensors" in told and "note: codec" not in told
        assert Partner.open(str(target)).codec.fingerprint() == talking.partner().codec.fingerprint()
    (target / "codec" / "config.json").unlink()
    assert main(["convert", str(source), str(target), "--to", "mm", "--force"]) == 2
    assert "holds more than a checkpoint (codec)" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["kyutai", "mm"])
def test_kyutais_codec_goes_with_its_model(tmp_path, capsys, layout):
    talking.as_kyutai(tmp_path)
    before = Partner.open(str(tmp_path))
    assert main(["convert", str(tmp_path), str(tmp_path / "new"), "--to", layout]) == 0
    assert "note: codec" not in capsys.readouterr().out
    after = Partner.open(str(tmp_path / "new"))
    assert after.codec.fingerprint() == before.codec.fingerprint()
    assert after.model.tokenizer.encode("hi there") == before.model.tokenizer.encode("hi there")


def test_where_a_codec_is_after_a_conversion_is_told(saved, capsys):
    def told(generation, layout):
        model = DuplexLM.from_pretrained(saved / "stt")
        model.generation = generation
        model.save_pretrained(saved / "named", "kyutai" if "mimi_name" in generation else "mm")
        assert main(["convert", str(saved / "named"), str(saved / layout), "--to", layout, "--force"]) == 0
        return capsys.readouterr().out
    note = {"codec_config": {"name": "codec_small", "weights": "0", "frame_rate": 12.5}}
    assert "note: codec: codec_small does not come along; mm talk takes it with --codec" in told(note, "kyutai")
    assert "note" not in told(note, "mm") and "note" not in told({}, "kyutai")
    assert "note: codec: mimi.safetensors does not come along" in told({"mimi_name": "mimi.safetensors"}, "mm")
    sound = codec.small(codec.SPEC)
    sound.save_pretrained(saved / "named" / "codec")
    assert "note: codec: in the folder codec, where only this package looks" in told({}, "kyutai")
    assert Mimi.from_pretrained(saved / "kyutai" / "codec").fingerprint() == sound.fingerprint()


def test_a_file_that_is_no_moshi_is_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="does not hold a Moshi"):
        DuplexLM.from_pretrained(tmp_path / "x.safetensors")
