"""Augmentations: what each one changes, and what it must not."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from mm.recipes.clip.augment import Dice, augment
from mm.recipes.clip.settings import Augment, Colour, Geometry, Texture

STILL = Geometry(flip=0.0)
PLAIN = Colour(**{field.name: 0.0 for field in fields(Colour)})
NOTHING = Augment(geometry=STILL, colour=PLAIN)
EVERYTHING = Augment(
    white=True, geometry=Geometry(rotation=20, scale=0.2, aspect=0.1, shear=5, shift=0.1, warp=0.05),
    colour=Colour(hue=0.3, gain=0.1, gray=0.2, invert=0.2, permute=0.3),
    texture=Texture(blur=0.3, outline=0.3, cutout=0.3, background=0.3))


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(16, 3, 12, 10, generator=torch.Generator().manual_seed(0))


def change(pixels: torch.Tensor, size: tuple[int, int] = (12, 10), seed: int = 0, **settings: object) -> torch.Tensor:
    return augment(pixels, size, Augment(**{"geometry": STILL, "colour": PLAIN, **settings}), Dice(seed, len(pixels)))


def test_strengths_of_zero_change_nothing(pixels):
    torch.testing.assert_close(augment(pixels, (12, 10), NOTHING, Dice(0, 16)), pixels)


def test_an_affine_map_of_zero_strength_is_the_identity(pixels):
    geometry = Geometry(flip=0.0, rotation=1e-7)
    torch.testing.assert_close(change(pixels, geometry=geometry), pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [EVERYTHING, Augment()])
def test_the_seed_decides_and_values_stay_between_0_and_1(pixels, settings):
    first, again, other = (augment(pixels, (8, 8), settings, Dice(seed, 16)) for seed in (1, 1, 2))
    assert first.shape == (16, 3, 8, 8) and torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() >= 0 and first.max() <= 1


def test_a_shared_batch_is_augmented_as_a_whole_one(pixels):
    whole = augment(pixels, (12, 10), EVERYTHING, Dice(5, 16))
    parts = [augment(pixels[8 * rank :][:8], (12, 10), EVERYTHING, Dice(5, 8, rank=rank, world=2)) for rank in (0, 1)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_rows_do_not_touch_each_other(pixels):
    other = pixels.clone()
    other[3] = 0.5
    a, b = (augment(x, (12, 10), EVERYTHING, Dice(5, 16)) for x in (pixels, other))
    changed = (a != b).flatten(1).any(dim=1)
    assert changed[3] and changed.sum() == 1


def test_a_flip_mirrors_about_half_of_the_rows(pixels):
    mirrored = [torch.equal(y, x.flip(-1)) for x, y in zip(pixels, change(pixels, geometry=Geometry()), strict=True)]
    assert 3 < sum(mirrored) < 13
    turned = change(pixels, geometry=Geometry(flip=1.0, rotation=1e-7))
    torch.testing.assert_close(turned, pixels.flip(-1), atol=1e-5, rtol=0)


def test_a_quarter_turn_moves_the_corner(pixels):
    picture = torch.zeros(1, 3, 9, 9)
    picture[..., 0, 0] = 1
    corners = set()
    for seed in range(120):
        moved = change(picture, (9, 9), seed, geometry=Geometry(flip=0.0, rotation=180.0))
        corners |= {divmod(int(moved[0, 0].argmax()), 9)} if moved.max() > 0.6 else set()
    assert len(corners) > 3


def test_what_a_shift_uncovers_is_white_where_pictures_lie_on_white():
    black = torch.zeros(32, 3, 8, 8)
    moved = change(black, (8, 8), white=True, geometry=Geometry(flip=0.0, shift=0.9))
    assert moved.max() > 0.99 and change(black, (8, 8), geometry=Geometry(flip=0.0, shift=0.9)).max() < 1e-6


def test_a_warp_bends_and_scale_zooms(pixels):
    for geometry in (Geometry(flip=0.0, warp=0.1), Geometry(flip=0.0, scale=0.3), Geometry(flip=0.0, shear=20.0),
                     Geometry(flip=0.0, aspect=0.3)):
        assert (change(pixels, geometry=geometry) - pixels).abs().mean() > 0.01


def test_gray_makes_the_channels_equal(pixels):
    gray = change(pixels, colour=Colour(hue=0, saturation=0, contrast=0, brightness=0, gray=1.0))
    torch.testing.assert_close(gray, pixels.mean(dim=1, keepdim=True).expand_as(pixels))


def test_invert_and_permute(pixels):
    torch.testing.assert_close(change(pixels, colour=Colour(**{**vars(PLAIN), "invert": 1.0})), 1 - pixels)
    permuted = change(pixels, colour=Colour(**{**vars(PLAIN), "permute": 1.0}))
    torch.testing.assert_close(permuted.sort(dim=1).values, pixels.sort(dim=1).values)
    assert (permuted != pixels).any()


def test_hue_keeps_grays_and_moves_colours():
    colour = Colour(**{**vars(PLAIN), "hue": 1.0, "saturation": 0.2})
    gray = torch.full((8, 3, 4, 4), 0.4)
    torch.testing.assert_close(change(gray, (4, 4), colour=colour), gray)
    red = torch.tensor([0.6, 0.4, 0.4]).view(1, 3, 1, 1).expand(8, 3, 4, 4)
    assert (change(red, (4, 4), colour=colour) - red).abs().max() > 0.05


@pytest.mark.parametrize("name", ["contrast", "brightness", "gain"])
def test_each_colour_strength_does_something(pixels, name):
    assert (change(pixels, colour=Colour(**{**vars(PLAIN), name: 0.3})) - pixels).abs().mean() > 0.01


def test_blur_is_the_mean_of_nine_and_outline_darkens_only_edges():
    picture = torch.ones(1, 3, 7, 7)
    picture[..., 3, 3] = 0.1
    blurred = change(picture, (7, 7), texture=Texture(blur=1.0))
    torch.testing.assert_close(blurred[..., 2:5, 2:5], torch.full((1, 3, 3, 3), 0.9))
    lined = change(picture, (7, 7), texture=Texture(outline=1.0))
    assert lined[..., 3, 3].max() < 0.1 and torch.equal(lined[..., 0, 0], picture[..., 0, 0])


def test_cutout_background_and_noise(pixels):
    hidden = change(pixels, texture=Texture(cutout=1.0)) != pixels
    assert 0 < hidden.float().mean() < 0.5
    paper = torch.ones(8, 3, 4, 4)
    paper[..., :2, :] = 0.2
    coloured = change(paper, (4, 4), texture=Texture(background=1.0))
    torch.testing.assert_close(coloured[..., :2, :], paper[..., :2, :])
    assert coloured[..., 2:, :].max() < 1
    noisy = change(torch.full_like(pixels, 0.5), texture=Texture(noise=0.1))
    assert 0.08 < noisy.std() < 0.12
