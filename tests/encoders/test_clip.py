"""The CLIP class: pictures and words in, files in every layout, one sentence for what is wrong with a checkpoint."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer

from mm.encoders import CLIP
from mm.encoders.vision.families import FAMILIES
from mm.errors import InputError
from mm.tokenizer.tokenizer import train_bpe

CONFIG = "open_clip_config.json"
WORDS = ["a red square", "a blue circle", "two green triangles", "a red circle and a blue square"]


def picture(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(WORDS * 5, 560)


@pytest.fixture
def clip(open_clip_model, tokenizer):
    text = {"vocab_size": 560, "eos_id": tokenizer.eos_id, "pool_type": "eos"}
    model = CLIP.from_pretrained(open_clip_model(text=text)[0])
    model.tokenizer = tokenizer
    return model


def test_similarity_is_the_cosine_of_what_the_parts_give(clip, tmp_path):
    path = tmp_path / "one.png"
    picture(50, 30).save(path)
    images = [path, picture(20, 40, 1), np.asarray(picture(33, 33, 2))]
    scores = clip.similarity(images, WORDS)
    assert scores.shape == (3, 4) and not scores.requires_grad
    pixels = clip.preprocess(images)
    assert pixels.shape == (3, 3, 32, 32) and clip.preprocess(images[1]).shape == (3, 32, 32)
    image = F.normalize(clip.encode_image(pixels), dim=-1)
    text = F.normalize(clip.encode_text(clip.tokenize(WORDS)), dim=-1)
    torch.testing.assert_close(scores, image @ text.T)
    torch.testing.assert_close(clip.similarity(pixels, WORDS), scores)
    torch.testing.assert_close(clip.similarity(images[1], WORDS[2]), scores[1:2, 2:3])


def test_forward_gives_both_features(clip):
    x, ids = torch.randn(2, 3, 32, 32), clip.tokenize(WORDS[:2])
    image, text = clip(x, ids)
    assert torch.equal(image, clip.encode_image(x)) and torch.equal(text, clip.encode_text(ids))


@pytest.mark.parametrize("layout", ["mm", "hf", "open_clip"])
def test_what_is_saved_is_the_same_model(clip, tmp_path, layout):
    clip.save_pretrained(tmp_path / "saved", layout=layout)
    again = CLIP.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.tokenize(WORDS), clip.tokenize(WORDS))
    images = [picture(50, 30), picture(20, 40)]
    torch.testing.assert_close(again.similarity(images, WORDS), clip.similarity(images, WORDS))
    assert (again.fingerprint() == clip.fingerprint()) == (layout in ("mm", "open_clip"))


def test_the_references_read_the_saved_pictures_and_words_alike(clip, tmp_path):
    clip.save_pretrained(tmp_path / "hf", layout="hf")
    ids = clip.tokenize(WORDS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs = tokenizer(WORDS, padding="max_length", max_length=16, return_tensors="pt").input_ids
    assert torch.equal(theirs, ids)
    image = picture(50, 30)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    torch.testing.assert_close(CLIP.from_pretrained(tmp_path / "hf").preprocess(image),
                               torch.as_tensor(np.asarray(processor(image).pixel_values[0])), atol=1e-5, rtol=0)
    clip.save_pretrained(tmp_path / "oc", layout="open_clip")
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'oc'}")
    torch.testing.assert_close(clip.preprocess(image), preprocess(image), atol=1e-5, rtol=0)
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'oc'}")(WORDS)
    assert torch.equal(theirs, ids)


def test_fingerprint_sees_weights_spec_and_preprocessing(clip, tmp_path):
    first = clip.fingerprint()
    assert len(first) == 16 and int(first, 16) >= 0
    with torch.no_grad():
        clip.text.positions[0, 0] += 1e-6
    assert clip.fingerprint() != first
    clip.save_pretrained(tmp_path / "saved")
    second = clip.fingerprint()
    path = tmp_path / "saved" / "preprocess.json"
    path.write_text(path.read_text().replace("bicubic", "bilinear"))
    assert CLIP.from_pretrained(tmp_path / "saved").fingerprint() not in (first, second)


def test_dtype_and_device(open_clip_model):
    folder, _ = open_clip_model()
    half = CLIP.from_pretrained(folder, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and not half.training
    assert half.encode_image(torch.randn(1, 3, 32, 32)).dtype == torch.bfloat16


def test_what_is_not_trained_stays_so_after_loading(open_clip_model):
    model = CLIP.from_pretrained(open_clip_model(vision={"pos_embed_type": "sin_cos_2d"})[0])
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["image.positions.weight"]


def test_meta_device(clip):
    with torch.device("meta"):
        empty = CLIP(clip.spec)
    assert {p.device.type for p in empty.parameters()} == {"meta"}


def test_a_new_model_starts_at_its_specs_scale(clip):
    fresh = CLIP(clip.spec)
    torch.testing.assert_close(fresh.logit_scale.detach(), torch.tensor(clip.spec.logit_scale))
    assert fresh.logit_bias is None
    assert fresh.encode_image(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_without_a_tokenizer(open_clip_model):
    model = CLIP.from_pretrained(open_clip_model()[0])
    with pytest.raises(InputError, match="no tokenizer"):
        model.tokenize(["a"])


# --------------------------------------------------------------------------------- broken checkpoints
def change_config(folder, **changes):
    """Set keys of the model config, `vision__x` and `text__x` in the towers'; None removes."""
    path = folder / CONFIG
    config = json.loads(path.read_text())
    for key, value in changes.items():
        tower, _, name = key.rpartition("__")
        target = config["model_cfg"][f"{tower}_cfg"] if tower else config["model_cfg"]
        target[name] = value
        if value is None:
            del target[name]
    path.write_text(json.dumps(config))


