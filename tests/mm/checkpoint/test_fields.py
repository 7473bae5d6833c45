"""Lists of fields, read and written, and how little a family adds to the one that it descends from."""

import inspect

import pytest
import torch

from mm import TextDecoder
from mm.checkpoint.family import Keys
from mm.checkpoint.fields import Pieces, always, expected, extend, field, gather, named, pair, silent, spell, unread
from mm.checkpoint.tables import SAME, STACKED, rules_of
from mm.errors import InputError
from mm.spec import Attention, QKNorm
from mm.text.families.decoder import BIAS, LLAMA, WEIGHTS, Decoder, block

FIELDS = (
    field("width", "stack.dim"), field("heads", "mixer.heads", "mixer.kv_heads"),
    field("head_dim", "mixer.head_dim", default=lambda v: v["stack.dim"] // v["mixer.heads"]),
    field("rate", "mixer.dropout", kind=float, default=0.0),
    named("act", "mlp.act", {"swish": "silu"}, {"silu": "swish"}),
    expected(causal=True), unread("comment"), always(mixer__sinks=True),
    pair("scaled", lambda keys, v: {"mixer.scale": 1.0 if keys.take("scaled", bool, False) else None},
         lambda pieces: {"scaled": pieces.mixer.scale is not None}))


def read(**config):
    keys = Keys({"width": 32, "heads": 4, "act": "swish"} | config, "test.json")
    values = gather(FIELDS, keys)
    keys.done()
    return values


def test_there_and_back():
    values = read(rate=0.5, scaled=True, comment="x")
    mixer = values.make("mixer")
    assert mixer == Attention(heads=4, kv_heads=4, head_dim=8, dropout=0.5, scale=1.0, sinks=True)
    pieces = Pieces(stack=type("Stack", (), {"dim": 32}), mixer=mixer, mlp=type("Mlp", (), {"act": "silu"}))
    assert spell(FIELDS, pieces) == {"width": 32, "heads": 4, "head_dim": 8, "rate": 0.5, "act": "swish",
                                     "scaled": True}


@pytest.mark.parametrize(("config", "says"), [
    ({"heads": None}, "has no heads"), ({"heads": "4"}, "heads should be int"),
    ({"act": "tanh"}, "act should be one of"),
    ({"causal": False}, "causal should be True, not False"), ({"other": 1}, "not supported: other=1"),
    ({"width": 0}, "width should be positive")])
def test_what_is_wrong_is_named(config, says):
    with pytest.raises(InputError, match=says):
        read(**config)


def test_a_piece_that_a_model_has_not():
    with pytest.raises(InputError, match="holds a heads of its mixer, which this model has not"):
        spell(FIELDS[1:2], Pieces(mixer=None))


def test_a_field_takes_the_place_of_one_with_its_key():
    more = extend(FIELDS, silent(field("rate", "mlp.dropout", kind=float, default=0.1)), field("new", "mlp.hidden"))
    assert [entry.key for entry in more] == [*(entry.key for entry in FIELDS), "new"]
    assert more[3].write(Pieces()) == {}


def test_rows_of_weights():
    rules = rules_of({"a.[q k].{x}": "ours.{x} | both", "b.[*]": "c | both", "old": "", "d": "e"}, {"both": STACKED}, 3)
    assert [(one.theirs, one.ours) for one in rules] == [
        (("a.q.{x}", "a.k.{x}"), ("ours.{x}",)), (("b.0", "b.1", "b.2"), ("c",)), (("d",), ("e",))]
    assert rules[0].transform is STACKED and rules[2].transform is SAME


def olmo() -> Decoder:
    return Decoder(
        model_type="olmo2", name="Olmo2ForCausalLM", defaults={"rms_norm_eps": 1e-5}, fields=extend(LLAMA, BIAS, always(
            layer__placement="post_branch", norm__order="scale_then_cast",
            mixer__qk_norm=lambda v: QKNorm(norm=v.make("norm"), over="flat"))),
        weights=WEIGHTS | block({"input_layernorm.weight": "", "post_attention_layernorm.weight": "mixer_norm.weight",
                                 "post_feedforward_layernorm.weight": "mlp_norm.weight"}))


def test_a_decoder_like_olmo_2_takes_a_dozen_lines():
    from mm.text.families.llama import OLMO2
    assert len(inspect.getsource(olmo).splitlines()) - 1 <= 12
    config = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 48}
    spec = olmo().to_spec(config, "test")
    assert spec == OLMO2.to_spec(config, "test") and olmo().from_spec(spec) == OLMO2.from_spec(spec)
    state = TextDecoder(spec).state_dict()
    theirs = olmo().table(spec).save(state, "hf")
    shapes = {name: tuple(value.shape) for name, value in theirs.items()}
    again = olmo().table(spec).load(shapes, theirs.get, {name: tuple(x.shape) for name, x in state.items()}, "test")
    assert all(torch.equal(again[name], value) for name, value in state.items())
