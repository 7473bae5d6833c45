"""Absolute positions and position biases against transformers and timm."""

import pytest
import torch
import torch.nn.functional as F
from support import attention, close, model, redraw, stack
from timm.layers import build_sincos2d_pos_embed, resample_abs_pos_embed
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.vit.modeling_vit import ViTConfig, ViTEmbeddings
from transformers.models.whisper.modeling_whisper import sinusoids

from mm import spec
from mm.encoders.vision import grid
from mm.errors import InputError
from mm.kernels.options import AttentionOptions
from mm.kernels.plain import reference
from mm.positions import absolute as positions
from mm.positions.visibility import along, packed


def test_sinusoids_are_whispers():
    close(positions.sinusoid(torch.arange(150), 32, last=True), sinusoids(150, 32))


def test_sinusoids_stop_before_the_lowest_frequency_unless_told():
    table = positions.sinusoid(torch.arange(700), 32, theta=500.0)
    wanted = torch.arange(700)[:, None] / 500.0 ** (torch.arange(16) / 16)
    close(table, torch.cat([wanted.sin(), wanted.cos()], -1))


def test_2d_sinusoids_are_timms():
    wanted = build_sincos2d_pos_embed([10, 6], 32, temperature=500.0, reverse_coord=True)
    wanted = wanted.view(6, 10, 2, 2, 8)  # timm: column by column; sines, then cosines of (x, y)
    close(grid.sinusoid_2d(10, 6, 32, theta=500.0), wanted.permute(1, 0, 3, 2, 4).flatten(2).flatten(0, 1))


def test_widths_that_do_not_split_are_refused():
    with pytest.raises(InputError, match="multiple of 4"):
        grid.sinusoid_2d(3, 3, 34)
    with pytest.raises(InputError, match="even"):
        positions.sinusoid(torch.arange(3), 7)


# ------------------------------------------------------------------------------------------------ learned
@pytest.mark.parametrize("new", [(5, 9), (14, 9), (3, 4)])
def test_grids_are_resampled_as_timm_does(new):
    table = torch.randn(49, 16)
    wanted = resample_abs_pos_embed(table[None], list(new), [7, 7], num_prefix_tokens=0)[0]
    close(grid.resample_grid(table, (7, 7), new), wanted)
    wanted = resample_abs_pos_embed(table[None], list(new), [7, 7], num_prefix_tokens=0, interpolation="bilinear",
                                    antialias=False)[0]
    close(grid.resample_grid(table, (7, 7), new, mode="bilinear", antialias=False), wanted)


def test_grids_are_resampled_as_transformers_does():
    theirs = redraw(ViTEmbeddings(ViTConfig(image_size=28, patch_size=4, hidden_size=16)))
    wanted = theirs.interpolate_pos_encoding(torch.zeros(1, 1 + 45, 16), 20, 36)[0, 1:]
    close(grid.resample_grid(theirs.position_embeddings[0, 1:], (7, 7), (5, 9), antialias=False), wanted)


def test_an_unchanged_grid_is_untouched_and_half_precision_kept():
    table = torch.randn(6, 8).bfloat16()
    assert grid.resample_grid(table, (2, 3), (2, 3)) is table and grid.resample_line(table, 6) is table
    assert grid.resample_grid(table, (2, 3), (3, 2)).dtype == torch.bfloat16
    wanted = grid.resample_grid(table.float(), (2, 3), (4, 5)).bfloat16()
    assert torch.equal(grid.resample_grid(table, (2, 3), (4, 5)), wanted)


@pytest.mark.parametrize("length", [4, 23])
def test_lines_are_resampled_linearly(length):
    table = torch.randn(10, 6)
    close(grid.resample_line(table, length), F.interpolate(table.T[None], length, mode="linear")[0].T)


def test_learned_positions_may_start_late_like_barts():
    theirs = redraw(BartLearnedPositionalEmbedding(20, 8))
    ours = positions.LearnedPositions(20, 8, start=2)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.zeros(1, 20, dtype=torch.long)
    close(ours(torch.arange(20)[None]), theirs(ids), 0)
    assert ours(torch.tensor([[-1, 0]])).isfinite().all()


# ------------------------------------------------------------------------------------------------- biases
@pytest.mark.parametrize("heads", [1, 4, 6, 12, 16])
def test_alibi_is_blooms(heads):
    """Bloom's penalty counts from the first key, ours from the query: the same up to a constant per row."""
    wanted = build_alibi_tensor(torch.ones(2, 30), heads, torch.float32).view(2, heads, 1, 30)
    at = along(2, 30)
    ours = positions.AlibiBias(spec.Alibi(), heads)(at, at)
    causal = torch.ones(30, 30, dtype=torch.bool).tril()
    shifted = ours - ours[..., :1]
    close(shifted.where(causal, 0), wanted.expand_as(ours).where(causal, 0))
    close(ours, ours.mT)  # a distance, both ways


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("count, distance", [(32, 128), (16, 40)])
def test_buckets_are_t5s(two_sided, count, distance):
    ours = positions.BucketBias(spec.Buckets(count=count, distance=distance, two_sided=two_sided), 3)
    offset = torch.arange(-300, 301)
    wanted = T5Attention._relative_position_bucket(offset, two_sided, count, distance)
    assert torch.equal(ours.bucket(offset), wanted)
    assert wanted.unique().numel() >= count - 1 if two_sided else wanted.max() == count - 1


@pytest.mark.parametrize("relative", [spec.Alibi(), spec.Buckets(distance=40), spec.Buckets(two_sided=False)])
def test_a_bias_reaches_every_layer_of_a_stack(relative):
    """A layer's attention with the bias equals the oracle's, and both layers use the same one."""
    net = model(stack(attention(), attention(), relative=relative))
    x, at = torch.randn(2, 40, 32), along(2, 40)
    seen = []
    for block in net.blocks:
        block.mixer.register_forward_hook(lambda module, args, y: seen.append((module, args[0], y)))
    net(x)
    for mixer, given, y in seen:
        q, k, v = (z.unflatten(-1, (-1, 8)).transpose(1, 2) for z in mixer.qkv(given))
        heads = reference(q, k, v, AttentionOptions(at, at, mixer.settings.window, 8**-0.5, bias=net.bias))
        close(y, mixer.out(heads.transpose(1, 2).flatten(2)))
        plain = reference(q, k, v, AttentionOptions(at, at, mixer.settings.window, 8**-0.5))
        assert (heads - plain).abs().max() > 0.01


def test_biases_follow_positions_not_places():
    net = model(stack(attention(), relative=spec.Buckets()))
    x, document = torch.randn(1, 30, 32), torch.tensor([[0] * 12 + [1] * 18])
    close(net(x, packed(document))[:, 12:], net(x[:, 12:]))


def test_t5_bias_learns():
    net = model(stack(attention(), relative=spec.Buckets()))
    net(torch.randn(1, 30, 32)).square().sum().backward()
    assert (net.bias.weight.grad.abs().sum(1) > 0).sum() > 16
