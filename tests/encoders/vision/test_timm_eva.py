"""timm's Eva in both directions, at two resolutions and on odd grids: EVA-02, DINOv3, Perception Encoder, RoPE-ViT."""

import dataclasses
import json
import math

import pytest
import torch
from support import close
from timm_models import SMALL, references, reopened

from mm.encoders import ViT
from mm.encoders.spec import CentredGrid, FlattenPool, GridTable, Head, IndexGrid, MeanPool, ProbePool, TokenPool
from mm.encoders.vision.families import FAMILIES
from mm.encoders.vision.families.timm_common import bare
from mm.encoders.vision.families.timm_eva import TIMM_EVA, ratio
from mm.encoders.vision.flex import flex_batch
from mm.errors import InputError
from mm.spec import Axial, LayerNorm, Mixed, RMSNorm, Rope

timm = pytest.importorskip("timm")

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


theirs = references(KINDS, SMALL, 0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_both_directions(kind, theirs, tmp_path):
    reference, _, ours = theirs(kind)
    ours.save_pretrained(tmp_path, layout="timm")
    again = reopened(tmp_path)
    assert again.state_dict().keys() == reference.state_dict().keys()
    for size in ((32, 32), (48, 64), (40, 24)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            tokens, expected = ours(x), reference.forward_features(x)
            assert expected.abs().max() > 0.3
            close(tokens, expected)
            close(ours.pool(tokens), reference.forward_head(expected, pre_logits=True))
            close(ours.encode(x), reference(x))
            close(again(x), reference(x))


def test_maps_of_blocks(theirs):
    for kind in ("dinov3", "rope mixed"):
        reference, _, ours = theirs(kind)
        x = torch.randn(1, 3, 40, 24)
        with torch.no_grad():
            maps = reference.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
            for mine, their in zip(ours(x, features=[0, -1]), maps, strict=True):
                close(mine, their)


@pytest.mark.parametrize("kind", ["dinov3", "rope mixed", "pe core"])
def test_pictures_of_several_sizes_at_once(kind, theirs):
    """Each picture of a padded batch turns by its own grid."""
    reference, _, ours = theirs(kind)
    pictures = [torch.randn(3, 40, 24), torch.randn(3, 32, 32), torch.randn(3, 16, 64)]
    with torch.no_grad():
        together = ours.encode(flex_batch(pictures, ours.spec.patches, length=20))
        close(together, torch.cat([reference(picture[None]) for picture in pictures]))


# ----------------------------------------------------------------------------------- what a spec must hold
def layer(kind, theirs):
    return theirs(kind)[2].spec.stack.layers[0]


def test_eva02_small_packs_what_eva02_base_splits(theirs):
    small, base = layer("eva02 small", theirs), layer("eva02 base", theirs)
    for one in (small, base):
        assert (one.mixer.q_bias, one.mixer.k_bias, one.mixer.v_bias) == (True, False, True)
        assert one.mlp.gated and one.mlp.act == "silu" and one.mlp.hidden == int(64 * 4 * 2 / 3)
        assert one.mixer.rope == Rope(theta=10000, layout="interleaved", axes=Axial()) and one.mixer.inner_norm is None
    assert small.mlp.inner_norm is None and base.mlp.inner_norm == LayerNorm(eps=1e-6)
    names = [set(theirs(kind)[0].state_dict()) for kind in ("eva02 small", "eva02 base")]
    assert {"blocks.0.attn.q_bias", "blocks.0.mlp.fc1.weight"} <= names[0]
    assert {"blocks.0.attn.q_proj.bias", "blocks.0.mlp.fc1_g.weight"} <= names[1]


def test_eva02_pools_before_its_norm_and_its_clip_after(theirs):
    base, clip = theirs("eva02 base")[2].spec, theirs("eva02 clip")[2].spec
    assert base.head.pool == MeanPool() and base.stack.final_norm is None and base.head.norm == LayerNorm(eps=1e-6)
    assert clip.head.pool == TokenPool() and clip.stack.final_norm == LayerNorm(eps=1e-6) and clip.head.norm is None
    assert clip.stack.layers[0].mixer.inner_norm == LayerNorm(eps=1e-6)
    assert clip.coords == IndexGrid(order="yx", reference=(16, 16))
    assert layer("eva02 enormous", theirs).placement == "post_branch"


def test_dinov3(theirs):
    spec = theirs("dinov3")[2].spec
    assert spec.positions is None and spec.registers == 4 and spec.coords == CentredGrid(normalise="separate")
    assert spec.stack.layers[0].mixer.rope == Rope(theta=100, frequency=2 * math.pi, layout="half", axes=Axial())
    assert spec.stack.layers[0].norm == LayerNorm(eps=1e-5) and spec.stack.layers[0].layer_scale == 1e-5
    assert spec.stack.final_norm == LayerNorm(eps=1e-5) and spec.head.norm is None
    plain, biased = layer("dinov3", theirs).mixer, layer("dinov3 qkvb", theirs).mixer
    assert (plain.q_bias, plain.k_bias, plain.v_bias) == (False, False, False)
    assert (biased.q_bias, biased.k_bias, biased.v_bias) == (True, False, True)
    assert layer("dinov3 plus", theirs).mlp.gated and layer("dinov3 7b", theirs).mlp.hidden == 128


def test_dinov3_moves_its_coordinates_while_training_only(theirs, tmp_path):
    ours = theirs("dinov3 plus")[2]
    assert ours.spec.coords == CentredGrid(shift=0.1, rescale=2.0)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(x), ours(x))
        ours.train()
        assert (ours(x) - ours(x)).abs().max() > 1e-3
    ours.eval().save_pretrained(tmp_path, layout="timm")
    assert ViT.from_pretrained(tmp_path).spec == ours.spec


def test_perception_encoder(theirs):
    spec, gigantic = theirs("pe core")[2].spec, theirs("pe core gigantic")[2].spec
    assert spec.coords == IndexGrid(order="xy", reference=(3, 5), offset=1.0)
    assert gigantic.coords == IndexGrid(order="xy", reference=(3, 5)) and gigantic.cls == 0
    assert spec.pre_norm == LayerNorm(eps=1e-5) and not spec.patches.bias
    assert isinstance(spec.head.pool, ProbePool) and spec.head.pool.heads == 8 and spec.head.proj.dim == 32
    assert spec.stack.layers[0].mixer.k_bias
    lang = theirs("pe lang")[2].spec
    assert lang.stack.final_norm is None and lang.head == Head(pool=MeanPool())


def test_rope_vit(theirs):
    axial, mixed = theirs("rope axial")[2].spec, theirs("rope mixed ape")[2].spec
    assert axial.stack.layers[0].mixer.rope == Rope(theta=100, layout="interleaved", axes=Axial())
    assert mixed.stack.layers[0].mixer.rope == Rope(theta=10, layout="interleaved", axes=Mixed())
    assert axial.coords == mixed.coords == IndexGrid(order="xy")
    assert axial.positions is None and mixed.positions == GridTable(prefix=False)


def test_learned_frequencies_get_the_same_gradient(theirs):
    reference, _, ours = theirs("rope mixed")
    x = torch.randn(1, 3, 40, 24)
    for model in (reference, ours):
        model.zero_grad()
    reference.forward_features(x).sin().sum().backward()
    ours(x).sin().sum().backward()
    mine = torch.stack([block.mixer.mixed.grad for block in ours.stack.blocks], 1)
    assert mine.shape == reference.rope.freqs.grad.shape and mine.abs().max() > 1e-3
    close(mine, reference.rope.freqs.grad, 1e-4)


@pytest.mark.parametrize(("kind", "changes"), [
    ("eva02 base", {"coords": IndexGrid()}), ("pe core", {"coords": IndexGrid(order="yx", reference=(3, 5), offset=1)}),
    ("pe core", {"coords": IndexGrid(order="xy", reference=(3, 5))}),
    ("dinov3", {"coords": CentredGrid(normalise="max")}), ("dinov3", {"rope": {"layout": "interleaved"}}),
    ("dinov3", {"rope": {"frequency": 1.0}}), ("rope axial", {"rope": {"theta": 10000.0}}),
    ("rope mixed", {"coords": IndexGrid()}),
])
def test_every_setting_of_the_rope_is_felt(kind, changes, theirs):
    """The comparisons above would fail with any of these."""
    reference, _, ours = theirs(kind)
    settings = dict(changes)
    rope = settings.pop("rope", None)
    if rope:
        old = ours.spec.stack.layers[0]
        mixer = dataclasses.replace(old.mixer, rope=dataclasses.replace(old.mixer.rope, **rope))
        settings["stack"] = dataclasses.replace(
            ours.spec.stack, layers=(dataclasses.replace(old, mixer=mixer),) * len(ours.spec.stack.layers))
    other = ViT(dataclasses.replace(ours.spec, **settings)).eval()
    other.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 40, 24)
    with torch.no_grad():
        assert (other(x) - reference.forward_features(x)).abs().max() > 1e-3


