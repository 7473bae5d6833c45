"""Decoders with experts in the layouts that published files have, beside the one that transformers writes."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import redraw
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mm import TextDecoder
from mm.errors import InputError
from mm.text.families.experts import HALVES, HALVES_TRANSPOSED, widened

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}


def made(kind, **more):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **more)
    return redraw(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def rewrite(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


@torch.no_grad()
def equal(theirs, folder, tolerance=1e-5):
    ids = torch.randint(97, (2, 40))
    ours = TextDecoder.from_pretrained(folder)
    assert (ours(ids) - theirs(ids).logits).abs().max() <= tolerance
    return ours


@pytest.mark.parametrize("kind, more", [
    ("mixtral", {"num_local_experts": 4}), ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16})])
def test_experts_fused_in_one_tensor(kind, more, tmp_path):
    """What transformers 5 writes when it is not asked for the published layout."""
    theirs = made(kind, **more)
    theirs.save_pretrained(tmp_path, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(tmp_path / "model.safetensors"))
    equal(theirs, tmp_path)


def packed_oss(folder):
    """GPT-OSS as it is published: experts in four bits, the older keys, every number of a byte used."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0,
            "beta_slow": 1.0, "truncate": False}
    theirs = made("gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=6,
                  rope_parameters=yarn | {"rope_theta": 150000.0})
    theirs.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for i, layer in enumerate(theirs.model.layers):
        for part, rows, inputs in (("gate_up_proj", 128, 32), ("down_proj", 32, 64)):
            blocks = torch.randint(256, (4, rows, inputs // 32, 16), dtype=torch.uint8)
            scales = torch.randint(121, 126, (4, rows, inputs // 32), dtype=torch.uint8)
            getattr(layer.mlp.experts, part).data = convert_moe_packed_tensors(blocks, scales).float()
            name = f"model.layers.{i}.mlp.experts.{part}"
            del state[name]
            state |= {name + "_blocks": blocks, name + "_scales": scales}
    save_file(state, folder / "model.safetensors")
    rewrite(folder, rope_parameters=..., swiglu_alpha=..., rope_theta=150000.0, experts_per_token=2, hidden_act="silu",
            initial_context_length=16, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []},
            rope_scaling=yarn)
    return theirs


def test_gpt_oss_as_it_is_published(tmp_path):
    theirs = packed_oss(tmp_path)
    ours = equal(theirs, tmp_path)
    ours.save_pretrained(tmp_path / "out", layout="hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    ids = torch.randint(97, (1, 20))
    with torch.no_grad():
        assert (again(ids).logits - theirs(ids).logits).abs().max() <= 1e-6


def test_four_bits_are_exact_at_every_scale():
    blocks, scales = torch.arange(256).byte().view(1, 1, 16, 16), torch.arange(120, 136).byte().view(1, 1, 16)
    wide = widened(blocks, scales)
    assert wide.dtype == torch.bfloat16
    assert torch.equal(wide, convert_moe_packed_tensors(blocks, scales).mT)


def test_other_packings_and_slopes_are_refused(tmp_path):
    packed_oss(tmp_path)
    rewrite(tmp_path, quantization_config={"quant_method": "awq"})
    with pytest.raises(InputError, match="awq"):
        TextDecoder.from_pretrained(tmp_path)
    rewrite(tmp_path, quantization_config=..., swiglu_alpha=1.5)
    with pytest.raises(InputError, match="1.5"):
        TextDecoder.from_pretrained(tmp_path)


def test_a_missing_expert_is_named(tmp_path):
    made("mixtral", num_local_experts=4).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.block_sparse_moe\.experts\.2\.w3"):
        TextDecoder.from_pretrained(tmp_path)
    made("mixtral", num_local_experts=4).save_pretrained(tmp_path)
    rewrite(tmp_path, num_local_experts=3)
    with pytest.raises(InputError, match=r"experts\.3"):
        TextDecoder.from_pretrained(tmp_path)


def test_the_text_of_a_whole_llama4(tmp_path):
    """The published directory: text_config, older keys, and weights of the vision model that are left out."""
    text = dict(SIZES, num_local_experts=4, intermediate_size_mlp=40, head_dim=16, num_hidden_layers=4, floor_scale=4,
                attention_chunk_size=9, rope_parameters={
                    "rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 16,
                    "low_freq_factor": 1.0, "high_freq_factor": 1.0})
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
              "image_size": 28, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    torch.manual_seed(0)
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    theirs = redraw(transformers.Llama4ForConditionalGeneration._from_config(config, attn_implementation="eager"))
    theirs.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())["text_config"]
    rope = told.pop("rope_parameters")
    for name in ("layer_types", "moe_layers"):
        told.pop(name, None)
    rewrite(tmp_path, text_config=told | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope,
                                          "no_rope_layers": [], "attn_temperature_tuning": 4})
    ours = equal(theirs.language_model, tmp_path)
    ours.save_pretrained(tmp_path / "text", layout="hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", attn_implementation="eager")
    equal(again, tmp_path)


@pytest.mark.parametrize("way", [HALVES, HALVES_TRANSPOSED])
def test_packing_is_undone(way):
    packed = torch.randn(3, 8, 8)
    assert torch.equal(way.save(way.load([packed]))[0], packed)
