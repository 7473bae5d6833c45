"""Heads that look ahead against transformers', on disk both ways, and what they see of packed and padded texts."""

from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import attention, close, redraw
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from mm import TextDecoder, spec
from mm.decode import Ahead, Sampling
from mm.errors import InputError
from mm.spec import CAUSAL, DecoderSpec, Embed, Layer, Rope, Window

DEPTH, HEADS = 3, 2
CONFIG = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "q_lora_rank": 12, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10, "moe_intermediate_size": 20, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "num_mtp_layers": HEADS,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
                        "mscale": 0.7, "mscale_all_dim": 1.2}}


class Theirs(transformers.DeepseekV3ForCausalLM):
    """transformers looks for heads behind layer 61, the last of DeepSeek-V3, only; here behind the last of ours."""

    _keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{DEPTH + i}\." for i in range(HEADS)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Their folder, which promises heads and holds none."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    redraw(Theirs(transformers.DeepseekV3Config(**CONFIG))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(plain, tmp_path_factory):
    """(theirs, ours, the folder of ours in their layout)."""
    base, folder = TextDecoder.from_pretrained(plain), tmp_path_factory.mktemp("ahead")
    ours = redraw(TextDecoder(replace(base.spec, ahead=base.spec.stack.layers[-1:] * HEADS)))
    for buffer in ours.buffers():
        buffer.normal_(std=0.3)
    ours.save_pretrained(folder, layout="hf")
    return Theirs.from_pretrained(folder, attn_implementation="eager"), ours, folder


@torch.no_grad()
def test_they_are_transformers_in_a_file_that_we_wrote(pair):
    theirs, ours, _ = pair
    heads, cache = MtpModel.from_pretrained(theirs), MtpCache(config=theirs.config.get_mtp_config())
    ids = torch.randint(97, (2, 40))
    out = theirs(ids, output_hidden_states=True)
    mine = ours.hidden(ids)
    close(ours.logits(mine), out.logits)
    hidden = out.hidden_states[-1]
    found = ours.look_ahead(ids, mine)
    assert len(found) == HEADS
    for i, (made, there) in enumerate(found):
        places = torch.arange(i + 1, 40).expand(2, -1)
        hidden = heads.forward_layer(i, hidden[:, :-1], places, cache, input_ids=ids[:, i + 1:])
        close(made, hidden)
        close(ours.logits(made), heads._project_to_logits(hidden))
        assert there.all() and there.shape == (2, 39 - i)


@torch.no_grad()
def test_texts_are_those_of_transformers_with_its_own_speculation(pair):
    theirs, ours, _ = pair
    ids = torch.randint(97, (1, 9))
    wanted = theirs.generate(ids, max_new_tokens=12, do_sample=False, use_mtp=True, eos_token_id=None, pad_token_id=0)
    out = ours.generate(ids, Sampling(max_tokens=12), speculate=Ahead())
    assert out[0].ids == wanted[0, 9:].tolist()


def test_files_keep_them(pair, plain, tmp_path):
    _, ours, folder = pair
    assert TextDecoder.from_pretrained(folder).fingerprint() == ours.fingerprint()
    ours.save_pretrained(tmp_path / "own")
    assert TextDecoder.from_pretrained(tmp_path / "own").fingerprint() == ours.fingerprint()
    assert not TextDecoder.from_pretrained(plain).ahead
    state = load_file(folder / "model.safetensors")
    for name, source in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        state[f"model.layers.{DEPTH}.{name}.weight"] = state[source + ".weight"].clone()  # as in DeepSeek's own files
    save_file(state, folder / "model.safetensors")
    assert TextDecoder.from_pretrained(folder).fingerprint() == ours.fingerprint()
    del state[f"model.layers.{DEPTH}.eh_proj.weight"]
    save_file(state, tmp_path / "own" / "model.safetensors")
    (tmp_path / "own" / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(InputError, match="eh_proj"):
        TextDecoder.from_pretrained(tmp_path / "own")


def small(heads=3):
    """Heads with and without a window over one of Llama's layers."""
    bare = dict(q_bias=False, k_bias=False, v_bias=False, out_bias=False, rope=Rope())
    mlp = spec.Mlp(hidden=48, act="silu", gated=True, up_bias=False, down_bias=False)
    layers = tuple(Layer(mixer=attention(window=window, **bare), mlp=mlp, norm=spec.RMSNorm())
                   for window in (CAUSAL, Window(left=4, right=0), CAUSAL))
    torch.manual_seed(0)
    return redraw(TextDecoder(DecoderSpec(
        embed=Embed(vocab=31), context=64, ahead=layers[:heads],
        stack=spec.Stack(dim=32, layers=layers[:1], final_norm=spec.RMSNorm()))))


@torch.no_grad()
def test_packed_documents_are_as_if_alone():
    model, ids = small(), torch.randint(31, (1, 30))
    documents = torch.tensor([[0] * 11 + [1] * 14 + [-1] * 5])
    packed = model.look_ahead(ids, model.hidden(ids, documents=documents), documents=documents)
    for start, stop in ((0, 11), (11, 25)):
        part = ids[:, start:stop]
        for k, ((made, there), (wanted, _)) in enumerate(
                zip(packed, model.look_ahead(part, model.hidden(part)), strict=True), 1):
            close(made[:, start:stop - k], wanted)
            assert there[0].tolist() == [i < 11 - k or 11 <= i < 25 - k for i in range(30 - k)]


@torch.no_grad()
@pytest.mark.parametrize("left", [False, True])
def test_padding_is_not_seen(left):
    model, ids = small(), torch.randint(31, (2, 20))
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :6], mask[1, 14:] = (False, True) if left else (True, False)
    padded = model.look_ahead(ids, model.hidden(ids, mask=mask), mask=mask)
    for row in range(2):
        part = ids[row:row + 1, mask[row]]
        for (made, there), (wanted, _) in zip(padded, model.look_ahead(part, model.hidden(part)), strict=True):
            close(made[row, there[row]], wanted[0])


def test_a_loss_reaches_the_heads_and_the_model():
    model, ids = small().train(), torch.randint(31, (2, 12))
    hidden = model.hidden(ids)
    losses = [torch.nn.functional.cross_entropy(model.logits(made[:, :-1]).flatten(0, 1), ids[:, k + 1:].flatten())
              for k, (made, _) in enumerate(model.look_ahead(ids, hidden), 1)]
    torch.stack(losses).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_short_texts_and_layouts_without_heads(tmp_path):
    model = small()
    ids = torch.randint(31, (2, 2))
    assert [made.shape[1] for made, _ in model.look_ahead(ids, model.hidden(ids))] == [1]
    with pytest.raises(InputError, match=r"\(llama\) layout cannot hold this model: ahead is"):
        model.save_pretrained(tmp_path, layout="hf")
