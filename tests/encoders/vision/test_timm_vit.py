"""timm's VisionTransformer in both directions: augreg, CLIP, SigLIP, DeiT, DINOv2, at several sizes."""

import json

import pytest
import torch
from support import close, redraw
from timm_models import SMALL, references, reopened

from mm.encoders import ViT
from mm.encoders.spec import GridTable, MeanPool, PrefixPool
from mm.encoders.vision.families.timm_common import blueprint
from mm.encoders.vision.families.timm_naflex import TIMM_NAFLEX
from mm.encoders.vision.families.timm_vit import TIMM_VIT
from mm.errors import InputError

timm = pytest.importorskip("timm")

KINDS = {
    "augreg": ("vit_base_patch16_224", {"num_classes": 7}),
    "augreg features": ("vit_base_patch16_224", {"num_classes": 0}),
    "gap": ("vit_base_patch16_224", {"num_classes": 7, "global_pool": "avg"}),
    "mean and max": ("vit_base_patch16_224", {"num_classes": 7, "global_pool": "avgmax"}),
    "registers with positions": ("vit_base_patch16_224", {"num_classes": 7, "reg_tokens": 2}),
    "no final norm": ("vit_base_patch16_224", {"num_classes": 7, "final_norm": False, "init_values": 0.1}),
    "gap with prefix": ("vit_base_patch16_224", {"global_pool": "avg", "pool_include_prefix": True, "num_classes": 7}),
    "clip": ("vit_base_patch16_clip_224", {"num_classes": 7}),
    "clip quickgelu": ("vit_base_patch16_clip_quickgelu_224", {"num_classes": 7}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "siglip tanh": ("vit_giantopt_patch16_siglip_256", {"mlp_ratio": 3.7362}),
    "probe beside a class token": ("vit_base_patch16_224", {"global_pool": "map", "reg_tokens": 2, "num_classes": 0}),
    "probe of all": ("vit_base_patch16_224", {"global_pool": "map", "pool_include_prefix": True, "num_classes": 5}),
    "siglip gap": ("vit_base_patch16_siglip_gap_224", {}),
    "deit3": ("deit3_base_patch16_224", {"num_classes": 7}),
    "deit": ("deit_base_patch16_224", {"num_classes": 7}),
    "distilled": ("deit_base_distilled_patch16_224", {"num_classes": 7}),
    "distilled features": ("deit_base_distilled_patch16_224", {"num_classes": 0}),
    "dinov2": ("vit_base_patch14_dinov2", {}),
    "dinov2 registers": ("vit_base_patch14_reg4_dinov2", {"num_classes": 7}),
    "dinov2 giant": ("vit_giant_patch14_reg4_dinov2", {"mlp_ratio": 5.5}),
    "qk norm": ("vit_base_patch16_224", {"qk_norm": True, "qkv_bias": False, "num_classes": 3}),
    "no positions": ("vit_base_patch16_224", {"pos_embed": "none", "num_classes": 3}),
    "gray": ("vit_base_patch16_224", {"in_chans": 1, "num_classes": 3}),
}


theirs = references(KINDS, SMALL, 0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_both_directions(kind, theirs, tmp_path):
    reference, _, ours = theirs(kind)
    ours.save_pretrained(tmp_path, layout="timm")
    again = reopened(tmp_path)
    assert again.state_dict().keys() == reference.state_dict().keys()
    for size in ((32, 32), (48, 64), (40, 24)):
        x = torch.randn(2, reference.in_chans, *size)
        with torch.no_grad():
            tokens = ours(x)
            assert tokens.abs().max() > 0.3
            close(tokens, reference.forward_features(x))
            close(ours.encode(x), reference(x))
            close(again(x), reference(x))
            if kind != "distilled":  # a classifier for each of its two tokens: they are pooled side by side
                close(ours.pool(tokens), reference.forward_head(reference.forward_features(x), pre_logits=True))
    assert ViT.from_pretrained(tmp_path).spec == ours.spec


@pytest.mark.parametrize("kind", ["augreg", "dinov2 registers", "siglip"])
def test_feature_maps(kind, theirs):
    reference, _, ours = theirs(kind)
    x = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        for mine, other in zip(ours(x, features=[0, 1]), reference.forward_intermediates(x, intermediates_only=True),
                               strict=True):
            close(mine, other)


def test_what_the_config_means(theirs):
    assert theirs("deit3")[2].spec.positions == GridTable(prefix=False)
    assert theirs("distilled")[2].spec.head.pool == PrefixPool(tokens=2, join="concat")
    assert theirs("gap with prefix")[2].spec.head.pool == MeanPool(prefix=True)
    assert theirs("dinov2 giant")[2].spec.stack.layers[0].mlp.gated
    assert theirs("clip")[2].spec.stack.layers[0].norm.eps == 1e-5


def edited(folder, tmp_path, **changes):
    target = tmp_path / "edited"
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] |= changes
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return target


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"num_classes": 9}, r"head.bias should have shape \(9,\)"),
    ({"depth": 3}, "missing"),
    ({"img_size": 48}, r"pos_embed should have shape \(1, 37, 64\)"),
    ({"global_pool": ""}, "global_pool should be"),
    ({"dynamic_img_pad": True}, "timm cannot make|dynamic_img_pad is not supported"),
    ({"scale_attn_norm": True}, "scale_attn_norm and attn_dim are not supported"),
    ({"block_fn": "parallel"}, "timm cannot make"),
    ({"nonsense": 1}, "timm cannot make"),
])
def test_configs_that_do_not_fit(changes, sentence, theirs, tmp_path):
    with pytest.raises(InputError, match=sentence):
        ViT.from_pretrained(edited(theirs("augreg")[1], tmp_path, **changes))


