"""`mm export`."""

import importlib.util
import json

import pytest

from mm.recipes.cli import main

MODEL = "recipes/weights/emoji_clip"


@pytest.mark.parametrize(("flag", "end"), [("--onnx", "onnx"), ("--torch-export", "pt2")])
def test_clip_towers_equal_the_model_at_another_batch_size(tmp_path, capsys, flag, end):
    assert main(["export", MODEL, flag, str(tmp_path / "out")]) == 0
    assert {f"image.{end}", f"text.{end}", "preprocessing.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert json.loads((tmp_path / "out" / "preprocessing.json").read_text())["kind"] == "clip"
    assert "batch of 3" in capsys.readouterr().out


def test_a_taken_target_and_a_missing_package_are_one_sentence(tmp_path, capsys, monkeypatch):
    (tmp_path / "there").write_text("")
    assert main(["export", MODEL, "--onnx", str(tmp_path)]) == 2
    assert "new or empty" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["export", MODEL, "--onnx", str(tmp_path / "out")]) == 2
    assert "pip install onnx" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