def change_weights(folder, change):
    path = folder / "open_clip_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def refused(folder, message):
    with pytest.raises(InputError, match=message) as caught:
        CLIP.from_pretrained(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.pop("visual.proj"), r"1 of the weights is missing \(visual.proj\)"),
    (lambda s: s.pop("transformer.resblocks.1.attn.in_proj_bias"), "missing .*resblocks.1.attn.in_proj_bias"),
    (lambda s: s.update({"visual.head": torch.ones(3)}), r"not expected by the config \(visual.head\)"),
    (lambda s: s.update({"visual.proj": torch.ones(48, 25)}),
     r"visual.proj should have shape \(48, 24\) by the config, but has \(48, 25\)"),
    (lambda s: s["ln_final.weight"].fill_(float("nan")), "ln_final.weight holds values that are not finite"),
])
def test_weights_that_do_not_fit(open_clip_model, change, message):
    folder, _ = open_clip_model()
    change_weights(folder, change)
    refused(folder, message)


@pytest.mark.parametrize(("changes", "message"), [
    ({"vision__image_size": 64}, r"visual.positional_embedding should have shape \(65, 48\) by the config"),
    ({"vision__layers": 3}, r"12 of the weights are missing \(visual.transformer.resblocks.2"),
    ({"text__layers": 2}, r"12 of the weights are not expected by the config \(transformer.resblocks.2"),
    ({"text__vocab_size": 600}, r"token_embedding.weight should have shape \(600, 32\)"),
    ({"vision__no_ln_pre": True}, r"not expected by the config \(visual.ln_pre"),
    ({"vision__ls_init_value": 1e-3}, "missing .*resblocks.0.ls_1.gamma"),
    ({"init_logit_bias": -10}, r"missing \(logit_bias\)"),
])
def test_a_config_that_contradicts_its_weights(open_clip_model, changes, message):
    folder, _ = open_clip_model()
    change_config(folder, **changes)
    refused(folder, message)


@pytest.mark.parametrize(("changes", "message"), [
    ({"vision__qk_norm": True}, "vision_cfg asks for something that is not supported: qk_norm=True"),
    ({"vision__timm_model_name": "vit_base"}, "timm cannot make 'vit_base'"),
    ({"text__hf_model_name": "roberta-base"}, "text_cfg asks for .*hf_model_name='roberta-base'"),
    ({"text__embed_cls": True}, "text_cfg asks for .*embed_cls=True"),
    ({"multimodal_cfg": {"width": 8}}, "model_cfg asks for .*multimodal_cfg"),
    ({"vision__layers": [3, 4, 6, 3]}, r"layers=\[3, 4, 6, 3\] is a ResNet"),
    ({"vision__block_type": "custom"}, "block_type should be default, not 'custom'"),
    ({"vision__pool_type": "none"}, "pool_type should be tok or avg, not 'none'"),
    ({"vision__attentional_pool": "parallel"}, "attentional_pool should be bool, not 'parallel'"),
    ({"text__pool_type": "middle"}, "pool_type should be argmax or eos or first or last, not 'middle'"),
    ({"text__act_kwargs": {"slope": 2}}, "act_kwargs asks for something that is not supported: slope=2"),
    ({"text__width": "wide"}, "text_cfg: width should be int, not 'wide'"),
    ({"text__heads": 5}, "width 32 cannot be split over 5 heads"),
    ({"vision__layers": 0}, "layers should be positive, not 0"),
    ({"embed_dim": None}, "model_cfg has no embed_dim"),
    ({"text__proj_type": "none"}, "image features are 24 wide and text features 32"),
])
def test_configs_that_are_not_understood(open_clip_model, changes, message):
    folder, _ = open_clip_model()
    change_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        CLIP.from_pretrained(folder)


