"""`mm features`: one row per picture, what changed alone written again, another model refused."""

import lancedb
import numpy as np
import pytest
import torch
from PIL import Image
from support import close, redraw

from mm.encoders import ViT
from mm.encoders.spec import Head, Patches, Projection, TokenPool, ViTSpec
from mm.encoders.vision.image import Preprocess
from mm.recipes.cli import main
from mm.spec import Attention, Layer, LayerNorm, Mlp, Stack


@pytest.fixture
def model(tmp_path):
    stack = Stack(dim=16, layers=(Layer(mixer=Attention(heads=2, kv_heads=2, head_dim=8), mlp=Mlp(hidden=24)),) * 2,
                  final_norm=LayerNorm())
    net = redraw(ViT(ViTSpec(image=(16, 16), patches=Patches(size=(4, 4)), stack=stack,
                             head=Head(pool=TokenPool(), proj=Projection(dim=3, bias=True)))))
    net.preprocessing = Preprocess(size=(16, 16))
    net.save_pretrained(tmp_path / "model")
    return net


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", "deep/it's.png")):
        pixels = np.random.default_rng(i).integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


def run(tmp_path, *more):
    return main(["features", str(tmp_path / "photos"), "--model", str(tmp_path / "model"), "--to",
                 str(tmp_path / "f.lance"), "--batch", "2", *more])


def rows(tmp_path):
    table = lancedb.connect(tmp_path / "f.lance").open_table("features")
    return table.schema, {row["path"]: row for row in table.to_arrow().to_pylist()}


def test_vectors_and_maps_of_every_readable_picture(model, photos, tmp_path, capsys):
    assert run(tmp_path, "--layers", "0", "-1") == 0
    out, err = capsys.readouterr()
    assert out == "wrote 3, unchanged 0, skipped 1 (bad)\n" and "bad.png" in err
    schema, found = rows(tmp_path)
    assert set(found) == {"a.png", "b.jpg", "deep/it's.png"}
    pixels = model.preprocess(photos / "a.png")[None]
    with torch.no_grad():
        close(torch.tensor(found["a.png"]["vector"]), model.pool(model(pixels))[0])
        shape = [int(n) for n in schema.field("layer_-1").metadata[b"shape"].split()]
        close(torch.tensor(found["a.png"]["layer_-1"]).view(shape), model(pixels, features=[-1])[0][0])


def test_again_writes_only_what_changed(model, photos, tmp_path, capsys):
    run(tmp_path)
    before = rows(tmp_path)[1]
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(photos / "a.png")
    (photos / "deep" / "it's.png").unlink()
    capsys.readouterr()
    assert run(tmp_path) == 0
    assert capsys.readouterr().out == "wrote 1, unchanged 1, skipped 1 (bad)\n"
    after = rows(tmp_path)[1]
    assert set(after) == {"a.png", "b.jpg"} and after["b.jpg"] == before["b.jpg"]
    assert after["a.png"]["vector"] != before["a.png"]["vector"]


def test_another_model_layers_or_place_are_refused(model, photos, tmp_path, capsys):
    run(tmp_path)
    assert run(tmp_path, "--layers", "0") == 2
    assert "holds features with layers" in capsys.readouterr().err
    redraw(model).save_pretrained(tmp_path / "model")
    assert run(tmp_path) == 2
    assert "holds features with fingerprint" in capsys.readouterr().err
    assert main(["features", str(photos), "--model", str(tmp_path / "model"), "--to", str(tmp_path / "f.txt")]) == 2
    assert "should end in .lance" in capsys.readouterr().err
    assert run(tmp_path, "--layers", "7", "--to", str(tmp_path / "g.lance")) == 2
    assert "block 7 of 2" in capsys.readouterr().err


def test_a_folder_without_pictures(model, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    assert run(tmp_path) == 2 and "holds no pictures" in capsys.readouterr().err
