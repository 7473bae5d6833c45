"""Patches, position tables and patch dropout."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

from mm.encoders.spec import FactorTable, GridTable, Patches
from mm.encoders.vision.patches import FactorPositions, GridPositions, Patchify, kept_patches, take
from mm.errors import InputError


@pytest.mark.parametrize(("settings", "size"), [
    (Patches(size=(4, 4)), (16, 16)),
    (Patches(size=(4, 4), bias=False), (20, 12)),
    (Patches(size=(4, 8)), (16, 24)),
    (Patches(size=(4, 4), stride=(4, 4)), (16, 8)),
    (Patches(size=(4, 4)), (19, 15)),
    (Patches(size=(4, 4), stride=(3, 2)), (16, 17)),
    (Patches(size=(4, 4), stride=(6, 6), channels=1), (17, 16)),
])
def test_patchify_is_a_convolution(settings, size):
    patchify = Patchify(10, settings)
    if settings.bias:
        torch.nn.init.normal_(patchify.bias)
    pixels = torch.randn(2, settings.channels, *size)
    expected = F.conv2d(pixels, patchify.weight, patchify.bias, settings.stride or settings.size)
    torch.testing.assert_close(patchify(pixels), expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert settings.grid(*size) == expected.shape[2:]


def drop_patches(x, prefix, rate):
    return take(x, kept_patches(*x.shape[:2], prefix, rate, x.device))


def test_a_picture_smaller_than_a_patch():
    with pytest.raises(InputError, match="3 x 9 pixels has no whole patch of 4 x 4"):
        Patches(size=(4, 4)).grid(3, 9)


@pytest.mark.parametrize("bad", [(4,), (4, 4, 4), (0, 4)])
def test_patch_sizes_are_two_positive_numbers(bad):
    with pytest.raises(InputError, match="Patches.size must be two positive numbers"):
        Patches(size=bad)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("new", [(3, 5), (8, 8), (2, 9)])
def test_positions_on_another_grid(mode, antialias, new):
    """timm's resampling, with the prefix rows untouched."""
    positions = GridPositions(6, (4, 5), 2, GridTable(mode=mode, antialias=antialias))
    expected = resample_abs_pos_embed(positions.weight[None], new, (4, 5), 2, mode, antialias)[0]
    torch.testing.assert_close(positions(new), expected)
    assert positions((4, 5)) is positions.weight


@pytest.mark.parametrize("align_corners", [True, False])
def test_positions_that_keep_the_aspect(align_corners):
    """The table on the square around the grid, cut to its first rows and columns."""
    settings = GridTable(prefix=False, keep_aspect=True, align_corners=align_corners, antialias=False)
    positions = GridPositions(6, (4, 4), 2, settings)
    square = F.interpolate(positions.weight.T.reshape(1, 6, 4, 4), (5, 5), mode="bicubic",
                                       align_corners=align_corners)
    torch.testing.assert_close(positions((5, 3)), square[0, :, :, :3].flatten(1).T)


@pytest.mark.parametrize(("keep_aspect", "lengths"), [(True, (5, 5)), (False, (5, 3))])
def test_positions_of_rows_and_columns(keep_aspect, lengths):
    positions = FactorPositions(6, (4, 2), FactorTable(keep_aspect=keep_aspect))
    rows, columns = (F.interpolate(table.T[None], length, mode="linear")[0].T
                     for table, length in zip((positions.rows, positions.columns), lengths, strict=True))
    expected = torch.stack([rows[i] + columns[j] for i in range(5) for j in range(3)])
    torch.testing.assert_close(positions((5, 3)), expected)


def test_positions_without_prefix_rows():
    positions = GridPositions(6, (4, 4), 3, GridTable(prefix=False))
    assert positions.weight.shape == (16, 6) and positions.prefix == 0
    assert positions((5, 3)).shape == (15, 6)


def test_fixed_positions_are_sinusoids_and_not_trained():
    """The column turns the first half of the channels, the row the second; sines before cosines."""
    positions = GridPositions(8, (3, 4), 1, GridTable(fixed=True))
    assert not positions.weight.requires_grad
    assert torch.equal(positions.weight[0], torch.zeros(8))
    row, column = 2.0, 3.0
    angles = [torch.tensor([axis, axis / 100]) for axis in (column, row)]
    expected = torch.cat([torch.cat([a.sin(), a.cos()]) for a in angles])
    torch.testing.assert_close(positions.weight[1 + 2 * 4 + 3], expected)


def test_patch_dropout_keeps_prefix_tokens_and_a_share_of_the_patches():
    x = torch.arange(200.0).reshape(4, 50, 1)
    kept = drop_patches(x, 2, 0.75)
    assert kept.shape == (4, 2 + 12, 1)
    assert torch.equal(kept[:, :2], x[:, :2])
    for row, all_patches in zip(kept[:, 2:, 0], x[:, 2:, 0], strict=True):
        assert len(set(row.tolist())) == 12 and set(row.tolist()) <= set(all_patches.tolist())
    assert not torch.equal(kept[0] + 50, kept[1]), "rows should lose different patches"


def test_patch_dropout_leaves_at_least_one_patch_and_is_seeded():
    x = torch.randn(2, 4, 3)
    assert drop_patches(x, 1, 0.99).shape == (2, 2, 3)
    torch.manual_seed(3)
    first = drop_patches(x, 1, 0.5)
    torch.manual_seed(3)
    assert torch.equal(first, drop_patches(x, 1, 0.5))
