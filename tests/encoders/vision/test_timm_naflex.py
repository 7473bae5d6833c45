"""timm's NaFlexVit in both directions: pictures of several aspects in one batch, every kind of position and pool."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support import close, redraw
from timm_models import references, reopened

from mm.encoders import ViT
from mm.encoders.spec import CentredGrid, FactorTable, GridTable, IndexGrid, MeanMaxPool, MeanPool
from mm.encoders.vision.flex import Flex, FlexPreprocess, flex_batch
from mm.encoders.vision.image import Preprocess
from mm.errors import InputError
from mm.spec import LayerNorm, Mixed

timm = pytest.importorskip("timm")

SMALL = {"patch_size": 8, "pos_embed_grid_size": (4, 4), "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 7}
BARE = {"pos_embed": "none", "class_token": True, "rope_temperature": 100.0}
KINDS = {
    "mean": ("naflexvit_base_patch16_gap", {}),
    "features": ("naflexvit_base_patch16_gap", {"num_classes": 0}),
    "keep aspect": ("naflexvit_base_patch16_par_gap", {}),
    "factorized": ("naflexvit_base_patch16_parfac_gap", {}),
    "factorized squashed": ("naflexvit_base_patch16_parfac_gap", {"pos_embed_ar_preserving": False}),
    "probe with a register": ("naflexvit_base_patch16_map", {}),
    "so150m": ("naflexvit_so150m2_patch16_reg1_gap", {"num_heads": 4}),
    "siglip": ("naflexvit_base_patch16_siglip", {"num_classes": 0}),
    "radio": ("naflexvit_base_patch16_radio_v3", {"num_classes": 0}),
    "max with prefix": ("naflexvit_base_patch16_gap", {"global_pool": "max", "pool_include_prefix": True}),
    "mean and max": ("naflexvit_base_patch16_gap", {"global_pool": "avgmax"}),
    "clip": ("naflexvit_base_patch16_gap", {"pre_norm": True, "class_token": True, "global_pool": "token",
                                            "fc_norm": False, "act_layer": "quick_gelu", "qk_norm": True}),
    "axial": ("naflexvit_base_patch16_gap", BARE | {"rope_type": "axial", "rope_ref_feat_shape": (3, 3)}),
    "axial xy": ("naflexvit_base_patch16_map", BARE | {"rope_type": "axial", "rope_grid_indexing": "xy",
                                                       "rope_grid_offset": 1.0, "swiglu_mlp": True}),
    "mixed": ("naflexvit_base_patch16_gap", {"rope_type": "mixed", "rope_temperature": 10.0,
                                             "rope_grid_indexing": "xy", "init_values": None}),
    "dinov3": ("naflexvit_base_patch16_gap", BARE | {"rope_type": "dinov3", "rope_rotate_half": True,
                                                     "attn_type": "eva", "swiglu_mlp": True, "swiglu_align_to": 8}),
}
SIZES = ((32, 32), (40, 24), (16, 56), (24, 40))  # pixels: the table's own grid, odd ones, a strip


theirs = references(KINDS, SMALL)


def pictures(spec, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(3, *size) for size in SIZES]


def as_timm(batch: Flex):
    """The dict that timm's collator makes of the same batch."""
    coord = torch.zeros(*batch.patches.shape[:2], 2, dtype=torch.long)
    for row, (h, w) in zip(coord, batch.sizes, strict=True):
        row[:h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    return {"patches": batch.patches, "patch_coord": coord, "patch_valid": batch.real}


@pytest.mark.parametrize("kind", KINDS)
def test_both_directions(kind, theirs, tmp_path):
    reference, _, ours = theirs(kind)
    ours.save_pretrained(tmp_path, layout="timm")
    again = reopened(tmp_path)
    assert again.state_dict().keys() == reference.state_dict().keys()
    batch = flex_batch(pictures(ours.spec), ours.spec.patches, 20)
    given = as_timm(batch)
    with torch.no_grad():
        tokens = ours(batch)
        assert tokens.abs().max() > 0.3
        real = torch.nn.functional.pad(batch.real, (ours.prefix, 0), value=True)
        close(tokens[real], reference.forward_features(**given)["patches"][real])
        close(ours.encode(batch), reference(given))
        close(again(given), reference(given))
    assert ViT.from_pretrained(tmp_path).spec == ours.spec


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (40, 24), (64, 48)])
def test_batches_of_one_size(kind, size, theirs):
    reference, _, ours = theirs(kind)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        close(ours(x), reference.forward_features(x))
        close(ours.encode(x), reference(x))


@pytest.mark.parametrize("kind", ["factorized", "dinov3"])
def test_alone_as_in_company(kind, theirs):
    ours = theirs(kind)[2]
    batch = pictures(ours.spec)
    with torch.no_grad():
        together = ours.encode(flex_batch(batch, ours.spec.patches, 30))
        for row, picture in zip(together, batch, strict=True):
            close(row, ours.encode(picture[None])[0])


@pytest.mark.parametrize("kind", ["keep aspect", "mixed"])
def test_feature_maps(kind, theirs):
    reference, _, ours = theirs(kind)
    x = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        for mine, other in zip(ours(x, features=[0, 1]), reference.forward_intermediates(x, intermediates_only=True),
                               strict=True):
            close(mine, other)


