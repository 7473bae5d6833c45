"""What a ViT can do beside pixels to tokens: feature maps, rotary coordinates, native sizes, its own directory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import close, redraw

from mm.encoders import CLIP, ViT, open_model
from mm.encoders.spec import (
    CentredGrid,
    CLIPSpec,
    Head,
    IndexGrid,
    MaxPool,
    MeanPool,
    Patches,
    ProbePool,
    Projection,
    TextSpec,
    TokenPool,
    ViTSpec,
)
from mm.encoders.vision.flex import Flex, flex_batch
from mm.errors import InputError
from mm.spec import Attention, Axial, Layer, LayerNorm, Mixed, Mlp, Rope, Stack

ROTATIONS = {
    "none": (None, None),
    "index": (Rope(theta=100.0, axes=Axial()), IndexGrid(order="xy", offset=1.0)),
    "stretched": (Rope(layout="interleaved", axes=Axial()), IndexGrid(reference=(4, 4))),
    "centred": (Rope(theta=100.0, frequency=6.283, axes=Axial()), CentredGrid()),
    "mixed": (Rope(theta=10.0, axes=Mixed()), IndexGrid()),
}


def make(rotations="none", registers=2, pool=None, patch_dropout=0.0, proj=5):
    rope, coords = ROTATIONS[rotations]
    mixer = Attention(heads=2, kv_heads=2, head_dim=8, rope=rope)
    stack = Stack(dim=16, layers=(Layer(mixer=mixer, mlp=Mlp(hidden=24)),) * 3, final_norm=LayerNorm())
    head = Head(pool=pool or TokenPool(), proj=Projection(dim=proj, bias=True))
    return redraw(ViT(ViTSpec(image=(16, 16), patches=Patches(size=(4, 4)), stack=stack, head=head, coords=coords,
                              registers=registers, patch_dropout=patch_dropout)))


@pytest.mark.parametrize("rotations", ROTATIONS)
def test_feature_maps_are_the_residual_stream_on_the_grid(rotations):
    net, pixels = make(rotations), torch.randn(2, 3, 20, 12)
    seen = {}
    for i, block in enumerate(net.stack.blocks):
        block.register_forward_hook(lambda module, args, y, i=i: seen.setdefault(i, y))
    net(pixels)
    maps = net(pixels, features=[0, -1])
    assert [y.shape for y in maps] == [(2, 16, 5, 3)] * 2
    for y, i in zip(maps, (0, 2), strict=True):
        close(y[1, :, 4, 1], seen[i][1, 3 + 4 * 3 + 1])


def test_a_block_that_is_not_there_is_named():
    with pytest.raises(InputError, match="block 3 of 3"):
        make()(torch.randn(1, 3, 16, 16), features=[3])


@pytest.mark.parametrize("pool", [TokenPool(), MeanPool(), MaxPool(), ProbePool(heads=2, mlp=Mlp(hidden=24))])
@pytest.mark.parametrize("rotations", ROTATIONS)
def test_pictures_of_several_sizes_in_one_batch_equal_one_by_one(rotations, pool):
    net = make(rotations, pool=pool)
    pictures = [torch.randn(3, h, w) for h, w in ((16, 16), (8, 24), (4, 4))]
    together = net.encode(flex_batch(pictures, net.spec.patches, 20))
    for picture, features in zip(pictures, together, strict=True):
        close(net.encode(picture[None])[0], features)


@given(sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4))
def test_any_sizes_pack_and_pad(sizes):
    pictures = [torch.randn(3, 4 * h, 4 * w) for h, w in sizes]
    batch = flex_batch(pictures, Patches(size=(4, 4)))
    assert batch.sizes == tuple(sizes) and batch.real.sum(1).tolist() == [h * w for h, w in sizes]
    assert not batch.patches[~batch.real].any()


def test_patches_that_are_cut_already_project_as_pixels_do():
    net, pixels = make(), torch.randn(2, 3, 12, 8)
    close(net.patchify(flex_batch(list(pixels), net.spec.patches)), net.patchify(pixels))


@pytest.mark.parametrize(("pictures", "length", "sentence"), [
    ([torch.randn(3, 8, 9)], None, "picture 0 of 8 x 9 pixels is not a whole number of 4 x 4 patches"),
    ([torch.randn(3, 8, 8), torch.randn(1, 8, 8)], None, r"picture 1 should be \(3, h, w\)"),
    ([torch.randn(3, 8, 8)], 3, "a picture has 4 patches, and the batch has room for 3"),
    ([], None, "at least one picture"),
])
def test_pictures_that_do_not_fit_a_batch(pictures, length, sentence):
    with pytest.raises(InputError, match=sentence):
        flex_batch(pictures, Patches(size=(4, 4)), length)


def test_foreign_patches_are_refused():
    with pytest.raises(InputError, match=r"patches should be \(B, N, 48\)"):
        make()(Flex(torch.randn(1, 4, 40), ((2, 2),)))
    with pytest.raises(InputError, match="do not fit patches"):
        make()(Flex(torch.randn(1, 4, 48), ((2, 3),)))


@pytest.mark.parametrize("rotations", ROTATIONS)
def test_dropped_patches_take_their_coordinates_along(rotations):
    """All patches but a few dropped: what stays is as if the others had been padding from the start."""
    net = make(rotations, patch_dropout=0.5, pool=MeanPool()).train()
    pixels = torch.randn(2, 3, 16, 16)
    torch.manual_seed(3)
    x = net.embed(pixels)
    assert x.tokens.shape == (2, 3 + 8, 16)
    torch.manual_seed(3)
    chosen = torch.rand(2, 16).topk(8).indices
    whole = net.eval().embed(pixels)
    close(x.tokens[1, 3:], whole.tokens[1, 3 + chosen[1]])
    if rotations != "none":
        close(x.at.coords[1, 3:], whole.at.coords[0, 3 + chosen[1]])


def test_centred_coordinates_move_while_training_only():
    net = make("centred")
    settings = ViTSpec(**{**vars(net.spec), "coords": CentredGrid(shift=0.5, rescale=2.0)})
    moved, pixels = ViT(settings), torch.randn(1, 3, 16, 16)
    moved.load_state_dict(net.state_dict())
    close(moved.eval()(pixels), net(pixels))
    first, second = moved.train().embed(pixels).at.coords, moved.embed(pixels).at.coords
    assert not torch.equal(first, second) and not first[:, :3].any()


@pytest.mark.parametrize("rotations", ROTATIONS)
def test_its_own_directory_gives_back_the_same_model(rotations, tmp_path):
    net = make(rotations)
    net.labels = tuple("abcde")
    net.save_pretrained(tmp_path)
    again, pixels = open_model(tmp_path), torch.randn(1, 3, 16, 16)
    assert type(again) is ViT and again.spec == net.spec and again.labels == net.labels
    assert again.fingerprint() == ViT.from_pretrained(tmp_path).fingerprint()
    close(again.encode(pixels), net.encode(pixels), 1e-6)


def test_the_image_tower_of_a_clip_is_a_vit(tmp_path):
    net = make(proj=6)
    stack = Stack(dim=16, layers=net.spec.stack.layers[:1], final_norm=LayerNorm())
    words = TextSpec(vocab=9, context=4, stack=stack, head=Head(pool=TokenPool(), proj=Projection(dim=6)))
    clip = redraw(CLIP(CLIPSpec(image=net.spec, text=words)))
    clip.save_pretrained(tmp_path)
    tower, pixels = ViT.from_pretrained(tmp_path), torch.randn(1, 3, 16, 16)
    close(tower.encode(pixels), clip.encode_image(pixels), 1e-6)
    assert tower.preprocessing == clip.preprocessing and type(open_model(tmp_path)) is CLIP


def test_rope_and_coordinates_go_together():
    with pytest.raises(InputError, match="rotary layers exactly when it has coords"):
        ViTSpec(**{**vars(make("index").spec), "coords": None})
