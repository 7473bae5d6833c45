"""Tables run both ways and are strict both ways."""

import pytest
import torch

from mm.checkpoint.tables import SCALAR, TRANSPOSED, Table, fused, halves, reshaped, rule
from mm.errors import InputError

TABLE = Table(
    (rule("emb.weight", "words"),
     rule(("h.{n}.q.{x}", "h.{n}.k.{x}", "h.{n}.v.{x}"), "blocks.{n}.qkv.{x}", fused(4, 2, 2)),
     rule("proj", "proj.weight", TRANSPOSED),
     rule("scale", "scale", SCALAR)),
    {"h.{n}.position_ids": "a buffer of positions"})


def theirs():
    torch.manual_seed(0)
    tensors = {"emb.weight": torch.randn(5, 3), "proj": torch.randn(3, 7), "scale": torch.randn(1)}
    for n in (0, 10):
        for part, rows in (("q", 4), ("k", 2), ("v", 2)):
            tensors[f"h.{n}.{part}.weight"], tensors[f"h.{n}.{part}.bias"] = torch.randn(rows, 3), torch.randn(rows)
    return tensors


WANTED = {"words": (5, 3), "proj.weight": (7, 3), "scale": (),
          **{f"blocks.{n}.qkv.{x}": shape for n in (0, 10) for x, shape in (("weight", (8, 3)), ("bias", (8,)))}}


def load(tensors, wanted=WANTED, table=TABLE):
    return table.load({name: tuple(x.shape) for name, x in tensors.items()}, tensors.__getitem__, wanted, "file.bin")


def test_there_and_back():
    tensors = theirs()
    ours = load({**tensors, "h.3.position_ids": torch.arange(4)})
    assert {name: tuple(x.shape) for name, x in ours.items()} == WANTED
    assert torch.equal(ours["blocks.10.qkv.weight"][4:6], tensors["h.10.k.weight"])
    assert torch.equal(ours["proj.weight"], tensors["proj"].T)
    back = TABLE.save(ours, "their")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], x.reshape(back[name].shape)) for name, x in tensors.items())


def test_missing_weight_is_named():
    tensors = theirs()
    del tensors["proj"]
    with pytest.raises(InputError, match=r"file\.bin: 1 of the weights is missing \(proj\)"):
        load(tensors)


@pytest.mark.parametrize("part", "qkv")
def test_each_part_of_a_fused_weight_may_be_the_missing_one(part):
    tensors = theirs()
    del tensors[f"h.10.{part}.bias"]
    with pytest.raises(InputError, match=rf"missing .*h\.10\.{part}\.bias"):
        load(tensors)


def test_unknown_weights_are_named_and_counted():
    tensors = {**theirs(), **{f"head.{i}": torch.ones(1) for i in range(5)}}
    with pytest.raises(InputError, match=r"5 of the weights are not expected by the config \(head\.0, .* and 2 more\)"):
        load(tensors)


def test_a_layer_beyond_the_config_is_unknown():
    wanted = {name: shape for name, shape in WANTED.items() if ".10." not in name}
    with pytest.raises(InputError, match=r"not expected by the config \(h\.10\."):
        load(theirs(), wanted)


def test_wrong_shape_is_told_in_their_terms():
    tensors = {**theirs(), "proj": torch.randn(4, 7)}
    with pytest.raises(InputError, match=r"proj should have shape \(3, 7\) by the config, but has \(4, 7\)"):
        load(tensors)
    with pytest.raises(InputError, match=r"h\.0\.k\.weight should have shape \(2, 3\)"):
        load({**theirs(), "h.0.k.weight": torch.randn(4, 3)})


def test_only_sizes_of_one_are_loose():
    with pytest.raises(InputError, match=r"scale should have shape \(\)"):
        load({**theirs(), "scale": torch.randn(2)})


def test_ours_without_a_rule_is_missing():
    with pytest.raises(InputError, match=r"missing \(extra\)"):
        load(theirs(), {**WANTED, "extra": (1,)})


def test_export_names_what_the_layout_cannot_hold():
    with pytest.raises(InputError, match="the their layout has no place for extra"):
        TABLE.save({**load(theirs()), "extra": torch.ones(1)}, "their")


def test_rotary_halves():
    """Pair i of an interleaved head (rows 2i, 2i + 1) becomes rows i and i + E/2."""
    rows = torch.arange(8.0)[:, None]
    ours = halves(2).load([rows])[0]
    assert ours.flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(halves(2).save([ours])[0], rows)


def test_reshaped():
    transform = reshaped((6,), (1, 2, 3))
    assert transform.load([torch.ones(1, 2, 3)])[0].shape == (6,)
    assert transform.save([torch.ones(6)])[0].shape == (1, 2, 3)
