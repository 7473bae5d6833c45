"""transformers' vision and audio encoders in both directions, at several sizes, by the names on disk."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import close, redraw

from mm.encoders import ViT
from mm.encoders.spec import CentredGrid
from mm.errors import InputError

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
VIT = SMALL | {"image_size": 32, "patch_size": 8}
DINO = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
AST = SMALL | {"patch_size": 16, "frequency_stride": 10, "time_stride": 10, "max_length": 96, "num_mel_bins": 48}
V3 = VIT | {"num_register_tokens": 4}
KINDS = {
    "vit": ("ViTModel", "ViTConfig", VIT),
    "vit classifier": ("ViTForImageClassification", "ViTConfig", VIT | {"num_labels": 5}),
    "vit without qkv bias": ("ViTModel", "ViTConfig", VIT | {"qkv_bias": False, "hidden_act": "gelu_pytorch_tanh"}),
    "deit": ("DeiTModel", "DeiTConfig", VIT),
    "deit classifier": ("DeiTForImageClassification", "DeiTConfig", VIT | {"num_labels": 5}),
    "deit teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", VIT | {"num_labels": 5}),
    "dinov2": ("Dinov2Model", "Dinov2Config", DINO),
    "dinov2 swiglu": ("Dinov2Model", "Dinov2Config", DINO | {"use_swiglu_ffn": True}),
    "dinov2 classifier": ("Dinov2ForImageClassification", "Dinov2Config", DINO),
    "registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO),
    "registers classifier": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig",
                             DINO | {"num_labels": 5}),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", V3),
    "dinov3 gated": ("DINOv3ViTModel", "DINOv3ViTConfig", V3 | {"use_gated_mlp": True, "hidden_act": "silu"}),
    "dinov3 key bias": ("DINOv3ViTModel", "DINOv3ViTConfig", V3 | {"key_bias": True, "query_bias": False}),
    "ast": ("ASTModel", "ASTConfig", AST),
    "ast classifier": ("ASTForAudioClassification", "ASTConfig", AST | {"num_labels": 5}),
}
PICTURES = [kind for kind in KINDS if "ast" not in kind]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """transformers' model of a kind, its directory, and ours read from there; each is made once."""
    made = {}

    def make(kind):
        if kind not in made:
            torch.manual_seed(0)
            model, config, settings = KINDS[kind]
            folder = tmp_path_factory.mktemp("theirs")
            model = redraw(getattr(transformers, model)(getattr(transformers, config)(**settings)))
            model.save_pretrained(folder)
            made[kind] = model, folder, ViT.from_pretrained(folder)
        return made[kind]
    return make


def outputs(model, x):
    """(tokens, pooled or logits) of one of transformers' models."""
    resize = {"interpolate_pos_encoding": True} if model.config.model_type in ("vit", "deit") else {}
    whole = model(x, **resize)
    if "last_hidden_state" in whole:
        return whole.last_hidden_state, whole.pooler_output
    return getattr(model, model.base_model_prefix)(x, **resize).last_hidden_state, whole.logits


@pytest.mark.parametrize("kind", KINDS)
def test_both_directions(kind, theirs, tmp_path):
    reference, folder, ours = theirs(kind)
    ours.save_pretrained(tmp_path, layout="hf")
    again = type(reference).from_pretrained(tmp_path).eval()
    written, read = load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert set(written) == {name for name in read if "mask_token" not in name}
    sizes = ((32, 32), (48, 64), (40, 24)) if kind in PICTURES else ((48, 96),)
    for size in sizes:
        x = torch.randn(2, 3 if kind in PICTURES else 1, *size)
        given = x if kind in PICTURES else x[:, 0].transpose(1, 2)
        with torch.no_grad():
            tokens, pooled = outputs(reference, given)
            assert tokens.abs().max() > 0.3
            close(ours(x), tokens)
            close(ours.encode(x), pooled)
            close(outputs(again, given)[1], pooled)
    assert ViT.from_pretrained(tmp_path).spec == ours.spec


def test_dinov3_moves_its_coordinates_as_the_config_says(theirs):
    assert theirs("dinov3")[2].spec.coords == CentredGrid(rescale=2.0)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "registers", "dinov3"])
def test_feature_maps_are_the_hidden_states(kind, theirs):
    reference, _, ours = theirs(kind)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        states = reference(x, output_hidden_states=True).hidden_states
        for layer, y in enumerate(ours(x, features=[0])):
            close(y.flatten(2).transpose(1, 2), states[layer + 1][:, ours.prefix:])


def test_labels_are_kept(theirs, tmp_path):
    model = theirs("vit classifier")[0]
    model.config.id2label = {i: f"class {i}" for i in range(5)}
    model.save_pretrained(tmp_path)
    ours = ViT.from_pretrained(tmp_path)
    assert ours.labels == tuple(f"class {i}" for i in range(5))
    ours.save_pretrained(tmp_path / "again", layout="hf")
    assert type(model).from_pretrained(tmp_path / "again").config.id2label == model.config.id2label


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"hidden_act": "mish"}, "hidden_act should be one of"), ({"num_attention_heads": 7}, "over 7 heads"),
    ({"architectures": ["ViTMAEModel"]}, "ViTMAEModel is not known"), ({"surprise": 3}, "surprise=3"),
    ({"image_size": 64}, "position_embeddings"), ({"pooler_act": "relu"}, "pooler_act should be tanh"),
])
def test_configs_that_do_not_fit(changes, sentence, theirs, tmp_path):
    folder = theirs("vit")[1]
    config = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=sentence):
        ViT.from_pretrained(tmp_path)


def test_a_model_that_transformers_has_no_place_for(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_base_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4,
                              global_pool="avg", num_classes=3)
    timm.models.save_for_hf(model, tmp_path / "timm", safe_serialization=True,
                            model_args={"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4})
    ours = ViT.from_pretrained(tmp_path / "timm")
    with pytest.raises(InputError, match="hf"):
        ours.save_pretrained(tmp_path / "hf", layout="hf")
    assert not (tmp_path / "hf").exists()


def test_timm_and_transformers_exchange_dinov3(theirs, tmp_path):
    """One set of weights in three libraries, an odd grid included."""
    timm = pytest.importorskip("timm")
    reference, _, ours = theirs("dinov3")
    ours.save_pretrained(tmp_path, layout="timm")
    peer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 40, 24)
    with torch.no_grad():
        close(peer.forward_features(x), reference(x).last_hidden_state)


@pytest.mark.parametrize("kind, processor", [("vit", "ViTImageProcessor"), ("dinov2", "BitImageProcessor"),
                                             ("dinov3", "DINOv3ViTImageProcessor"), ("deit", "DeiTImageProcessor")])
def test_preprocessing_is_read_from_the_processors_file(kind, processor, theirs, tmp_path):
    from PIL import Image

    made = getattr(transformers, processor + "Pil", None) or getattr(transformers, processor)
    reference = made()
    theirs(kind)[2].save_pretrained(tmp_path, layout="hf")
    reference.save_pretrained(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (250, 301, 3), dtype=np.uint8))
    pixels = reference(picture, return_tensors="pt").pixel_values[0]
    rounding = 1 / 255 / 0.225 if "v3" in processor else 1e-5  # floats are resized
    close(ViT.from_pretrained(tmp_path).preprocess(picture), torch.as_tensor(pixels), rounding)
