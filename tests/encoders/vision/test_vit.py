"""The vision and text towers as modules: shapes, prefixes, modes, dtypes, compile, export."""

import pytest
import torch

from mm.encoders import TextTower, ViT
from mm.encoders.spec import (
    ArgmaxPool,
    FlattenPool,
    GridTable,
    Head,
    MeanPool,
    Patches,
    Projection,
    TextSpec,
    TokenPool,
    ViTSpec,
)
from mm.errors import InputError
from mm.spec import CAUSAL, EVERYWHERE, Attention, Layer, LayerNorm, Mlp, Stack
from mm.spec.schema import from_json, to_json


def stack(window=EVERYWHERE):
    mixer = Attention(heads=2, kv_heads=2, head_dim=8, window=window)
    return Stack(dim=16, layers=(Layer(mixer=mixer, mlp=Mlp(hidden=24)),) * 2, final_norm=LayerNorm())


def vit(**changes):
    settings = {"image": (16, 16), "patches": Patches(size=(4, 4)), "stack": stack(), "head": Head(pool=TokenPool())}
    return ViT(ViTSpec(**settings | changes)).eval()


def text(**changes):
    settings = {"vocab": 50, "context": 9, "stack": stack(CAUSAL), "head": Head(pool=ArgmaxPool())}
    return TextTower(TextSpec(**settings | changes)).eval()


@pytest.mark.parametrize(("changes", "length"), [
    ({}, 17), ({"cls": 0, "head": Head(pool=MeanPool())}, 16), ({"cls": 2, "registers": 3}, 21),
    ({"registers": 4, "positions": GridTable(prefix=False)}, 21), ({"positions": None}, 17),
])
def test_tokens(changes, length):
    model = vit(**changes)
    tokens = model(torch.randn(2, 3, 16, 16))
    assert tokens.shape == (2, length, 16)
    assert model.pool(tokens).shape == (2, 16)
    assert model(torch.randn(1, 3, 20, 12)).shape == (1, 15 + length - 16, 16)


def test_prefix_tokens_come_first_and_take_positions_only_where_the_table_has_them():
    for prefix in (True, False):
        model = vit(registers=2, positions=GridTable(prefix=prefix))
        torch.nn.init.zeros_(model.patchify.weight)
        rows = model.positions.weight
        expected = torch.cat([model.cls, model.registers]) + (rows[:3] if prefix else 0)
        x = model.embed(torch.randn(2, 3, 16, 16)).tokens
        torch.testing.assert_close(x[1, :3], expected)
        torch.testing.assert_close(x[1, 3:], rows[-16:])


