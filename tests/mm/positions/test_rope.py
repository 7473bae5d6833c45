"""Rotary positions against transformers and timm, each beyond the length that its scaling was made for."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import close
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed, apply_rot_embed_cat
from transformers import LlamaConfig
from transformers.models.dinov3_vit import modeling_dinov3_vit as dino
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as turn_like_gptj
from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

from mm import spec
from mm.encoders.vision import grid
from mm.errors import InputError
from mm.positions import rope

HEAD, ORIGINAL, LENGTH = 32, 64, 200
SHORT, LONG = [1 + i / 10 for i in range(16)], [2 + i for i in range(16)]
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=ORIGINAL)
SCALINGS = {
    "default": (dict(rope_type="default"), None),
    "linear": (dict(rope_type="linear", factor=3.0), spec.LinearScaling(factor=3.0)),
    "dynamic": (dict(rope_type="dynamic", factor=3.0), spec.DynamicNTK(factor=3.0, original=ORIGINAL)),
    "llama3": (dict(rope_type="llama3", factor=8.0, original_max_position_embeddings=ORIGINAL, low_freq_factor=1.5,
                    high_freq_factor=5.0), spec.Llama3Scaling(factor=8.0, original=ORIGINAL, low=1.5, high=5.0)),
    "yarn": (YARN, spec.Yarn(factor=8.0, original=ORIGINAL)),
    "yarn, its own ramp": (YARN | dict(beta_fast=8.0, beta_slow=2.0, attention_factor=1.7),
                           spec.Yarn(factor=8.0, original=ORIGINAL, beta_fast=8.0, beta_slow=2.0, gain=1.7)),
    "yarn, DeepSeek's gain": (YARN | dict(mscale=0.7, mscale_all_dim=1.3),
                              spec.Yarn(factor=8.0, original=ORIGINAL, mscale=0.7, mscale_all=1.3)),
    "yarn, GPT-OSS's ramp": (YARN | dict(truncate=False), spec.Yarn(factor=8.0, original=ORIGINAL, truncate=False)),
    "longrope": (dict(rope_type="longrope", factor=4.0, original_max_position_embeddings=ORIGINAL, short_factor=SHORT,
                      long_factor=LONG),
                 spec.LongRope(factor=4.0, original=ORIGINAL, short=tuple(SHORT), long=tuple(LONG))),
    "longrope, its own gain": (dict(rope_type="longrope", factor=4.0, original_max_position_embeddings=ORIGINAL,
                                    short_factor=SHORT, long_factor=LONG, attention_factor=1.4),
                               spec.LongRope(factor=4.0, original=ORIGINAL, short=tuple(SHORT), long=tuple(LONG),
                                             gain=1.4)),
}


def rotated(x, positions, settings, learned=None):
    return rope.apply(x, rope.rotation(positions, settings, x.shape[-1], learned))


def llamas(x, positions, **parameters):
    config = LlamaConfig(hidden_size=4 * HEAD, num_attention_heads=4, max_position_embeddings=ORIGINAL,
                         rope_parameters={"rope_theta": 500.0, **parameters})
    return apply_rotary_pos_emb(x, x, *LlamaRotaryEmbedding(config)(x, positions))[0]


# ------------------------------------------------------------------------------------------------ one axis
@pytest.mark.parametrize("length", [ORIGINAL // 2, LENGTH])
@pytest.mark.parametrize("name", SCALINGS)
def test_scaling_is_transformers(name, length):
    theirs, scaling = SCALINGS[name]
    x, positions = torch.randn(2, 3, length, HEAD), torch.arange(length).expand(2, -1)
    ours = rotated(x, positions, spec.Rope(theta=500.0, scaling=scaling))
    close(ours, llamas(x, positions, **theirs))
    if length == LENGTH and scaling is not None:
        assert (ours - rotated(x, positions, spec.Rope(theta=500.0))).abs().max() > 0.5


@pytest.mark.parametrize("scaling", [SCALINGS["dynamic"][1], SCALINGS["longrope"][1]])
def test_scaling_by_length_goes_by_each_rows_own(scaling):
    """A short row gives the same beside a long one as alone."""
    x, settings = torch.randn(1, 1, 40, HEAD), spec.Rope(scaling=scaling)
    short, long = torch.arange(40)[None], torch.arange(100, 140)[None]
    both = rotated(x.expand(2, -1, -1, -1), torch.cat([short, long]), settings)
    close(both[:1], rotated(x, short, settings), 0)
    close(both[1:], rotated(x, long, settings), 0)


def test_interleaved_layout_and_partial_width_are_gptjs():
    x, positions = torch.randn(2, 3, LENGTH, HEAD), torch.arange(LENGTH).expand(2, -1)
    sin, cos = create_sinusoidal_positions(LENGTH, 16).expand(2, -1, -1).chunk(2, -1)
    wanted = turn_like_gptj(x[..., :16].transpose(1, 2), sin, cos).transpose(1, 2)
    ours = rotated(x, positions, spec.Rope(dim=16, layout="interleaved"))
    close(ours[..., :16], wanted)
    close(ours[..., 16:], x[..., 16:], 0)


def test_interleaved_is_half_on_permuted_channels():
    x, positions = torch.randn(2, 3, 50, HEAD), torch.randint(0, 1000, (2, 50))
    halves = torch.cat([x[..., ::2], x[..., 1::2]], -1)
    ours = rotated(halves, positions, spec.Rope())
    theirs = rotated(x, positions, spec.Rope(layout="interleaved"))
    close(ours, torch.cat([theirs[..., ::2], theirs[..., 1::2]], -1), 1e-6)


@given(st.integers(-10**4, 10**4), st.integers(0, 2**32 - 1))
def test_scores_depend_on_distance_alone(shift, seed):
    torch.manual_seed(seed)
    q, k = torch.randn(2, 1, 2, 6, 8, dtype=torch.float64)
    positions = torch.arange(6, dtype=torch.float64)[None]
    def scores(at):
        return rotated(q, at, spec.Rope()) @ rotated(k, at, spec.Rope()).mT
    close(scores(positions), scores(positions + shift), 1e-6)


def test_half_precision_turns_in_float32_and_double_stays_double():
    x, positions = torch.randn(1, 2, 50, HEAD), torch.arange(1000, 1050)[None]
    wanted = rotated(x.bfloat16().float(), positions, spec.Rope()).bfloat16()
    assert torch.equal(rotated(x.bfloat16(), positions, spec.Rope()), wanted)
    wide = rotated(x.double(), positions, spec.Rope())
    assert wide.dtype == torch.float64 and (wide != wide.float()).any()


# ------------------------------------------------------------------------------------------- several axes
def test_sections_in_runs_are_qwen2_vls():
    x, coords = torch.randn(2, 3, LENGTH, HEAD), torch.randint(0, 300, (2, LENGTH, 3))
    config = qwen2.Qwen2VLConfig(text_config=dict(hidden_size=4 * HEAD, num_attention_heads=4, rope_parameters=dict(
        rope_type="default", rope_theta=500.0, mrope_section=[4, 5, 7]))).text_config
    cos, sin = qwen2.Qwen2VLRotaryEmbedding(config)(x, coords.permute(2, 0, 1))
    ours = rotated(x, coords, spec.Rope(theta=500.0, axes=spec.Sections(sizes=(4, 5, 7))))
    close(ours, qwen2.apply_rotary_pos_emb(x, x, cos, sin)[0])


def test_interleaved_sections_are_qwen3_vls():
    x, coords = torch.randn(2, 3, LENGTH, HEAD), torch.randint(0, 300, (2, LENGTH, 3))
    config = qwen3.Qwen3VLTextConfig(hidden_size=4 * HEAD, num_attention_heads=4, head_dim=HEAD, rope_parameters=dict(
        rope_type="default", rope_theta=500.0, mrope_section=[6, 5, 5]))
    cos, sin = qwen3.Qwen3VLTextRotaryEmbedding(config)(x, coords.permute(2, 0, 1))
    ours = rotated(x, coords, spec.Rope(theta=500.0, axes=spec.Sections(sizes=(6, 5, 5), interleaved=True)))
    close(ours, qwen3.apply_rotary_pos_emb(x, x, cos, sin)[0])


def test_plain_text_turns_every_section_alike():
    x, positions = torch.randn(1, 2, 50, HEAD), torch.arange(50)[None]
    ours = rotated(x, positions, spec.Rope(axes=spec.Sections(sizes=(4, 5, 7))))
    close(ours, rotated(x, positions, spec.Rope()), 0)


def test_axial_halves_are_qwen2_vls_vision():
    x, coords = torch.randn(1, 3, 60, HEAD), grid.index_grid(6, 10)[None]
    config = qwen2.Qwen2VLVisionConfig(embed_dim=4 * HEAD, num_heads=4)
    cos, sin = qwen2.Qwen2VLVisionRotaryEmbedding(config)(x, coords[0].long())
    wanted = qwen2.apply_rotary_pos_emb_vision(x[0].transpose(0, 1), x[0].transpose(0, 1), cos, sin)[0].transpose(0, 1)
    close(rotated(x, coords, spec.Rope(axes=spec.Axial()))[0], wanted)


@pytest.mark.parametrize("reference, offset", [(None, 0.0), ((16, 16), 0.0), ((5, 7), 1.0)])
@pytest.mark.parametrize("order", ["yx", "xy"])
def test_axial_interleaved_is_timms_eva(order, reference, offset):
    x = torch.randn(1, 3, 60, HEAD)
    theirs = RotaryEmbeddingCat(HEAD, in_pixels=False, ref_feat_shape=reference, grid_offset=offset,
                                grid_indexing={"yx": "ij", "xy": "xy"}[order])
    coords = grid.index_grid(6, 10, order=order, reference=reference, offset=offset)[None]
    ours = rotated(x, coords, spec.Rope(layout="interleaved", axes=spec.Axial()))
    close(ours, apply_rot_embed_cat(x, theirs.get_embed([6, 10])))


@pytest.mark.parametrize("order", ["yx", "xy"])
def test_learned_mixed_axes_are_timms(order):
    x = torch.randn(2, 4, 60, HEAD)
    theirs = RotaryEmbeddingMixed(4 * HEAD, depth=1, num_heads=4, grid_indexing={"yx": "ij", "xy": "xy"}[order])
    theirs.freqs.data.normal_()
    coords = grid.index_grid(6, 10, order=order)[None].expand(2, -1, -1)
    ours = rotated(x, coords, spec.Rope(layout="interleaved", axes=spec.Mixed()), theirs.freqs[:, 0])
    close(ours, apply_rot_embed_cat(x, theirs.get_embed([6, 10])[0]))


@pytest.mark.parametrize("height, width", [(7, 7), (5, 12)])
def test_centred_grid_is_dinov3s(height, width):
    x = torch.randn(1, 4, height * width, HEAD)
    config = dino.DINOv3ViTConfig(hidden_size=4 * HEAD, num_attention_heads=4, patch_size=2, rope_theta=100.0)
    cos, sin = dino.DINOv3ViTRopePositionEmbedding(config).eval()(torch.zeros(1, 3, 2 * height, 2 * width))
    settings = spec.Rope(theta=100.0, frequency=2 * math.pi, axes=spec.Axial())
    close(rotated(x, grid.centred_grid(height, width)[None], settings), dino.apply_rotary_pos_emb(x, x, cos, sin)[0])


@pytest.mark.parametrize("normalise", ["separate", "min", "max"])
def test_centred_grid_normalises_like_timm(normalise):
    x = torch.randn(1, 4, 60, HEAD)
    theirs = RotaryEmbeddingDinoV3(HEAD, temperature=100.0, normalize_coords=normalise, rotate_half=True).eval()
    settings = spec.Rope(theta=100.0, frequency=2 * math.pi, axes=spec.Axial())
    ours = rotated(x, grid.centred_grid(5, 12, normalise=normalise)[None], settings)
    close(ours, apply_rot_embed_cat(x, theirs.get_embed([5, 12]), half=True))


def test_three_axes_turn_a_third_each():
    """Each third of the angles is a rope of its own; learned axes add up."""
    x, coords = torch.randn(2, 3, 50, 24), torch.randn(2, 50, 3)
    one = spec.Rope(layout="interleaved")
    thirds = [rotated(part, coords[..., axis], one) for axis, part in enumerate(x.split(8, -1))]
    close(rotated(x, coords, replace(one, axes=spec.Axial(axes=3))), torch.cat(thirds, -1))
    learned = torch.randn(3, 3, 12)
    ours = rotated(x, coords, replace(one, axes=spec.Mixed(axes=3)), learned)
    angle = torch.einsum("bta,ahr->bhtr", coords, learned)
    wanted = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)
    close(ours, torch.view_as_real(wanted).flatten(-2))


def test_a_prefix_token_at_coordinate_0_does_not_turn():
    x, settings = torch.randn(1, 4, 61, HEAD), spec.Rope(frequency=2 * math.pi, axes=spec.Axial())
    patches = grid.centred_grid(5, 12)
    ours = rotated(x, torch.cat([torch.zeros(1, 2), patches])[None], settings)
    close(ours[:, :, :1], x[:, :, :1], 0)
    close(ours[:, :, 1:], rotated(x[:, :, 1:], patches[None], settings), 0)


# -------------------------------------------------------------------------------------------------- jitter
def test_jitter_without_strength_is_identity():
    coords = grid.centred_grid(5, 12)
    close(grid.jitter(coords), coords, 0)


@given(st.floats(0, 0.5), st.floats(1, 3), st.floats(1, 3), st.integers(0, 2**32 - 1))
def test_jitter_stays_in_its_bounds_and_follows_its_seed(shift, stretch, rescale, seed):
    coords = grid.centred_grid(5, 12)
    def draw(**strength):
        return grid.jitter(coords, generator=torch.Generator().manual_seed(seed), **strength)
    moved = draw(shift=shift) - coords
    assert (moved - moved[0]).abs().max() < 1e-6 and moved.abs().max() <= shift + 1e-6
    factor = draw(stretch=stretch) / coords
    assert 1 / stretch - 1e-4 < factor[0].min() and factor[0].max() < stretch + 1e-4
    assert (factor - factor[0])[coords.abs().min(1).values > 0.05].abs().max() < 1e-4
    factor = (draw(rescale=rescale) / coords)[0]
    assert abs(factor[0] - factor[1]) < 1e-4 and 1 / rescale - 1e-4 < factor[0] < rescale + 1e-4
    together = dict(shift=shift, stretch=stretch, rescale=rescale)
    close(draw(**together), draw(**together), 0)


def test_jitter_draws_afresh_for_each_axis():
    draws = torch.stack([grid.jitter(torch.ones(1, 2), stretch=2.0)[0].log2() for _ in range(300)])
    assert draws.abs().max() <= 1 and draws.std(0).min() > 0.4 and (draws[:, 0] - draws[:, 1]).abs().max() > 1
    shifts = grid.jitter(torch.zeros(1, 2), shift=0.5)[0]
    assert shifts[0] != shifts[1]


# ------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize("axes", [spec.Axial(), spec.Mixed(), spec.Sections(sizes=(4, 5, 7))])
def test_positions_of_another_rank_are_refused(axes):
    with pytest.raises(InputError, match="coordinates"):
        rope.rotation(torch.zeros(1, 5, 4), spec.Rope(axes=axes), HEAD)


def test_a_picture_rope_needs_coordinates():
    with pytest.raises(InputError, match="2 axes"):
        rope.rotation(torch.arange(5)[None], spec.Rope(axes=spec.Axial()), HEAD)
