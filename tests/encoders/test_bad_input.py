"""What cannot be a picture, a size or a head of a model: one sentence each, that names it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support import redraw

from mm.encoders import CLIP, ViT
from mm.encoders.spec import CLIPSpec, FlattenPool, Head, Patches, Projection, TextSpec, TokenPool, ViTSpec
from mm.encoders.vision.image import Preprocess
from mm.errors import InputError
from mm.spec import Attention, Layer, LayerNorm, Mlp, Stack

STACK = Stack(dim=16, layers=(Layer(mixer=Attention(heads=2, kv_heads=2, head_dim=8), mlp=Mlp(hidden=24)),),
              final_norm=LayerNorm())


def make(pool=None, image=(16, 16), **changes):
    head = Head(pool=pool or TokenPool(), proj=Projection(dim=5, bias=True))
    return redraw(ViT(ViTSpec(image=image, patches=Patches(size=(4, 4)), stack=STACK, head=head, **changes)))


@pytest.mark.parametrize(("size", "sentence"), [
    ((17, 16), "17 x 16 pixels is not a whole number of 4 x 4 patches: resize it to 16 x 16"),
    ((16, 18), "16 x 18 pixels is not a whole number"), ((3, 16), "has no whole patch of 4 x 4")])
def test_a_size_that_is_no_multiple_of_the_patch(size, sentence):
    with pytest.raises(InputError, match=sentence):
        make()(torch.randn(1, 3, *size))


def test_the_size_that_a_model_was_made_for_is_served_whatever_it_is():
    """SigLIP so400m reads 384 pixels in patches of 14: its convolution leaves the rest out."""
    net, pixels = make(image=(18, 17)), torch.randn(1, 3, 18, 17)
    torch.testing.assert_close(net(pixels), net(pixels[..., :16, :16]))


def test_patches_that_overlap_need_not_fill_the_picture():
    head = Head(pool=TokenPool())
    net = ViT(ViTSpec(image=(16, 16), patches=Patches(size=(4, 4), stride=(3, 3)), stack=STACK, head=head))
    assert net(torch.randn(1, 3, 18, 21)).shape == (1, 1 + 5 * 6, 16)


def test_a_grid_beyond_what_the_model_holds():
    with pytest.raises(InputError, match="made for 16 patches cannot serve 20"):
        make(FlattenPool(tokens=16), cls=0).encode(torch.randn(1, 3, 16, 20))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16"])
def test_gray_and_transparent_pictures_are_pictures(mode, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30), dtype=np.uint8)).convert(mode).save(path)
    assert Preprocess(size=(16, 16))(path).shape == (3, 16, 16)


def test_a_sliver_of_8_by_2000():
    pixels = Preprocess(size=(16, 16))(np.random.default_rng(0).integers(0, 255, (8, 2000, 3), dtype=np.uint8))
    assert make().encode(pixels[None]).isfinite().all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_pixels_that_are_no_numbers(bad):
    pixels = np.zeros((8, 8, 3), np.float32)
    pixels[2, 3] = bad
    with pytest.raises(InputError, match="float pixels run from"):
        Preprocess(size=(16, 16))(pixels)


def test_a_head_of_other_classes_than_the_weights(tmp_path):
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["spec"]["head"]["proj"]["dim"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"head.proj.bias should have shape \(7,\) by the config, but has \(5,\)"):
        ViT.from_pretrained(tmp_path)


def test_towers_that_do_not_meet():
    text = TextSpec(vocab=9, context=4, stack=STACK, head=Head(pool=TokenPool(), proj=Projection(dim=6)))
    with pytest.raises(InputError, match="image features are 5 wide and text features 6"):
        CLIP(CLIPSpec(image=make().spec, text=text))
