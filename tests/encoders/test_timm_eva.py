"""timm's Eva in both directions: EVA-02, DINOv3, Perception Encoder and RoPE-ViT, at two resolutions and on odd grids."""

import json
import math
import warnings

import pytest
import torch
from support import close, redraw

from mm.encoders import ViT
from mm.encoders.spec import CentredGrid, GridTable, IndexGrid, MeanPool, ProbePool
from mm.errors import InputError
from mm.spec import Axial, LayerNorm, Mixed

timm = pytest.importorskip("timm")

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "dynamic_img_size": True}
REFERENCE = {"ref_feat_shape": (3, 5)}  # neither square nor the grid at hand
KINDS = {
    "eva02 small": ("eva02_tiny_patch14_336", REFERENCE | {"num_classes": 7}),
    "eva02 base": ("eva02_base_patch14_448", REFERENCE | {"num_classes": 7}),
    "eva02 clip": ("eva02_base_patch16_clip_224", {"num_classes": 7}),
    "eva02 enormous": ("eva02_enormous_patch14_clip_224", {"num_classes": 7}),
    "eva giant": ("eva_giant_patch14_224", {"num_classes": 7}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "dinov3 qkvb": ("vit_small_patch16_dinov3_qkvb", {"global_pool": "token", "num_classes": 5}),
    "dinov3 plus": ("vit_small_plus_patch16_dinov3", {"rope_shift_coords": 0.1, "rope_rescale_coords": 2.0}),
    "dinov3 7b": ("vit_7b_patch16_dinov3", {}),
    "pe core": ("vit_pe_core_base_patch16_224", REFERENCE | {"num_classes": 32}),
    "pe core gigantic": ("vit_pe_core_gigantic_patch14_448", REFERENCE | {"num_classes": 32}),
    "pe lang": ("vit_pe_lang_large_patch14_448", REFERENCE),
    "pe spatial": ("vit_pe_spatial_base_patch16_512", REFERENCE),
    "rope axial": ("vit_small_patch16_rope_224", {}),
    "rope axial ape": ("vit_small_patch16_rope_ape_224", {}),
    "rope mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "rope mixed ape": ("vit_small_patch16_rope_mixed_ape_224", {}),
    "rope reg4 gap": ("vit_betwixt_patch16_rope_reg4_gap_256", {"num_classes": 7}),
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
            made[kind] = write(architecture, changes, folder), folder, ViT.from_pretrained(folder)
        return made[kind]
    return make


def write(architecture, changes, folder):
    """A timm model with re-drawn weights, and its directory as timm writes it."""
    model = redraw(timm.create_model(architecture, pretrained=False, **SMALL | changes))
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(0.2)
    timm.models.save_for_hf(model, folder, model_args=SMALL | changes, safe_serialization=True)
    return model


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
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            tokens = ours(x)
            assert tokens.abs().max() > 0.3
            close(tokens, reference.forward_features(x))
            close(ours.pool(tokens), reference.forward_head(reference.forward_features(x), pre_logits=True))
            close(ours.encode(x), reference(x))
            close(again(x), reference(x))
