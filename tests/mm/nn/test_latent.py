"""Latent attention against transformers' and against itself: a small cache, streamed, quantised, adapted."""

import pytest
import torch
from support import carry, close, model, redraw, stack
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3Config,
    DeepseekV3RotaryEmbedding,
)

from mm import spec
from mm.lowbit import quantize
from mm.nn.lora import add_lora, lora_state, merge_lora
from mm.nn.transformer import Transformer
from mm.spec import Rope, Window
from mm.tree import tensors

DIM, LENGTH = 32, 40
SIZES = dict(heads=4, kv_rank=24, nope_dim=8, rope_dim=4, value_dim=6)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=10, mscale=0.7,
            mscale_all_dim=1.3, beta_fast=32, beta_slow=1)
KINDS = {"direct": spec.Latent(**SIZES, rope=Rope(layout="interleaved")),
         "compressed": spec.Latent(**SIZES, q_rank=12, bias=True, rope=Rope()),
         "window": spec.Latent(**SIZES, q_rank=12, rope=Rope(), window=Window(left=5, right=0))}


def net(kind):
    torch.manual_seed(0)
    return model(stack(KINDS[kind], KINDS[kind], dim=DIM))


@pytest.mark.parametrize("q_rank", [None, 12])
@pytest.mark.parametrize("interleaved", [False, True])
def test_it_is_deepseeks(q_rank, interleaved):
    """Beyond the original context, with both mscales."""
    config = DeepseekV3Config(
        hidden_size=DIM, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=q_rank, kv_lora_rank=24,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, attention_bias=True, rope_interleave=interleaved,
        rope_parameters=YARN, max_position_embeddings=40, num_hidden_layers=1, attn_implementation="eager")
    theirs = redraw(DeepseekV3Attention(config, 0))
    yarn = spec.Yarn(factor=4.0, original=10, mscale=0.7, mscale_all=1.3)
    latent = spec.Latent(
        **SIZES, q_rank=q_rank, bias=True, scale=12**-0.5 * (0.13 * torch.tensor(4.0).log().item() + 1) ** 2,
        rope=Rope(scaling=yarn, layout="interleaved" if interleaved else "half"))
    ours = Transformer(spec.Stack(dim=DIM, layers=(spec.Layer(mixer=latent, mixer_norm=False),)))
    first = ("q_a_proj" if q_rank else "q_proj", "kv_a_proj_with_mqa")
    carry(ours, theirs.state_dict(), {
        f"blocks.{{}}.mixer.{mine}": other for mine, other in {
            "qkv": first, "q_norm": "q_a_layernorm", "q_up": "q_b_proj", "kv_norm": "kv_a_layernorm",
            "kv_up": "kv_b_proj", "out": "o_proj"}.items()})
    x = torch.randn(2, LENGTH, DIM)
    rotation = DeepseekV3RotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
    with torch.no_grad():
        close(ours(x), x + theirs(x, rotation, mask.expand(2, 1, -1, -1))[0])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 3, 20, 40])
def test_a_stream_in_chunks_equals_the_whole(kind, chunk):
    """By latents themselves in short chunks, by keys and values in long ones."""
    ours, x = net(kind), torch.randn(2, LENGTH, DIM)
    assert [ours.blocks[0].mixer.unfolds(tokens) for tokens in (1, 3, 20)] == [False, False, True]
    state = ours.init_state(2, length=LENGTH, chunk=chunk)
    close(torch.cat([ours(part, state=state) for part in x.split(chunk, 1)], 1), ours(x))


def test_bytes_per_token():
    """One latent and one rotary key, whatever the number of heads."""
    ours = net("compressed")
    for dtype, cache, each in ((torch.float32, "full", 4 * 28), (torch.bfloat16, "full", 2 * 28),
                               (torch.float32, "int8", 28 + 2 * 4)):
        short, long = (ours.init_state(1, length=length, dtype=dtype, cache=cache) for length in (100, 200))
        sizes = [sum(x.nbytes for _, x in tensors(state.caches)) for state in (short, long)]
        assert (sizes[1] - sizes[0]) / 100 == 2 * each  # two layers


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 20])
def test_an_int8_cache_is_close(chunk):
    ours, x = net("direct"), torch.randn(2, LENGTH, DIM)
    state = ours.init_state(2, length=LENGTH, cache="int8")
    out = torch.cat([ours(part, state=state) for part in x.split(chunk, 1)], 1)
    assert (out - ours(x)).norm() / ours(x).norm() < 0.02


@torch.inference_mode()
def test_int8_weights_are_close_and_stream():
    ours, x = net("compressed"), torch.randn(2, LENGTH, DIM)
    before = ours(x)
    after = quantize(ours)(x)
    assert 0 < (after - before).norm() / before.norm() < 0.05
    state = ours.init_state(2, length=LENGTH)
    close(torch.cat([ours(part, state=state) for part in x.split(1, 1)], 1), after, 0.05)


@torch.no_grad()
def test_low_rank_changes_reach_both_ways():
    """The projection that unfolds latents is adapted where it is absorbed, too."""
    ours, x = net("compressed"), torch.randn(1, LENGTH, DIM)
    before = ours(x)
    assert "blocks.0.mixer.kv_up" in add_lora(ours, 2, 4.0, ("kv_up", "qkv"))
    for tensor in lora_state(ours).values():
        tensor.normal_(std=0.5)
    after = ours(x)
    assert (after - before).abs().max() > 0.1
    state = ours.init_state(1, length=LENGTH)
    close(torch.cat([ours(part, state=state) for part in x.split(1, 1)], 1), after)
    merge_lora(ours)
    close(ours(x), after)


def test_gradients_and_first_weights():
    """Weights begin by the width that they read, so that a latent keeps its size through them."""
    torch.manual_seed(0)
    wide = spec.Latent(heads=4, q_rank=64, kv_rank=16, nope_dim=64, rope_dim=32, value_dim=64, rope=Rope())
    ours = Transformer(stack(wide, dim=256))
    mixer = ours.blocks[0].mixer
    for layer, width in ((mixer.qkv, 256), (mixer.q_up, 64), (mixer.kv_up, 16)):
        assert layer.weight.std().item() == pytest.approx(width**-0.5, rel=0.1)
    ours(torch.randn(2, 7, 256)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mixer.parameters())


def test_autocast_and_half_precision_run_in_a_stream():
    ours, x = net("compressed"), torch.randn(1, 6, DIM)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state = ours.init_state(1, length=8, dtype=torch.bfloat16)
        close(torch.cat([ours(part, state=state) for part in x.split(2, 1)], 1).float(), ours(x).float(), 0.1)
    half = net("compressed").bfloat16()
    with torch.no_grad():
        state = half.init_state(1, length=8)
        close(half(x.bfloat16(), state=state).float(), ours(x), 0.2)