def test_mean_pool_leaves_prefix_tokens_out():
    model = vit(registers=2, head=Head(pool=MeanPool(), proj=Projection(dim=5)))
    tokens = model(torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(model.pool(tokens), tokens[:, 3:].mean(1))


def test_patch_dropout_is_for_training_only():
    model = vit(patch_dropout=0.5)
    x = torch.randn(2, 3, 16, 16)
    assert model(x).shape[1] == 17
    assert model.train()(x).shape[1] == 9


@pytest.mark.parametrize(("pixels", "message"), [
    (torch.zeros(3, 16, 16), r"pixels should be \(B, 3, h, w\), not of shape \(3, 16, 16\)"),
    (torch.zeros(1, 1, 16, 16), r"pixels should be \(B, 3, h, w\)"),
    (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "floating-point and normalised, not torch.uint8"),
    (torch.zeros(1, 3, 1, 1), "1 x 1 pixels has no whole patch of 4 x 4"),
])
def test_wrong_pixels(pixels, message):
    with pytest.raises(InputError, match=message):
        vit()(pixels)


@pytest.mark.parametrize(("ids", "message"), [
    (torch.zeros(5, dtype=torch.long), r"ids should be \(B, T\), T from 1 to 9"),
    (torch.zeros(1, 10, dtype=torch.long), r"T from 1 to 9, not of shape \(1, 10\)"),
    (torch.zeros(1, 0, dtype=torch.long), "T from 1 to 9"),
    (torch.zeros(1, 5), "ids should be integers, not torch.float32"),
])
def test_wrong_ids(ids, message):
    with pytest.raises(InputError, match=message):
        text()(ids)


def test_an_empty_batch():
    assert vit()(torch.zeros(0, 3, 16, 16)).shape == (0, 17, 16)
    assert text().encode(torch.zeros(0, 4, dtype=torch.long)).shape == (0, 16)


def test_a_shorter_text_gives_the_same_feature():
    """With causal sight nothing after the end of text matters, so rows need no padding to the context."""
    model, ids = text(), torch.tensor([[3, 7, 49, 0, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(model.encode(ids), model.encode(ids[:, :3]))


@pytest.mark.parametrize("window", [CAUSAL, EVERYWHERE])
def test_padding_is_neither_seen_nor_pooled(window):
    model = text(pad=0, stack=stack(window), head=Head(pool=MeanPool(prefix=True)))
    short = torch.tensor([[3, 7, 4]])
    padded = torch.tensor([[3, 7, 4, 0, 0], [5, 6, 7, 8, 9]])
    torch.testing.assert_close(model.encode(padded)[:1], model.encode(short))
    torch.testing.assert_close(model.encode(padded)[1:], model.encode(padded[1:]))
    counted = text(stack=stack(window), head=Head(pool=MeanPool(prefix=True)))
    counted.load_state_dict(model.state_dict())
    assert (counted.encode(padded)[:1] - model.encode(short)).abs().max() > 1e-3


def test_specs_go_through_json():
    for model in (vit(registers=2, positions=None, pre_norm=LayerNorm()), text(pad=0)):
        assert from_json(to_json(model.spec)) == model.spec


def test_specs_refuse_what_makes_no_sense():
    with pytest.raises(InputError, match="no token ids to pool by"):
        vit(head=Head(pool=ArgmaxPool()))
    with pytest.raises(InputError, match="patch_dropout must lie in"):
        vit(patch_dropout=1.0)
    with pytest.raises(InputError, match=r"image must be \(height, width\)"):
        vit(image=(16,))
    with pytest.raises(InputError, match="no whole patch"):
        vit(image=(2, 16))


def test_meta_device():
    with torch.device("meta"):
        model, words = vit(positions=GridTable(fixed=True)), text()
    assert {p.device.type for p in [*model.parameters(), *words.parameters()]} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    model, words = vit(pre_norm=LayerNorm()), text(pad=0)
    x, ids = torch.randn(2, 3, 20, 12), torch.randint(1, 50, (2, 6))
    for tower, value in ((model, x), (words, ids)):
        wide, narrow = tower.encode(value), tower.to(dtype).encode(value)
        assert narrow.dtype == dtype
        assert torch.cosine_similarity(wide, narrow.float(), dim=-1).min() > 0.99


@pytest.mark.parametrize(("tower", "value"), [
    (vit(patch_dropout=0.25).train(), torch.randn(2, 3, 20, 12)), (text(pad=0), torch.randint(1, 50, (2, 6)))])
def test_compiles_whole(tower, value):
    torch.manual_seed(0)
    expected = tower.encode(value)
    torch.manual_seed(0)
    compiled = torch.compile(tower.encode, fullgraph=True, backend="aot_eager")(value)
    torch.testing.assert_close(compiled, expected)


class Encode(torch.nn.Module):
    """`encode` as the forward, for export."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, x):
        return self.tower.encode(x)


def test_exports_with_a_dynamic_batch():
    batch = torch.export.Dim("batch", min=1, max=64)
    pixels, ids = torch.randn(4, 3, 20, 12), torch.randint(1, 50, (4, 6))
    for tower, value in ((vit(pre_norm=LayerNorm()), pixels), (text(pad=0), ids), (text(), ids)):
        program = torch.export.export(Encode(tower), (value,), dynamic_shapes=({0: batch},))
        wide = torch.cat([value, value.flip(0), value])
        torch.testing.assert_close(program.module()(wide), tower.encode(wide))


def test_flatten_pool_and_patch_dropout_exclude_each_other():
    layer = Layer(mixer=Attention(heads=1, kv_heads=1, head_dim=8))
    with pytest.raises(InputError, match="flatten pool needs every patch"):
        ViTSpec(image=(8, 8), patches=Patches(size=(4, 4)), stack=Stack(dim=8, layers=(layer,)),
                head=Head(pool=FlattenPool(tokens=4)), patch_dropout=0.5)
