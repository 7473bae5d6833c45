"""Any of timm's models as a CLIP's image tower: features, directories, training, sizes, refusals."""

import pytest
import timm
import torch
from support import close, redraw

from mm.encoders import CLIP
from mm.encoders.clip import build_image_tower
from mm.encoders.spec import CLIPSpec, Head, Projection, TextSpec, TokenPool
from mm.encoders.vision.backbone import Backbone, backbone_spec
from mm.encoders.vision.flex import Flex
from mm.errors import InputError
from mm.spec import CAUSAL, Attention, Layer, LayerNorm, Mlp, Stack
from mm.spec.schema import from_json, to_json

MODELS = {
    "test_resnet": {}, "test_convnext": {"head": "mlp", "bias": True}, "test_efficientnet": {"bias": True},
    "test_mambaout": {}, "swin_tiny_patch4_window7_224": {
        "image": (64, 64), "img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)},
    "vit_relpos_small_patch16_224": {
        "image": (32, 32), "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "pool": "avg"}}


def pair(name, **changes):
    mixer = Attention(heads=2, kv_heads=2, head_dim=8, window=CAUSAL)
    stack = Stack(dim=16, layers=(Layer(mixer=mixer, mlp=Mlp(hidden=24)),), final_norm=LayerNorm())
    words = TextSpec(vocab=40, context=6, stack=stack, head=Head(pool=TokenPool(), proj=Projection(dim=12)))
    return CLIPSpec(image=backbone_spec(name, 12, **changes), text=words)


@pytest.mark.parametrize("name", MODELS)
def test_features_are_timms_and_come_back_from_disk(name, tmp_path):
    """What no file holds (Swin's index tables) is right after loading; running statistics of norms are kept."""
    settings = pair(name, **MODELS[name])
    clip = redraw(CLIP(settings))
    for buffer in clip.buffers():
        if buffer.is_floating_point() and buffer.ndim == 1:
            buffer.uniform_(0.5, 1.5)
    arguments = {key: value for key, value in MODELS[name].items() if key not in ("image", "head", "bias", "pool")}
    reference = timm.create_model(name, num_classes=0, **arguments).eval()
    reference.load_state_dict(clip.image.trunk.state_dict())
    x, ids = torch.randn(2, 3, *settings.image.image), torch.randint(0, 40, (2, 6))
    with torch.no_grad():
        close(clip.encode_image(x), clip.image.head(reference(x)))
        assert clip.encode_image(x).shape == (2, 12)
        clip.save_pretrained(tmp_path)
        again = CLIP.from_pretrained(tmp_path)
        assert again.spec == clip.spec == from_json(to_json(settings)) and again.fingerprint() == clip.fingerprint()
        for mine, other in zip(again(x, ids), clip(x, ids), strict=True):
            close(mine, other)


def test_it_trains():
    clip = CLIP(pair("test_resnet")).train()
    image, text = clip(torch.randn(3, 3, 64, 96), torch.randint(0, 40, (3, 6)))
    (image * text).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in clip.image.parameters())
    assert clip.image.trunk.conv1[0].weight.grad.abs().sum() > 0


def test_arguments_and_names_that_open_clip_cannot_hold(tmp_path):
    clip = CLIP(pair("test_resnet", drop_path_rate=0.1))
    with pytest.raises(InputError, match="no place for the arguments of timm's test_resnet, such as drop_path_rate"):
        clip.save_pretrained(tmp_path / "no", layout="open_clip")
    with pytest.raises(InputError, match="test_mambaout to end 64 wide, and it is 256 wide"):
        CLIP(pair("test_mambaout")).save_pretrained(tmp_path / "no", layout="open_clip")
    with pytest.raises(InputError, match="CLIP's own ViT cannot hold timm's test_resnet"):
        clip.save_pretrained(tmp_path / "no", layout="hf")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"name": "resnet_nobody"}, "timm cannot make 'resnet_nobody'"),
    ({"name": "test_resnet", "nonsense": 3}, "timm cannot make 'test_resnet'.*nonsense"),
    ({"name": "test_resnet", "head": "none"}, "features of width .*, and no head makes 12")])
def test_towers_that_timm_does_not_make(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        backbone_spec(dim=12, **changes)


@pytest.mark.parametrize(("pixels", "sentence"), [
    (torch.randn(1, 4, 32, 32), r"pixels should be \(B, 3, h, w\)"), (torch.randn(3, 32, 32), "pixels should be"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "floating-point"),
    (torch.randn(1, 3, 50, 32), "of 32 x 32 pixels cannot serve 50 x 32"),
    (Flex(torch.randn(1, 4, 192), ((2, 2),)), "of one size, not pictures of several")])
def test_pixels_that_it_cannot_serve(pixels, sentence):
    tower = build_image_tower(pair("vit_relpos_small_patch16_224", **MODELS["vit_relpos_small_patch16_224"]).image)
    assert isinstance(tower, Backbone)
    with pytest.raises(InputError, match=sentence):
        tower.encode(pixels)


def test_a_pool_that_leaves_a_map():
    tower = build_image_tower(backbone_spec("test_resnet", 96, head="none", pool=""))
    with pytest.raises(InputError, match="not one vector a picture"):
        tower.encode(torch.randn(1, 3, 64, 64))