@pytest.mark.parametrize(("architecture", "sentence"), [
    ("vit_tiny_r_s16_p8_224", "the patch embedding HybridEmbed is not supported"),
    ("vit_small_patch16_18x2_224", "the block ParallelThingsBlock is not supported"),
    ("vit_base_patch16_xp_224", "the block ParallelScalingBlock is not supported"),
    ("aimv2_large_patch14_224", "patch embedding PatchEmbed is not supported, or has a norm"),
])
def test_what_is_not_supported_is_named(architecture, sentence):
    config = {"architecture": architecture, "model_args": {"depth": 1}, "pretrained_cfg": {"num_classes": 3}}
    with pytest.raises(InputError, match=sentence):
        TIMM_VIT.to_spec(config, "config.json")


@pytest.mark.parametrize(("family", "architecture"), [
    (TIMM_VIT, "vit_base_patch8_224"), (TIMM_VIT, "vit_so400m_patch14_siglip_384"),
    (TIMM_VIT, "vit_giant_patch14_reg4_dinov2"), (TIMM_VIT, "deit3_medium_patch16_224"),
    (TIMM_VIT, "deit_small_distilled_patch16_224"), (TIMM_VIT, "vit_gigantic_patch14_clip_224"),
    (TIMM_NAFLEX, "naflexvit_so400m_patch16_siglip"), (TIMM_NAFLEX, "naflexvit_so150m2_patch16_reg1_gap"),
    (TIMM_NAFLEX, "naflexvit_giant_patch16_radio_v3")])
def test_published_sizes(family, architecture):
    """A config as it lies on the hub, without arguments, and one that we write for it make the same weights."""
    config = {"architecture": architecture}
    spec = family.to_spec(config, "config.json")
    again = family.from_spec(spec)
    named = [{name: tuple(value.shape) for name, value in blueprint(one, "").state_dict().items()}
             for one in (config, again)]
    assert named[0] == named[1] and family.to_spec(again, "") == spec


def test_weights_in_a_torch_file_and_without_arguments(tmp_path):
    """As timm writes them by default: pytorch_model.bin, and only the name of the architecture."""
    torch.manual_seed(0)
    reference = redraw(timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=1, num_classes=3))
    timm.models.save_for_hf(reference, tmp_path, model_args={"depth": 1}, safe_serialization=False)
    assert not (tmp_path / "model.safetensors").exists()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        close(ViT.from_pretrained(tmp_path).encode(x), reference(x))


def test_labels_and_preprocessing_come_along(theirs, tmp_path):
    _, folder, _ = theirs("augreg")
    config = json.loads((folder / "config.json").read_text())
    names = [f"class {i}" for i in range(7)]
    config["pretrained_cfg"] |= {"label_names": names, "crop_pct": 0.9, "interpolation": "bilinear"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    ours = ViT.from_pretrained(tmp_path)
    assert ours.labels == tuple(names) and ours.preprocessing.edge == (248, 248)
    ours.save_pretrained(tmp_path / "again", layout="timm")
    again = ViT.from_pretrained(tmp_path / "again")
    assert again.labels == ours.labels and again.preprocessing == ours.preprocessing


def test_labels_that_do_not_match_the_classes(theirs, tmp_path):
    folder = edited(theirs("augreg")[1], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["label_names"] = ["one", "two"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="2 labels for 7 classes"):
        ViT.from_pretrained(folder)


def test_preprocessing_equals_timms(theirs, tmp_path):
    import numpy as np
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    reference, _, ours = theirs("augreg")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 71, 3), dtype=np.uint8))
    transform = create_transform(**resolve_model_data_config(reference), is_training=False)
    close(ours.preprocess(picture), transform(picture), 1e-6)
