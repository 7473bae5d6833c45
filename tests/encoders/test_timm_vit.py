"""timm's VisionTransformer in both directions: augreg, CLIP, SigLIP, DeiT, DINOv2, at several sizes."""

import json
import warnings

import pytest
import torch
from support import close, redraw

from mm.encoders import ViT
from mm.encoders.spec import GridTable, MeanPool, PrefixPool
from mm.errors import InputError

timm = pytest.importorskip("timm")

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "dynamic_img_size": True}
KINDS = {
    "augreg": ("vit_base_patch16_224", {"num_classes": 7}),
    "augreg features": ("vit_base_patch16_224", {"num_classes": 0}),
    "gap": ("vit_base_patch16_224", {"num_classes": 7, "global_pool": "avg"}),
    "gap with prefix": ("vit_base_patch16_224", {"global_pool": "avg", "pool_include_prefix": True, "num_classes": 7}),
    "clip": ("vit_base_patch16_clip_224", {"num_classes": 7}),
    "clip quickgelu": ("vit_base_patch16_clip_quickgelu_224", {"num_classes": 7}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "siglip tanh": ("vit_giantopt_patch16_siglip_256", {"mlp_ratio": 3.7362}),
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


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """timm's model of a kind, its directory, and ours read from there; each is made once."""
    made = {}

    def make(kind):
        if kind not in made:
            torch.manual_seed(0)
            architecture, changes = KINDS[kind]
            folder = tmp_path_factory.mktemp("theirs")
            model = redraw(timm.create_model(architecture, pretrained=False, **SMALL | changes))
            with torch.no_grad():
                model.patch_embed.proj.weight.mul_(0.2)
            timm.models.save_for_hf(model, folder, model_args=SMALL | changes, safe_serialization=True)
            made[kind] = model, folder, ViT.from_pretrained(folder)
        return made[kind]
    return make


def reopened(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


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
    ({"global_pool": "avgmax"}, "global_pool should be"),
    ({"nonsense": 1}, "timm cannot make"),
])
def test_configs_that_do_not_fit(changes, sentence, theirs, tmp_path):
    with pytest.raises(InputError, match=sentence):
        ViT.from_pretrained(edited(theirs("augreg")[1], tmp_path, **changes))


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


def test_preprocessing_equals_timms(theirs, tmp_path):
    import numpy as np
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    reference, _, ours = theirs("augreg")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 71, 3), dtype=np.uint8))
    transform = create_transform(**resolve_model_data_config(reference), is_training=False)
    close(ours.preprocess(picture), transform(picture), 1e-6)