def test_switched_off_keys_are_harmless(open_clip_model):
    folder, _ = open_clip_model()
    change_config(folder, vision__qk_norm=False, vision__timm_model_name="", text__output_tokens=True, custom_text=True)
    CLIP.from_pretrained(folder)


@pytest.mark.parametrize(("tower", "key", "value", "message"), [
    ("text", "sliding_window", 4, "text_config asks for something that is not supported: sliding_window=4"),
    ("vision", "use_rope", True, "vision_config asks for something that is not supported: use_rope=True"),
    ("vision", "hidden_act", "mish", "hidden_act should be one of quick_gelu, .*, not 'mish'"),
    ("text", "hidden_size", 33, "hidden_size 33 cannot be split over 4 heads"),
    ("text", "eos_token_id", [1, 2], r"eos_token_id should be int, not \[1, 2\]"),
])
def test_hf_configs_that_are_not_understood(hf_model, tower, key, value, message):
    folder, _ = hf_model()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config[f"{tower}_config"][key] = value
    path.write_text(json.dumps(config))
    refused(folder, message)


def test_directories_that_hold_no_clip(tmp_path):
    refused(tmp_path, "there is no config.json or open_clip_config.json")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    refused(tmp_path, "holds no CLIP checkpoint: config.json is of the kind bert")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    refused(tmp_path, "holds none of model.safetensors, pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"family": "clip", "spec": {"is": "LayerNorm"}}')
    refused(tmp_path, "should hold a CLIPSpec under spec")


def test_layouts_are_told_apart_by_content(open_clip_model, hf_model, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(open_clip_model()[0], both)
    assert FAMILIES.recognise(both, "clip").layout == "open_clip"
    shutil.copytree(hf_model()[0], both, dirs_exist_ok=True)
    assert FAMILIES.recognise(both, "clip").layout == "hf"
    CLIP.from_pretrained(both).save_pretrained(both)
    assert FAMILIES.recognise(both, "clip").layout == "mm"
    CLIP.from_pretrained(both)


@pytest.mark.parametrize(("case", "message"), [
    ({"vision": {"pool_type": "avg", "final_ln_after_pool": True}}, "image.head.pool is MeanPool"),
    ({"vision": {"no_ln_pre": True}}, "image.pre_norm is None"),
    ({"vision": {"ls_init_value": 0.1}}, r"image.stack.layers\[0\].layer_scale is 0.1, where it has None"),
    ({"text": {"no_causal_mask": True}}, "text.stack.layers.*window.right is None, where it has 0"),
    ({"text": {"proj_bias": True}}, "text.head.proj.bias is True"),
    ({"init_logit_bias": -10.0}, "logit_bias is -10.0, where it has None"),
    ({"vision": {"image_size": [32, 48]}}, r"image.image\[1\] is 48, where it has 32"),
])
def test_what_transformers_cannot_hold(open_clip_model, tmp_path, case, message):
    model = CLIP.from_pretrained(open_clip_model(**case)[0])
    with pytest.raises(InputError, match=f"the hf layout cannot hold this model: {message}"):
        model.save_pretrained(tmp_path / "hf", layout="hf")
    assert not (tmp_path / "hf").exists()


def test_what_open_clip_cannot_hold(hf_model, tmp_path):
    model = CLIP.from_pretrained(hf_model(text={"hidden_act": "gelu"}, vision={"hidden_act": "quick_gelu"})[0])
    with pytest.raises(InputError, match="the open_clip layout cannot hold .*act is gelu, where .* quick_gelu"):
        model.save_pretrained(tmp_path / "oc", layout="open_clip")


def test_an_unknown_layout(clip, tmp_path):
    with pytest.raises(InputError, match="layout should be one of mm, hf, open_clip, not 'keras'"):
        clip.save_pretrained(tmp_path / "x", layout="keras")