def test_how_it_trains_is_kept():
    rates = {"drop_path_rate": 0.2, "attn_drop_rate": 0.1, "proj_drop_rate": 0.3, "patch_drop_rate": 0.5}
    spec = TIMM_EVA.to_spec(bare("eva02_base_patch14_448", SMALL | rates), "config.json")
    assert spec.patch_dropout == 0.5
    first, last = spec.stack.layers
    assert (first.drop_path, last.drop_path) == pytest.approx((0, 0.2))
    assert (last.mixer.dropout, last.dropout, last.mlp.dropout) == (0.1, 0.3, 0.3)


@pytest.mark.parametrize(("architecture", "image"), [
    ("eva02_large_patch14_448", (448, 448)), ("vit_huge_plus_patch16_dinov3_qkvb", (224, 224)),
    ("vit_pe_core_large_patch14_336", (336, 336)), ("vit_base_patch16_rope_mixed_ape_224", (224, 224)),
])
def test_published_sizes(architecture, image, tmp_path):
    """Read off the config that hub repositories have, every weight of timm's module has its place in ours and back."""
    with torch.device("meta"):
        module = timm.create_model(architecture)
    timm.models._hub.save_config_for_hf(module, tmp_path / "config.json")
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("model_args", None)
    spec = TIMM_EVA.to_spec(config, "config.json")
    with torch.device("meta"):
        model = ViT(spec)
    written = TIMM_EVA.table(spec, ()).save(model.state_dict(), "timm")
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in module.state_dict().items()}
    assert spec.image == image


