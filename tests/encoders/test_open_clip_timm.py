"""open_clip's CLIPs with timm towers in both directions: SigLIP, EVA-02-CLIP, Perception Encoder, ConvNeXt, ResNet."""

import json
import logging
import sys
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP as TopCLIP
from open_clip.model import CustomTextCLIP
from safetensors.torch import save_file
from support import close, redraw

from mm.encoders import CLIP, ViT
from mm.encoders.spec import Backbone, TokenPool, ViTSpec
from mm.encoders.vision.families import open_clip_timm
from mm.errors import InputError

TEXT = {"context_length": 16, "vocab_size": 512, "width": 32, "heads": 4, "layers": 2, "mlp_ratio": 2.0}
SIGLIP = TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
SMALL = {"img_size": 32, "patch_size": 8, "depth": 2}
PLAIN = {"embed_dim": 64, "num_heads": 4}
SMALLER = {  # open_clip gives timm a name and nothing else, so small towers need names of their own
    "small_siglip": ("vision_transformer", "vit_base_patch16_siglip_224", PLAIN),
    "small_siglip_tanh": ("vision_transformer", "vit_giantopt_patch16_siglip_256", PLAIN | {"mlp_ratio": 3.7362}),
    "small_clip": ("vision_transformer", "vit_base_patch16_clip_quickgelu_224", PLAIN),
    "small_eva02": ("eva", "eva02_base_patch16_clip_224", PLAIN),
    "small_eva02_tiny": ("eva", "eva02_tiny_patch14_224", PLAIN),
    "small_eva_giant": ("eva", "eva_giant_patch14_224", PLAIN),
    "small_pe": ("eva", "vit_pe_core_base_patch16_224", PLAIN | {"ref_feat_shape": (4, 4), "attn_pool_num_heads": 4}),
}
KINDS = {
    "siglip": ("small_siglip", {"timm_pool": "map", "timm_proj": "none"}, SIGLIP, {"init_logit_bias": -10}),
    "siglip2": ("small_siglip_tanh", {"timm_pool": "map", "timm_proj": "none"},
                SIGLIP | {"act_kwargs": {"approximate": "tanh"}}, {"init_logit_bias": -10}),
    "clip": ("small_clip", {"timm_pool": "token", "timm_proj": None}, TEXT, {"quick_gelu": True}),
    "linear": ("small_clip", {"timm_pool": "avg", "timm_proj": "linear"}, TEXT, {}),
    "linear with bias": ("small_siglip", {"timm_pool": "", "timm_proj": "linear", "timm_proj_bias": True}, TEXT, {}),
    "eva02": ("small_eva02", {"timm_pool": "token", "timm_proj": None}, TEXT, {}),
    "eva02 tiny": ("small_eva02_tiny", {"timm_pool": "avg", "timm_proj": None}, TEXT, {}),
    "eva giant": ("small_eva_giant", {"timm_pool": "token", "timm_proj": None}, TEXT, {}),
    "pe": ("small_pe", {"timm_pool": "map", "timm_proj": None}, TEXT, {"nonscalar_logit_scale": True}),
    "mlp": ("small_clip", {"timm_pool": "token", "timm_proj": "mlp"}, TEXT, {}),
    "convnext": ("test_convnext", {"timm_pool": "", "timm_proj": "linear", "image_size": 160}, TEXT, {}),
    "resnet": ("test_resnet", {"timm_pool": "avg", "timm_proj": "mlp", "image_size": 160}, TEXT, {}),
}
NATIVE = [kind for kind in KINDS if kind not in ("mlp", "convnext", "resnet")]


def register(name, module, architecture, arguments):
    """A small model under a name of its own, where `timm.list_models` finds it."""
    def make(pretrained=False, **more):
        from timm.models import model_entrypoint

        more = {key: value for key, value in more.items() if not key.startswith("pretrained")}
        return model_entrypoint(architecture)(pretrained=False, **SMALL | arguments | more)
    make.__name__ = make.__qualname__ = name
    make.__module__ = f"timm.models.{module}"
    cfg = timm.models.get_pretrained_cfg(architecture).to_dict() | {"input_size": (3, 32, 32)}
    sys.modules[make.__module__].default_cfgs[name] = timm.models._pretrained.DefaultCfg(
        tags=__import__("collections").deque([""]), cfgs={"": timm.models._pretrained.PretrainedCfg(**cfg)})
    timm.models.register_model(make)


