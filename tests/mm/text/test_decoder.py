"""The text decoder against transformers, both ways, and its streams against itself."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support import redraw

from mm import TextDecoder
from mm.errors import InputError
from mm.spec import Sections
from mm.text.families import FAMILIES

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12,
        "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5], "long_factor": [1.0, 2.0, 4.0, 6.0, 8.0, 9.0]}
OSS_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
            "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
        "mscale": 0.7, "mscale_all_dim": 1.2}
DEEPSEEK = {"num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 6, "v_head_dim": 10, "moe_intermediate_size": 20, "n_routed_experts": 8,
            "n_shared_experts": 2, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.7}
# (after a family's name, which of its models); None for one of SIZES: the config has no such key. Windows and original
# contexts are shorter than the texts of every test.
KINDS = {
    "llama": {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 7, "head_dim": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "smollm3": {"num_hidden_layers": 5, "attention_bias": True, "pad_token_id": 0},
    "smollm3 windows": {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 6,
                        "pad_token_id": 0},
    "olmo2": {"rms_norm_eps": 1e-5},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 6, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 6, "num_hidden_layers": 7,
                    "rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                                        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
             "sliding_window": 7, "pad_token_id": 0},
    "phi3 longrope": {"rope_parameters": LONG | {"partial_rotary_factor": 0.75}, "num_attention_heads": 2,
                      "original_max_position_embeddings": 12, "pad_token_id": 0, "tie_word_embeddings": True},
    "gpt2": {"num_key_value_heads": None, "intermediate_size": None, "scale_attn_by_inverse_layer_idx": True,
             "n_inner": 48},
    "mixtral": {"num_local_experts": 5, "sliding_window": 7, "rms_norm_eps": 1e-5},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "head_dim": 16,
                  "mlp_only_layers": [1], "norm_topk_prob": True, "attention_bias": True},
    "qwen3_moe sparse": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 16,
                         "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 6},
    "gpt_oss": {"num_local_experts": 5, "num_experts_per_tok": 3, "head_dim": 16, "sliding_window": 6,
                "swiglu_limit": 0.5, "rope_parameters": OSS_YARN},
    "llama4_text": {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size_mlp": 40, "head_dim": 16,
                    "num_hidden_layers": 5, "interleave_moe_layer_step": 2, "attention_chunk_size": 9,
                    "floor_scale": 4, "attn_scale": 0.5, "rope_parameters": LLAMA3},
    "llama4_text all": {"num_local_experts": 4, "intermediate_size_mlp": 40, "head_dim": 16, "use_qk_norm": False,
                        "no_rope_layers": [1, 0, 1], "attention_chunk_size": 7, "attn_temperature_tuning": False,
                        "tie_word_embeddings": True, "rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}},
    "deepseek_v2": DEEPSEEK | {"topk_method": "group_limited_greedy", "attention_bias": True, "rope_parameters": YARN},
    "deepseek_v2 lite": DEEPSEEK | {"topk_method": "greedy", "q_lora_rank": None, "attention_bias": True},
    "deepseek_v3": DEEPSEEK | {"rope_parameters": YARN},
    "deepseek_v3 direct": DEEPSEEK | {"q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False},
}


def made(kind):
    """transformers' model of one kind, its weights drawn again."""
    settings = {name: value for name, value in (SIZES | KINDS[kind]).items()
                if value is not None or name not in SIZES}
    config = transformers.AutoConfig.for_model(kind.split()[0], **settings)
    model = redraw(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
    return model


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    torch.manual_seed(0)
    theirs = made(request.param)
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    theirs.save_pretrained(folder)
    return theirs, TextDecoder.from_pretrained(folder), folder


@torch.no_grad()
def test_logits_equal_transformers(pair):
    theirs, ours, _ = pair
    ids = torch.randint(97, (2, 40))
    assert (theirs(ids).logits - ours(ids)).abs().max() <= 1e-5
    vectors = ours.embed.look_up(ids)
    assert torch.equal(ours(embeddings=vectors), ours(ids))


@torch.no_grad()
@pytest.mark.parametrize("left", [False, True])
def test_padding_is_not_seen(pair, left):
    theirs, ours, _ = pair
    ids, mask = torch.randint(97, (2, 20)), torch.ones(2, 20, dtype=torch.bool)
    mask[1, :6], mask[1, 14:] = (False, True) if left else (True, False)
    ours = ours(ids, mask=mask)
    for row in range(2):
        alone = theirs(ids[row:row + 1, mask[row]]).logits
        assert (alone - ours[row, mask[row]]).abs().max() <= 1e-5


@torch.no_grad()
def test_a_stream_in_chunks_equals_the_whole(pair):
    _, ours, _ = pair
    ids = torch.randint(97, (2, 40))
    state = ours.init_state(2, chunk=8)
    cuts = [0, 16, 17, 25, 26, 27, 40]
    parts = [ours(ids[:, a:b], state=state) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert (torch.cat(parts, 1) - ours(ids)).abs().max() <= 1e-5


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(pair):
    _, ours, _ = pair
    ids = torch.randint(97, (1, 30))
    documents = torch.tensor([[0] * 13 + [1] * 14 + [-1] * 3])
    packed = ours(ids, documents=documents)
    assert (packed[:, :13] - ours(ids[:, :13])).abs().max() <= 1e-5
    assert (packed[:, 13:27] - ours(ids[:, 13:27])).abs().max() <= 1e-5


@torch.no_grad()
def test_written_in_their_layout(pair, tmp_path):
    theirs, ours, _ = pair
    ours.save_pretrained(tmp_path, layout="hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = torch.randint(97, (2, 40))
    assert (again(ids).logits - theirs(ids).logits).abs().max() <= 1e-6


def test_own_layout_comes_back(pair, tmp_path):
    _, ours, _ = pair
    ours.save_pretrained(tmp_path)
    assert TextDecoder.from_pretrained(tmp_path).fingerprint() == ours.fingerprint()


@torch.no_grad()
def test_positions_of_three_axes():
    """M-RoPE: with the same position on every axis, a text reads as before."""
    plain = TextDecoder(FAMILIES.by_layout("decoder", "hf")[0].to_spec(SIZES | {"model_type": "llama"}, "test")).eval()
    layers = tuple(replace(layer, mixer=replace(layer.mixer, rope=replace(
        layer.mixer.rope, axes=Sections(sizes=(2, 1, 1))))) for layer in plain.spec.stack.layers)
    spread = TextDecoder(replace(plain.spec, stack=replace(plain.spec.stack, layers=layers))).eval()
    spread.load_state_dict(plain.state_dict())
    ids, places = torch.randint(97, (2, 12)), torch.arange(12).expand(2, 12)
    assert (spread(ids, positions=torch.stack([places] * 3, -1)) - plain(ids)).abs().max() <= 1e-5
    moved = torch.stack([5 * places % 7, places // 4, places % 4], -1)
    assert (spread(ids, positions=moved) - plain(ids)).abs().max() > 1e-3


@torch.no_grad()
def test_the_first_gpt2_files(tmp_path):
    """No `transformer.` before the names, and masks beside the weights."""
    theirs = made("gpt2")
    theirs.save_pretrained(tmp_path)
    state = {name: value.clone() for name, value in theirs.transformer.state_dict().items()}
    state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(3)}
    save_file(state, tmp_path / "model.safetensors")
    ids = torch.randint(97, (2, 40))
    assert (TextDecoder.from_pretrained(tmp_path)(ids) - theirs(ids).logits).abs().max() <= 1e-5


@torch.no_grad()
def test_the_first_gemma3_configs(tmp_path):
    """One rope in the old keys, another base for the windows, every n-th layer without one."""
    theirs = made("gemma3_text")
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
        del config[name]
    config |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6,
               "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = torch.randint(97, (2, 40))
    assert (TextDecoder.from_pretrained(tmp_path)(ids) - theirs(ids).logits).abs().max() <= 1e-5


@torch.no_grad()
def test_the_text_of_a_gemma3_that_sees(tmp_path):
    """As the sizes from 4B are published: a text_config, and weights of a vision tower that are left out."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}
    text = SIZES | {"head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 12}
    torch.manual_seed(0)
    theirs = redraw(transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)).eval())
    theirs.save_pretrained(tmp_path)
    ours, ids = TextDecoder.from_pretrained(tmp_path), torch.randint(SIZES["vocab_size"], (2, 40))
    assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-5
    ours.to(torch.bfloat16).save_pretrained(tmp_path / "text", layout="hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype="auto")
    assert type(again).__name__ == "Gemma3ForCausalLM" and again.dtype == torch.bfloat16


@pytest.mark.parametrize("call, told", [
    ({}, "either ids or embeddings"),
    ({"ids": torch.zeros(2, 3)}, "integers"),
    ({"embeddings": torch.zeros(2, 3, 5)}, r"\(B, T, 32\)"),
    ({"ids": torch.zeros(2, 3, dtype=torch.long), "mask": torch.ones(2, 4)}, "mask"),
])
def test_wrong_shapes_are_named(pair, call, told):
    with pytest.raises(InputError, match=told):
        pair[1](**call)


def test_unknown_config_keys_are_named(pair, tmp_path):
    _, _, folder = pair
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"wobble": 3}))
    with pytest.raises(InputError, match="wobble"):
        TextDecoder.from_pretrained(tmp_path / "copy")