# --------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(("architecture", "args", "message"), [
    ("vit_base_patch16_sapiens2", {"num_kv_heads": 4}, "attn_only_layer_scale is not supported"),
    ("vit_base_patch16_sapiens2", {"num_kv_heads": [2, 4]}, "num_kv_heads that differ between blocks"),
    ("vit_small_patch16_dinov3", {"rope_type": "mrope"}, "the rope RotaryEmbeddingMRope"),
    ("vit_small_patch16_dinov3", {"rope_grid_indexing": "xy"}, "the rope .*grid_indexing=xy.* is not supported"),
    ("eva02_tiny_patch14_224", {"rope_shift_coords": 0.1}, "the rope .*shift_coords=0.1.* is not supported"),
    ("eva_giant_patch14_224", {"global_pool": "avgmax"}, "global_pool should be .* not 'avgmax'"),
    ("eva_giant_patch14_224", {"dynamic_img_pad": True}, "dynamic_img_pad is not supported"),
    ("eva_giant_patch14_224", {"flux": 3}, "timm cannot make 'eva_giant_patch14_224'.*flux"),
])
def test_what_is_not_supported_is_named(architecture, args, message):
    with pytest.raises(InputError, match=f"config.json: {message}"):
        TIMM_EVA.to_spec(bare(architecture, SMALL | args), "config.json")


@pytest.mark.parametrize(("kind", "changes", "message"), [
    ("rope axial", {"head": Head(pool=FlattenPool(tokens=16))}, "no pool like FlattenPool"),
    ("rope axial", {"head": Head(pool=MeanPool(prefix=True))}, "no pool like MeanPool"),
    ("rope axial", {"cls": 2}, "cls is 2, where it has 1"),
    ("rope axial", {"norm": LayerNorm(eps=1e-12)}, "LayerNorm of eps 1e-5 or 1e-6, not LayerNorm.*1e-12"),
    ("rope axial", {"norm": RMSNorm()}, "not RMSNorm"),
    ("dinov3", {"coords": CentredGrid(normalise="max")}, "coords.normalise is max, where it has separate"),
    ("pe spatial", {"coords": IndexGrid(order="xy")}, "coords.reference is None, where it has"),
])
def test_what_the_layout_cannot_hold_is_named(kind, changes, message, theirs):
    spec, settings = theirs(kind)[2].spec, dict(changes)
    norm = settings.pop("norm", None)
    if norm:
        settings["stack"] = dataclasses.replace(
            spec.stack, layers=tuple(dataclasses.replace(one, norm=norm) for one in spec.stack.layers))
    with pytest.raises(InputError, match=message):
        TIMM_EVA.from_spec(dataclasses.replace(spec, **settings))


def test_wrong_weights_are_named(theirs, tmp_path):
    from safetensors.torch import save_file

    reference, folder, _ = theirs("eva02 base")
    config = (folder / "config.json").read_text()
    state = {name: value.contiguous() for name, value in reference.state_dict().items()}
    (tmp_path / "config.json").write_text(config)
    save_file(state | {"mask_token": torch.zeros(1, 1, 64)}, tmp_path / "model.safetensors")
    assert ViT.from_pretrained(tmp_path).spec.image == (32, 32)  # of pretraining: left out
    save_file({**state, "blocks.0.attn.k_proj.bias": torch.zeros(64)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"not expected by the config \(blocks.0.attn.k_proj.bias\)"):
        ViT.from_pretrained(tmp_path)
    del state["blocks.1.mlp.norm.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"missing \(blocks.1.mlp.norm.weight\)"):
        ViT.from_pretrained(tmp_path)


def test_a_directory_is_known_by_its_module_and_keeps_its_labels(theirs, tmp_path):
    _, folder, ours = theirs("eva giant")
    assert FAMILIES.recognise(folder, "vit") is TIMM_EVA
    ours.labels = tuple("abcdefg")
    ours.save_pretrained(tmp_path, layout="timm")
    ours.labels = ()
    assert ViT.from_pretrained(tmp_path).labels == tuple("abcdefg")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_classes"] == 7 and config["model_args"]["embed_dim"] == 64


def test_any_hidden_width_survives_as_a_ratio():
    assert all(int(dim * ratio(hidden, dim)) == hidden for dim in (64, 192, 1408) for hidden in range(1, 999))