def test_what_the_config_means(theirs):
    def spec(kind):
        return theirs(kind)[2].spec

    assert spec("mean").positions == GridTable(prefix=False) and spec("mean").head.pool == MeanPool()
    assert spec("mean").native and spec("mean").image == (32, 32)
    assert spec("keep aspect").positions == GridTable(prefix=False, keep_aspect=True)
    assert spec("siglip").positions == GridTable(prefix=False, mode="bilinear")
    assert spec("siglip").stack.layers[0].mlp.act == "gelu_tanh"
    assert spec("radio").positions.align_corners and not spec("radio").positions.antialias
    assert spec("radio").stack.final_norm is None
    assert spec("factorized").positions == FactorTable(keep_aspect=True)
    assert spec("mean and max").head.pool == MeanMaxPool()
    assert not spec("probe with a register").head.pool.prefix
    assert not spec("so150m").stack.layers[0].mixer.q_bias
    assert not spec("clip").patches.bias
    assert spec("axial").coords == IndexGrid(reference=(3, 3))
    assert isinstance(spec("mixed").stack.layers[0].mixer.rope.axes, Mixed)
    assert spec("dinov3").coords == CentredGrid() and not spec("dinov3").stack.layers[0].mixer.k_bias
    assert spec("dinov3").stack.layers[0].norm == LayerNorm(eps=1e-6)


def edited(folder, tmp_path, cfg=None, **changes):
    target = tmp_path / "edited"
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] |= changes
    config["pretrained_cfg"] |= cfg or {}
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return target


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"num_classes": 9}, r"head.weight should have shape \(9, 64\)|head.bias should have shape \(9,\)"),
    ({"pos_embed_grid_size": [5, 4]}, r"embeds.pos_embed should have shape \(1, 5, 4, 64\)"),
    ({"embed_proj_type": "conv"}, "embed_proj_type"),
    ({"pos_embed_use_grid_sample": True}, "pos_embed_use_grid_sample is not supported"),
    ({"patchify_channels_last": False}, "patchify_channels_last=False is not supported"),
    ({"pos_embed_interp_mode": "nearest"}, "pos_embed_interp_mode should be bicubic or bilinear"),
    ({"attn_gated": True}, "gated_attn is not supported"),
    ({"rope_type": "mrope", "rope_mrope_section": [2, 3, 3]}, "RotaryEmbeddingMRope.* is not supported"),
    ({"nonsense": 1}, "timm cannot make"),
])
def test_configs_that_do_not_fit(changes, sentence, theirs, tmp_path):
    with pytest.raises(InputError, match=sentence):
        ViT.from_pretrained(edited(theirs("mean")[1], tmp_path, **changes))


def test_pictures_are_sized_as_timm_sizes_them(theirs, tmp_path):
    from timm.data import create_transform

    cfg = {"input_size": [3, 48, 40], "interpolation": "bicubic", "label_names": list("abcdefg")}
    ours = ViT.from_pretrained(edited(theirs("mean")[1], tmp_path, cfg))
    assert ours.preprocessing == FlexPreprocess(patch=8, tokens=30, interpolation="bicubic")
    transform = create_transform(is_training=False, naflex=True, patch_size=8, max_seq_len=30, patchify=True,
                                 interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    random = np.random.default_rng(0)
    sources = [Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8))
               for size in ((50, 71), (9, 200), (100, 100), (3, 5))]
    batch = ours.preprocess(sources)
    assert batch.patches.shape == (4, 30, 192)
    for row, (h, w), source in zip(batch.patches, batch.sizes, sources, strict=True):
        expected = transform(source)["patches"].flatten(1)
        close(row[:h * w], expected, 1e-6)
    ours.save_pretrained(tmp_path / "again", layout="timm")
    again = ViT.from_pretrained(tmp_path / "again")
    assert again.preprocessing == ours.preprocessing and again.labels == ours.labels == tuple("abcdefg")


def test_what_the_layout_cannot_hold_is_named(theirs, tmp_path):
    ours = theirs("siglip")[2]
    kept, ours.preprocessing = ours.preprocessing, Preprocess(size=(32, 32))
    with pytest.raises(InputError, match="should be a FlexPreprocess, not a Preprocess"):
        ours.save_pretrained(tmp_path, layout="timm")
    ours.preprocessing = kept
    with pytest.raises(InputError, match="hf layout|transformers"):
        ours.save_pretrained(tmp_path, layout="hf")
    assert not list(tmp_path.iterdir())


def test_the_tower_of_a_siglip2_from_transformers_opens_in_timm(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Siglip2Config(text_config={**sizes, "vocab_size": 512, "max_position_embeddings": 16},
                                        vision_config={**sizes, "patch_size": 8, "num_patches": 16})
    reference = redraw(transformers.Siglip2Model(config))
    reference.save_pretrained(tmp_path / "theirs")
    ours = ViT.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "timm", layout="timm")
    batch = flex_batch(pictures(ours.spec), ours.spec.patches, 20)
    with torch.no_grad():
        expected = reference.get_image_features(batch.patches, pixel_attention_mask=batch.real.long(),
                                                spatial_shapes=torch.tensor(batch.sizes))
        expected = getattr(expected, "pooler_output", expected)
        close(ours.encode(batch), expected)
        close(reopened(tmp_path / "timm")(as_timm(batch)), expected)
    again = ViT.from_pretrained(tmp_path / "timm")
    assert again.preprocessing == ours.preprocessing and again.spec.native


def test_our_own_layout_keeps_it_all(theirs, tmp_path):
    ours = theirs("factorized")[2]
    ours.save_pretrained(tmp_path)
    again = ViT.from_pretrained(tmp_path)
    assert again.spec == ours.spec and again.preprocessing == ours.preprocessing
    assert again.fingerprint() == ours.fingerprint()
