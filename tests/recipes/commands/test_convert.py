"""Checkpoints rewritten in every layout, opened by the libraries they are for, and refusals that lose nothing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mm.encoders import CLIP
from mm.errors import InputError
from mm.recipes.cli import main
from mm.recipes.commands.convert import Convert
from mm.recipes.common.command import parse
from mm.tokenizer.tokenizer import clip_tokenizer, train_bpe

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

TEXTS = ["a photo of a dog", "red apple"]


def convert(argv):
    return parse(Convert, "mm convert", argv).run() or 0


def redraw(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        model.logit_scale.fill_(1.5)
    return model.eval()


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A directory as transformers writes it, with pictures of 32 pixels and a tokenizer of its own."""
    folder, tokenizer = tmp_path_factory.mktemp("hf"), train_bpe(TEXTS * 2, 540)
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={**shared, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 12, "projection_dim": 16,
                     "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id},
        vision_config={**shared, "image_size": 32, "patch_size": 8, "projection_dim": 16}, projection_dim=16)
    redraw(transformers.CLIPModel(config)).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
                                    ).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))


def features(model, picture):
    with torch.inference_mode():
        return model(model.preprocess([picture]), model.tokenize(TEXTS))


def test_every_layout_gives_the_same_features(hf, picture, tmp_path, capsys):
    expected = features(CLIP.from_pretrained(hf), picture)
    source = hf
    for layout in ("open_clip", "mm", "hf"):
        target = tmp_path / layout / "made"
        assert convert([str(source), str(target), "--to", layout]) == 0
        for ours, theirs in zip(features(CLIP.from_pretrained(target), picture), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        told = capsys.readouterr().out
        assert f"{layout} layout" in told and "read back bit for bit" in told and "safetensors" in told
        assert [path.name for path in target.parent.iterdir()] == ["made"]
        source = target


def test_open_clip_opens_the_result(hf, picture, tmp_path):
    convert([str(hf), str(tmp_path / "x"), "--to", "open_clip"])
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'x'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'x'}")
    image, text = features(CLIP.from_pretrained(hf), picture)
    with torch.inference_mode():
        model.eval()
        torch.testing.assert_close(model.encode_image(preprocess(picture)[None]), image, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.encode_text(tokenizer(TEXTS)), text, atol=1e-5, rtol=1e-5)


def test_clips_own_tokenizer_needs_no_files(tmp_path):
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (tmp_path / "x").mkdir()
    (tmp_path / "x/open_clip_config.json").write_text(json.dumps(config))
    save_file(open_clip.model.CLIP(**config["model_cfg"]).state_dict(), tmp_path / "x/open_clip_model.safetensors")
    convert([str(tmp_path / "x"), str(tmp_path / "y"), "--to", "hf"])
    convert([str(tmp_path / "y"), str(tmp_path / "z"), "--to", "open_clip"])
    told = json.loads((tmp_path / "z/open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert "hf_tokenizer_name" not in told and CLIP.from_pretrained(tmp_path / "z").tokenizer is clip_tokenizer()


def test_transformers_opens_the_result(hf, picture, tmp_path):
    convert([str(hf), str(tmp_path / "mm"), "--to", "mm"])
    convert([str(tmp_path / "mm"), str(tmp_path / "x"), "--to", "hf"])
    model = transformers.CLIPModel.from_pretrained(tmp_path / "x").eval()
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")(
        TEXTS, padding="max_length", max_length=12, return_tensors="pt")["input_ids"]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "x", backend="pil")
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    image, text = features(CLIP.from_pretrained(hf), picture)
    with torch.inference_mode():
        out = model(input_ids=ids, pixel_values=pixels)
    torch.testing.assert_close(out.image_embeds, torch.nn.functional.normalize(image), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.text_embeds, torch.nn.functional.normalize(text), atol=1e-5, rtol=1e-5)


def test_what_the_layout_says_otherwise_is_told(hf, tmp_path, capsys):
    folder = tmp_path / "plain"
    folder.mkdir()
    for path in hf.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["clean"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    convert([str(folder), str(tmp_path / "x"), "--to", "open_clip"])
    told = capsys.readouterr().out
    assert "note: preprocessing: crop is round, was floor" in told and "has other ids" in told


def test_a_taken_directory_is_kept(hf, tmp_path):
    target = tmp_path / "taken"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not empty \(it holds notes.txt\); --force"):
        convert([str(hf), str(target), "--to", "mm"])
    with pytest.raises(InputError, match="more than a checkpoint"):
        convert([str(hf), str(target), "--to", "mm", "--force"])
    assert (target / "notes.txt").read_text() == "mine" and len(list(target.iterdir())) == 1
    with pytest.raises(InputError, match="is the checkpoint that is read"):
        convert([str(hf), str(hf), "--to", "mm", "--force"])
    with pytest.raises(InputError, match="is a file"):
        convert([str(hf), str(target / "notes.txt"), "--to", "mm"])


def test_force_replaces_a_checkpoint_whole(hf, tmp_path):
    target = tmp_path / "made"
    convert([str(hf), str(target), "--to", "mm"])
    convert([str(hf), str(target), "--to", "open_clip", "--force"])
    names = {path.name for path in target.iterdir()}
    assert "open_clip_config.json" in names and not names & {"preprocess.json", "config.json", "model.safetensors"}


def test_a_failed_conversion_leaves_the_old_one(hf, tmp_path, monkeypatch):
    target = tmp_path / "made"
    convert([str(hf), str(target), "--to", "mm"])
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    monkeypatch.setattr("mm.recipes.commands.convert.same", lambda a, b: False)
    with pytest.raises(InputError, match="nothing was written"):
        convert([str(hf), str(target), "--to", "hf", "--force"])
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_features_that_move_are_noticed(hf, tmp_path, monkeypatch):
    monkeypatch.setattr("mm.recipes.commands.convert.output_gap", lambda a, b: float("nan"))
    with pytest.raises(InputError, match="features from the mm layout"):
        convert([str(hf), str(tmp_path / "x"), "--to", "mm"])
    assert not (tmp_path / "x").exists()


def test_the_command_line(hf, tmp_path, capsys):
    assert main(["convert", str(tmp_path / "none"), str(tmp_path / "x"), "--to", "hf"]) == 2
    assert "none" in capsys.readouterr().err and not (tmp_path / "x").exists()
    assert main(["convert", str(hf), str(tmp_path / "x"), "--to", "hf"]) == 0
