"""DeepSeek's published configs: what they say, how large they make a model and its cache, what is refused."""

import pytest
import torch

from mm import TextDecoder
from mm.checkpoint.files import Unfilled
from mm.errors import InputError
from mm.text.families import FAMILIES
from mm.tree import tensors

COMMON = {
    "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "ep_size": 1, "hidden_act": "silu",
    "initializer_range": 0.02, "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_layer_freq": 1,
    "pretraining_tp": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "seq_aux": True, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128}
YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
V3 = COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "first_k_dense_replace": 3,
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_group": 8, "topk_group": 4,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_key_value_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "vocab_size": 129280}
LITE = COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "first_k_dense_replace": 1,
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1, "topk_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_key_value_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "q_lora_rank": None,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, "routed_scaling_factor": 1.0,
    "scoring_func": "softmax", "topk_method": "greedy", "vocab_size": 102400}


def spec_of(config):
    family = next(one for one in FAMILIES.families["decoder"] if one.recognise(config))
    return family.to_spec(config, "config.json")


@pytest.mark.parametrize("config, billions, ahead, bytes_per_token", [
    (V3, 671.0, 11.6, 61 * 576 * 2), (LITE, 15.7, 0.0, 27 * 576 * 2)], ids=["V3", "V2-Lite"])
def test_published_sizes(config, billions, ahead, bytes_per_token):
    """The papers': 671 and 15.7 billion parameters, about 70 KB of cache a token in V3; its head is the 14
    billion that its files hold, less two tables of 0.9 that it shares."""
    with torch.device("meta"), Unfilled():
        model = TextDecoder(spec_of(config))
    counts = [sum(p.numel() for p in part) / 1e9 for part in (model.parameters(), model.ahead.parameters())]
    assert counts[0] - counts[1] == pytest.approx(billions, abs=0.06)
    assert counts[1] == pytest.approx(ahead, abs=0.1)
    states = [model.init_state(1, length=n, dtype=torch.bfloat16, device="meta").caches for n in (1000, 1001)]
    assert states[0][0].k.shape[1] == 1
    held = [sum(x.nbytes for _, x in tensors(state)) for state in states]
    assert held[1] - held[0] == bytes_per_token


def test_scores_grow_with_the_context():
    mixer = spec_of(V3).stack.layers[0].mixer
    assert mixer.scale == pytest.approx(192**-0.5 * 1.3689**2, rel=1e-4)
    assert spec_of(V3 | {"rope_scaling": None}).stack.layers[0].mixer.scale is None


@pytest.mark.parametrize("change, told", [
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"num_key_value_heads": 8}, "num_key_value_heads should be 128"), ({"moe_layer_freq": 2}, "moe_layer_freq"),
    ({"topk_method": "greedy"}, "topk_method"), ({"n_routed_experts": 100}, "equal groups"),
    ({"qk_rope_head_dim": 63}, "even"), ({"kv_lora_rank": None}, "kv_lora_rank")])
def test_what_is_refused(change, told):
    with pytest.raises(InputError, match=told):
        spec_of(V3 | change)
    with pytest.raises(InputError, match="norm_topk_prob"):
        spec_of(LITE | {"norm_topk_prob": True})
