"""CLIP against open_clip and transformers themselves, both directions, on raw features."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel

from mm.encoders import CLIP


def pixels(height=32, width=32):
    return torch.randn(3, 3, height, width)


def close(ours, theirs, atol=1e-5):
    assert theirs.abs().max() > 0.1, "the reference's features are too small to tell anything"
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def same_features(model, reference, x, ids):
    with torch.no_grad():
        close(model.encode_image(x), reference.encode_image(x))
        close(model.encode_text(ids), reference.encode_text(ids))


def opened_by_open_clip(folder):
    return open_clip.create_model_and_transforms(f"local-dir:{folder}")[0].eval()


# ------------------------------------------------------------------------------------------ open_clip
OPEN_CLIP = {
    "plain": {},
    "quick_gelu": {"quick_gelu": True},
    "head_width": {"vision": {"head_width": 24}},
    "mlp_ratio": {"vision": {"width": 52, "head_width": 13, "mlp_ratio": 4.9231}},
    "layer_scale": {"vision": {"ls_init_value": 1e-4}, "text": {"ls_init_value": 0.1}},
    "no_ln_pre": {"vision": {"no_ln_pre": True}},
    "avg": {"vision": {"pool_type": "avg"}},
    "ln_after_tok": {"vision": {"final_ln_after_pool": True}},
    "ln_after_avg": {"vision": {"final_ln_after_pool": True, "pool_type": "avg"}},
    "sin_cos_2d": {"vision": {"pos_embed_type": "sin_cos_2d"}},
    "attentional": {"vision": {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4}},
    "attentional_avg": {"vision": {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4,
                                   "pool_type": "avg", "final_ln_after_pool": True}},
    "attentional_fused": {"embed_dim": 48, "vision": {"attentional_pool": True, "attn_pooler_heads": 3}},
    "tanh_eps": {"vision": {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-2}},
                 "text": {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}}},
    "oblong": {"vision": {"image_size": [32, 48], "patch_size": [8, 16]}},
    "first": {"text": {"pool_type": "first"}},
    "last": {"text": {"pool_type": "last"}},
    "eos": {"text": {"pool_type": "eos", "eos_id": 511}},
    "bidirectional": {"text": {"no_causal_mask": True}},
    "no_projection": {"text": {"width": 24, "proj_type": "none"}},
    "biased_projection": {"text": {"proj_bias": True}},
    "logit_bias": {"init_logit_bias": -10.0, "init_logit_scale": 2.3},
    "logit_scale_of_one_dimension": {"nonscalar_logit_scale": True, "init_logit_bias": -1.0},
}


@pytest.mark.parametrize("custom", [False, True], ids=["top", "custom_text"])
@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip_there_and_back(open_clip_model, ids, tmp_path, name, custom):
    folder, reference = open_clip_model(custom=custom, **OPEN_CLIP[name])
    model = CLIP.from_pretrained(folder)
    height, width = model.spec.image.image
    x = pixels(height, width)
    same_features(model, reference, x, ids)
    close(model.logit_scale.exp().flatten(), reference.logit_scale.exp().flatten())
    model.save_pretrained(tmp_path / "back", layout="open_clip")
    back = opened_by_open_clip(tmp_path / "back")
    same_features(model, back, x, ids)
    assert torch.equal(back.logit_scale.flatten(), reference.logit_scale.flatten())
    if reference.logit_bias is not None:
        assert torch.equal(back.logit_bias.flatten(), reference.logit_bias.flatten())
    model.save_pretrained(tmp_path / "mm")
    assert CLIP.from_pretrained(tmp_path / "mm").spec == model.spec
    assert CLIP.from_pretrained(tmp_path / "back").spec == model.spec


@pytest.mark.parametrize("size", [(40, 24), (64, 64), (16, 16), (48, 16)])
def test_open_clip_at_another_resolution(open_clip_model, size):
    """open_clip interpolates at load; an incomplete last patch is left out."""
    folder, _ = open_clip_model()
    reference = open_clip.create_model(f"local-dir:{folder}", force_image_size=size).eval()
    x = pixels(*size)
    with torch.no_grad():
        close(CLIP.from_pretrained(folder).encode_image(x), reference.encode_image(x))


def test_open_clip_in_float64(open_clip_model, ids):
    folder, reference = open_clip_model(quick_gelu=True)
    model, x = CLIP.from_pretrained(folder, dtype=torch.float64), pixels().double()
    reference = reference.double()
    with torch.no_grad():
        close(model.encode_image(x), reference.encode_image(x), atol=1e-12)
        close(model.encode_text(ids), reference.encode_text(ids), atol=1e-12)


def test_open_clip_in_bfloat16_stays_near(open_clip_model, ids):
    folder, reference = open_clip_model()
    model = CLIP.from_pretrained(folder, dtype=torch.bfloat16)
    x = pixels()
    with torch.no_grad():
        for ours, theirs in ((model.encode_image(x), reference.encode_image(x)),
                             (model.encode_text(ids), reference.encode_text(ids))):
            assert ours.dtype == torch.bfloat16
            assert torch.cosine_similarity(ours.float(), theirs).min() > 0.999


def test_quick_gelu_is_not_gelu(open_clip_model, ids):
    folder, reference = open_clip_model(quick_gelu=True)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = False
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model, x = CLIP.from_pretrained(folder), pixels()
    with torch.no_grad():
        assert (model.encode_image(x) - reference.encode_image(x)).abs().max() > 1e-3
        assert (model.encode_text(ids) - reference.encode_text(ids)).abs().max() > 1e-3


def test_training_gradients_are_open_clips(open_clip_model, ids):
    folder, reference = open_clip_model(quick_gelu=True)
    model, x = CLIP.from_pretrained(folder).train(), pixels()
    image, text = model(x, ids[:3])
    (image * text).sum().backward()
    (reference.encode_image(x) * reference.encode_text(ids[:3])).sum().backward()
    theirs = dict(reference.named_parameters())
    block = "visual.transformer.resblocks.0."
    for ours, name in ((model.image.stack.blocks[0].mixer.qkv.weight, block + "attn.in_proj_weight"),
                       (model.image.patchify.weight, "visual.conv1.weight"),
                       (model.image.cls, "visual.class_embedding"),
                       (model.image.positions.weight, "visual.positional_embedding"),
                       (model.text.tokens, "token_embedding.weight"), (model.text.positions, "positional_embedding")):
        scale = theirs[name].grad.abs().max()
        close(ours.grad.reshape_as(theirs[name]) / scale, theirs[name].grad / scale)


def test_openai_numbers_in_the_weights_are_ignored(open_clip_model, ids):
    """OpenAI's archives hold input_resolution, context_length and vocab_size beside the weights."""
    folder, reference = open_clip_model(quick_gelu=True)
    extra = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save({**reference.state_dict(), **extra}, folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_model.safetensors").unlink()
    same_features(CLIP.from_pretrained(folder), reference, pixels(), ids)


# --------------------------------------------------------------------------------------- transformers
HF = {
    "plain": {},
    "legacy_eos": {"text": {"eos_token_id": 2}},
    "other_eos": {"text": {"eos_token_id": 77}},
    "gelu": {"text": {"hidden_act": "gelu"}, "vision": {"hidden_act": "gelu"}},
    "one_act_each": {"text": {"hidden_act": "gelu"}, "vision": {"hidden_act": "quick_gelu"}},
    "gelu_tanh": {"text": {"hidden_act": "gelu_pytorch_tanh"}, "vision": {"hidden_act": "gelu_new"}},
    "eps": {"text": {"layer_norm_eps": 1e-3}, "vision": {"layer_norm_eps": 1e-2}},
    "wide": {"vision": {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 80}},
}


def hf_image(reference, x, **kwargs):
    return reference.get_image_features(pixel_values=x, **kwargs).pooler_output


def hf_text(reference, ids):
    return reference.get_text_features(input_ids=ids).pooler_output


def same_as_hf(model, reference, x, ids):
    with torch.no_grad():
        close(model.encode_image(x), hf_image(reference, x))
        close(model.encode_text(ids), hf_text(reference, ids))


@pytest.mark.parametrize("name", HF)
def test_hf_there_and_back(hf_model, ids, tmp_path, name):
    folder, reference = hf_model(**HF[name])
    ids[1, 9] = 77
    model, x = CLIP.from_pretrained(folder), pixels()
    same_as_hf(model, reference, x, ids)
    model.save_pretrained(tmp_path / "back", layout="hf")
    back, report = CLIPModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    same_as_hf(model, back.eval(), x, ids)
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert CLIP.from_pretrained(tmp_path / "back").spec == model.spec


@pytest.mark.parametrize("size", [(40, 24), (64, 64), (16, 16)])
def test_hf_at_another_resolution(hf_model, size):
    folder, reference = hf_model()
    x = pixels(*size)
    with torch.no_grad():
        close(CLIP.from_pretrained(folder).encode_image(x), hf_image(reference, x, interpolate_pos_encoding=True))


def test_hf_in_float64(hf_model, ids):
    folder, reference = hf_model()
    model, x = CLIP.from_pretrained(folder, dtype=torch.float64), pixels().double()
    with torch.no_grad():
        close(model.encode_image(x), hf_image(reference.double(), x), atol=1e-12)


def test_tokens_are_those_of_each_reference(hf_model, open_clip_model, ids):
    """transformers normalises the class token alone (post_layernorm), open_clip every token (ln_post)."""
    x = pixels()
    folder, reference = hf_model()
    model = CLIP.from_pretrained(folder)
    with torch.no_grad():
        out = reference.vision_model(x)
        close(model.image(x), out.last_hidden_state, atol=2e-5)
        close(model.image.pool(model.image(x)), out.pooler_output)
        out = reference.text_model(ids)
        close(model.text(ids), out.last_hidden_state)
        close(model.text.pool(model.text(ids), ids), out.pooler_output)
    folder, reference = open_clip_model()
    reference.visual.output_tokens = True
    with torch.no_grad():
        pooled, tokens = reference.visual(x)
        close(CLIP.from_pretrained(folder).image(x)[:, 1:], tokens)


def test_eos_two_means_the_largest_id(hf_model, ids):
    """A row that holds the token 2 early must not be pooled there when the config is from before 2023."""
    ids[:, 1] = 2
    folder, reference = hf_model(text={"eos_token_id": 2})
    with torch.no_grad():
        ours = CLIP.from_pretrained(folder).encode_text(ids)
        close(ours, hf_text(reference, ids))
        reference.text_model.eos_token_id = 3
        ids[:, 1] = 3
        assert (ours - hf_text(reference, ids)).abs().max() > 0.1


def old_hf_files(folder, reference):
    """A directory from before 2023: .bin weights with position_ids, sub-configs under two names, many idle keys."""
    state = reference.state_dict()
    for tower, length in (("text", 16), ("vision", 17)):
        state[f"{tower}_model.embeddings.position_ids"] = torch.arange(length)[None]
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    for tower in ("text", "vision"):
        old = config[f"{tower}_config"]
        config[f"{tower}_config_dict"] = {key: old[key] for key in old if key not in ("hidden_act", "eos_token_id")}
        old |= {"hidden_act": "relu", "top_k": 50, "typical_p": 1.0, "num_beams": 1, "max_length": 20, "dropout": 0.1}
    config["torch_dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config))


def test_files_from_before_2023(hf_model, ids):
    """`text_config_dict` wins over `text_config`, and with it the defaults of the keys that it leaves out."""
    folder, _ = hf_model(text={"eos_token_id": 2})
    old_hf_files(folder, CLIPModel.from_pretrained(folder))
    same_as_hf(CLIP.from_pretrained(folder), CLIPModel.from_pretrained(folder).eval(), pixels(), ids)


def test_a_config_with_every_default_written_out(hf_model, ids):
    """Old files list the generation and bookkeeping settings of the library; none of them changes a feature."""
    folder, reference = hf_model()
    whole = json.loads(reference.config.to_json_string(use_diff=False))
    idle = {"_commit_hash": "abc", "_name_or_path": "x", "torch_dtype": "torch.float32", "top_k": 50, "top_p": 1.0,
            "temperature": 1.0, "length_penalty": 1.0, "num_beams": 1, "max_length": 20, "tie_word_embeddings": True,
            "return_dict": True, "tf_legacy_loss": False, "pruned_heads": {}, "gradient_checkpointing": True}
    whole |= idle
    for tower in ("text_config", "vision_config"):
        whole[tower] |= idle
    (folder / "config.json").write_text(json.dumps(whole))
    same_as_hf(CLIP.from_pretrained(folder), reference, pixels(), ids)


# ----------------------------------------------------------------------------------------- conversion
def test_hf_to_open_clip_to_mm_to_hf_keeps_every_bit(hf_model, ids, tmp_path):
    folder, reference = hf_model(text={"hidden_act": "gelu"}, vision={"hidden_act": "gelu"})
    model = CLIP.from_pretrained(folder)
    for layout in ("open_clip", "mm", "hf"):
        model.save_pretrained(tmp_path / f"as_{layout}", layout=layout)
        model = CLIP.from_pretrained(tmp_path / f"as_{layout}")
    first, last = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "as_hf"))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)
    x = pixels()
    same_as_hf(model, CLIPModel.from_pretrained(tmp_path / "as_hf").eval(), x, ids)
    same_features(model, opened_by_open_clip(tmp_path / "as_open_clip"), x, ids)


def test_open_clip_to_hf(open_clip_model, ids, tmp_path):
    folder, reference = open_clip_model(custom=True, quick_gelu=True)
    CLIP.from_pretrained(folder).save_pretrained(tmp_path / "hf", layout="hf")
    hf = CLIPModel.from_pretrained(tmp_path / "hf").eval()
    x = pixels()
    with torch.no_grad():
        close(hf_image(hf, x), reference.encode_image(x))
        close(hf_text(hf, ids), reference.encode_text(ids))