@pytest.fixture(scope="module", autouse=True)
def names():
    logging.disable(logging.INFO)
    for name, (module, architecture, arguments) in SMALLER.items():
        register(name, module, architecture, arguments)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """open_clip's model of a kind, its directory, and ours read from there; each is made once."""
    made = {}

    def make(kind, custom=True):
        if (kind, custom) not in made:
            torch.manual_seed(0)
            name, vision, text, top = KINDS[kind]
            config = {"embed_dim": 64 if vision["timm_proj"] == "none" else 24, **top, "text_cfg": text,
                      "vision_cfg": {"image_size": 32, "timm_model_name": name, **vision}}
            model = redraw((CustomTextCLIP if custom else TopCLIP)(**json.loads(json.dumps(config))))
            folder = tmp_path_factory.mktemp("theirs")
            save_file(model.state_dict(), folder / "open_clip_model.safetensors", {"format": "pt"})
            config |= {"custom_text": True} if custom else {}
            (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
            made[kind, custom] = model, folder, CLIP.from_pretrained(folder)
        return made[kind, custom]
    return make


def reopened(folder, size=None):
    return open_clip.create_model(f"local-dir:{folder}", force_image_size=size).eval()


def same(ours, reference, x, ids):
    with torch.no_grad():
        features = reference.encode_image(x)
        assert features.abs().max() > 0.1
        close(ours.encode_image(x), features)
        close(ours.encode_text(ids), reference.encode_text(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_both_directions(kind, theirs, tmp_path):
    reference, folder, ours = theirs(kind)
    assert isinstance(ours.spec.image, ViTSpec if kind in NATIVE else Backbone)
    x, ids = torch.randn(2, 3, *ours.spec.image.image), torch.randint(1, 512, (3, 16))
    same(ours, reference, x, ids)
    ours.save_pretrained(tmp_path / "back", layout="open_clip")
    back = reopened(tmp_path / "back")
    same(ours, back, x, ids)
    if kind != "linear with bias":  # which is the same as timm's own classifier, and written as that
        state, written = reference.state_dict(), back.state_dict()
        assert state.keys() == written.keys()
        assert all(torch.equal(value.flatten(), written[name].flatten()) for name, value in state.items())
    assert CLIP.from_pretrained(tmp_path / "back").spec == ours.spec
    ours.save_pretrained(tmp_path / "mm")
    again = CLIP.from_pretrained(tmp_path / "mm")
    assert again.spec == ours.spec and again.fingerprint() == ours.fingerprint()
    close(again.encode_image(x), ours.encode_image(x), 1e-6)


@pytest.mark.parametrize("kind", ["siglip", "resnet"])
def test_text_at_the_top(kind, theirs):
    reference, _, ours = theirs(kind, custom=False)
    same(ours, reference, torch.randn(2, 3, *ours.spec.image.image), torch.randint(1, 512, (3, 16)))


@pytest.mark.parametrize("size", [(48, 64), (40, 24)])
@pytest.mark.parametrize("kind", ["siglip", "eva02", "pe"])
def test_other_resolutions(kind, size, theirs):
    _, folder, ours = theirs(kind)
    same(ours, reopened(folder, size), torch.randn(2, 3, *size), torch.randint(1, 512, (3, 16)))


def test_a_convolutional_tower_at_another_resolution(theirs):
    reference, _, ours = theirs("convnext")
    same(ours, reference, torch.randn(2, 3, 96, 64), torch.randint(1, 512, (3, 16)))


def test_the_logits(theirs):
    reference, _, ours = theirs("siglip")
    x, ids = torch.randn(2, 3, 32, 32), torch.randint(1, 512, (3, 16))
    with torch.no_grad():
        image, text = (torch.nn.functional.normalize(y, dim=-1) for y in ours(x, ids))
        close(image @ text.T * ours.logit_scale.exp() + ours.logit_bias, reference.get_logits(x, ids)[0])


# -------------------------------------------------------------------------------------------- traps
def test_transformers_tanh_is_not_written_as_exact_gelu(theirs, tmp_path):
    """The same weights give other features: 4.6e-4 on SigLIP's towers."""
    ours = theirs("siglip")[2]
    ours.save_pretrained(tmp_path, layout="hf")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vision_config"]["hidden_act"] == config["text_config"]["hidden_act"] == "gelu"
    for part in ("vision_config", "text_config"):
        config[part]["hidden_act"] = "gelu_pytorch_tanh"
    (tmp_path / "config.json").write_text(json.dumps(config))
    tanh, x = CLIP.from_pretrained(tmp_path), torch.randn(2, 3, 32, 32)
    assert (tanh.encode_image(x) - ours.encode_image(x)).abs().max() > 1e-4
    with pytest.raises(InputError, match="no name gives this tower: in small_siglip.*act is gelu_tanh, where"):
        tanh.save_pretrained(tmp_path / "no", layout="open_clip")
    assert not (tmp_path / "no").exists()


def test_transformers_siglip_opens_in_open_clip(theirs, tmp_path):
    reference, _, ours = theirs("siglip")
    ours.save_pretrained(tmp_path / "hf", layout="hf")
    CLIP.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "back", layout="open_clip")
    x, ids = torch.randn(2, 3, 32, 32), torch.randint(1, 512, (3, 16))
    with torch.no_grad():
        close(reopened(tmp_path / "back").encode_image(x), reference.encode_image(x))
        close(ours.encode_text(ids), reopened(tmp_path / "back").encode_text(ids))


def test_quick_gelu_is_of_the_text_alone(theirs):
    """open_clip's quick_gelu says nothing about timm's towers, whose activation is their own."""
    spec = theirs("clip")[2].spec
    assert spec.image.stack.layers[0].mlp.act == spec.text.stack.layers[0].mlp.act == "quick_gelu"
    config = json.loads((theirs("eva02")[1] / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    changed = open_clip_timm.to_spec(config, "test")
    assert changed.image == theirs("eva02")[2].spec.image
    assert changed.text.stack.layers[0].mlp.act == "quick_gelu"


def test_text_is_read_at_its_last_place(theirs):
    assert theirs("siglip")[2].spec.text.head.pool == TokenPool(index=-1)


def test_its_image_tower_alone(theirs):
    _, folder, ours = theirs("siglip")
    x = torch.randn(1, 3, 32, 32)
    close(ViT.from_pretrained(folder).encode(x), ours.encode_image(x), 1e-6)
    with pytest.raises(InputError, match="image tower is timm's test_resnet, not a ViT"):
        ViT.from_pretrained(theirs("resnet")[1])


@pytest.mark.parametrize(("part", "changes", "sentence"), [
    ("vision_cfg", {"timm_model_name": "vit_nobody"}, "timm cannot make 'vit_nobody'"),
    ("vision_cfg", {"timm_proj": "conv"}, "timm_proj should be"),
    ("vision_cfg", {"timm_pool": "rot_attn"}, "timm_pool rot_attn is not supported"),
    ("vision_cfg", {"image_size": 64}, r"image_size is \(64, 64\), and timm's small_siglip is made for \(32, 32\)"),
    ("vision_cfg", {"surprise": 1}, "surprise=1"), ("text_cfg", {"hf_model_name": "x"}, "hf_model_name='x'"),
    ("text_cfg", {"layers": 3}, "missing")])
def test_configs_that_do_not_fit(part, changes, sentence, theirs, tmp_path):
    folder = theirs("siglip")[1]
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"][part] |= changes
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_model.safetensors").symlink_to(folder / "open_clip_model.safetensors")
    with pytest.raises(InputError, match=sentence):
        CLIP.from_pretrained(tmp_path)


# --------------------------------------------------------------------- what is published, without weights
PUBLISHED = ["ViT-B-16-SigLIP", "ViT-gopt-16-SigLIP2-256", "EVA02-B-16", "PE-Core-B-16", "convnext_base"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_fit_name_for_name(name):
    """Every weight of open_clip's own model has its place in ours and the other way round, with its shape."""
    path = Path(open_clip.__file__).parent / "model_configs" / f"{name}.json"
    config = json.loads(path.read_text())
    spec = open_clip_timm.to_spec({"model_cfg": config}, name)
    with torch.device("meta"):
        reference = (CustomTextCLIP if config.pop("custom_text", False) else TopCLIP)(**config)
        ours = ViT(spec.image) if isinstance(spec.image, ViTSpec) else None
    state = reference.state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    table = open_clip_timm.table(spec, shapes)
    assert (ours is None) == (name == "convnext_base")
    if ours is not None:
        wanted = {f"image.{key}": tuple(value.shape) for key, value in ours.state_dict().items()}
        visual = {key: shape for key, shape in shapes.items() if key.startswith("visual.")}
        made = table.load(visual, state.get, wanted, name)
        assert {key: tuple(value.shape) for key, value in made.items()} == wanted
        assert open_clip_timm.named(spec.image).name == config["vision_cfg"]["timm_model_name"]
