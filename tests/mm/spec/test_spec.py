"""Specs: JSON there and back, checks when they are made, sentences that name the place."""

import dataclasses
import json
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm import spec
from mm.errors import InputError
from mm.spec import schema

OWN = {name: cls for name, cls in vars(spec).items() if name in schema.SPECS and schema.SPECS[name] is cls}


def values(kind):
    """Anything that has the annotated type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return st.sampled_from(inner)
    if origin is tuple:
        return st.lists(values(inner[0]), min_size=1, max_size=3).map(tuple)
    if inner:
        return st.one_of(*map(values, inner))
    if dataclasses.is_dataclass(kind):
        return specs(kind)
    plain = {int: st.integers(1, 64), bool: st.booleans(), float: st.integers(1, 9) | st.floats(0.01, 0.99),
             str: st.sampled_from(["one", "two"])}
    return plain.get(kind, st.none())


def specs(cls):
    """Any spec of this class that its checks let through."""
    @st.composite
    def build(draw):
        fields = {name: draw(values(kind)) for name, kind in schema.field_types(cls).items()}
        chosen = draw(st.sets(st.sampled_from(sorted(fields)))) if fields else set()
        needed = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        try:
            return cls(**{name: fields[name] for name in chosen | needed})
        except InputError:
            return REPLACEMENTS[cls]
    return build()


HEADS = spec.Attention(heads=4, kv_heads=2, head_dim=8)
LATENT = spec.Latent(heads=2, kv_rank=4, nope_dim=4, rope_dim=2, value_dim=4, rope=spec.Rope())
READER = spec.Layer(mixer=HEADS, cross=HEADS)
ENCODER = spec.EncoderSpec(embed=spec.Embed(vocab=9), context=5,
                           stack=spec.Stack(dim=8, layers=(spec.Layer(mixer=HEADS),)))
DEPTH_LAYER = spec.Layer(mixer=spec.Attention(heads=4, kv_heads=2, head_dim=8, window=spec.CAUSAL, q_bias=False,
                                              k_bias=False, v_bias=False, out_bias=False),
                         mlp=spec.Mlp(hidden=8, gated=True, up_bias=False, down_bias=False))
DEPTH = spec.Depth(stack=spec.Stack(dim=8, layers=(DEPTH_LAYER,)), weights=(0, 1, 1))
VOICE = spec.Condition(name="voice", of=spec.Vectors(dim=4), into="prepend")
REPLACEMENTS = {
    spec.Depth: DEPTH, spec.TextStream: spec.TextStream(vocab=9), spec.Choice: spec.Choice(bins=4, dim=2),
    spec.Conditioning: spec.Conditioning(conditions=(VOICE,)),
    spec.CSMSpec: spec.CSMSpec(text_vocab=9, stack=spec.Stack(dim=8, layers=(spec.Layer(mixer=HEADS),)), card=4,
                               depth=spec.Depth(stack=DEPTH.stack, weights=(0, 0)), context=5),
    spec.DuplexSpec: spec.DuplexSpec(text=spec.TextStream(vocab=9), card=8, context=5, delays=(0, 1, 2, 0), depth=DEPTH,
                                     stack=spec.Stack(dim=8, layers=(spec.Layer(mixer=HEADS),))),
    spec.Window: spec.CAUSAL, spec.Buckets: spec.Buckets(), spec.Rope: spec.Rope(), spec.Mlp: spec.Mlp(hidden=8),
    spec.Attention: HEADS, spec.Layer: spec.Layer(mixer=HEADS),
    spec.Latent: LATENT, spec.Moe: spec.Moe(experts=4, chosen=2, expert=spec.Mlp(hidden=8)),
    spec.Embed: spec.Embed(vocab=9), spec.DecoderSpec: spec.DecoderSpec(
        embed=spec.Embed(vocab=9), stack=spec.Stack(dim=8, layers=(spec.Layer(mixer=LATENT),)), context=5),
    spec.Groups: spec.Groups(count=4, chosen=2), spec.SentencePooling: spec.SentencePooling(),
    spec.EncoderSpec: ENCODER,
    spec.Seq2SeqSpec: spec.Seq2SeqSpec(encoder=ENCODER, start=(0,), end=1, decoder=spec.DecoderSpec(
        embed=spec.Embed(vocab=9), stack=spec.Stack(dim=8, layers=(READER,)), context=5)),
    spec.Differential: spec.Differential(base=HEADS, lambda_init=0.5),
    spec.Stack: spec.Stack(dim=8, layers=(spec.Layer(mixer=HEADS),)),
}


@given(st.sampled_from(sorted(OWN)).flatmap(lambda name: specs(OWN[name])))
def test_every_spec_goes_through_json_and_back(settings):
    again = schema.from_json(schema.to_json(settings))
    assert again == settings and type(again) is type(settings)
    assert schema.fingerprint(again) == schema.fingerprint(settings) and hash(again) == hash(settings)


def test_json_leaves_defaults_out_and_names_classes():
    data = schema.to_data(spec.Stack(dim=8, layers=(spec.Layer(mixer=HEADS),)))
    heads = {"is": "Attention", "heads": 4, "kv_heads": 2, "head_dim": 8}
    assert data == {"is": "Stack", "dim": 8, "layers": [{"is": "Layer", "mixer": heads}]}


def test_equal_specs_have_one_fingerprint_and_different_ones_two():
    assert schema.fingerprint(spec.LinearScaling(factor=8)) == schema.fingerprint(spec.LinearScaling(factor=8.0))
    prints = {schema.fingerprint(dataclasses.replace(HEADS, **change))
              for change in ({}, {"heads": 8}, {"softcap": 1.0}, {"sinks": True}, {"window": spec.CAUSAL})}
    assert len(prints) == 5 and all(len(x) == 16 for x in prints)


def test_specs_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        HEADS.heads = 3
    with pytest.raises(TypeError):
        spec.LayerNorm(1e-5)


# ------------------------------------------------------------------------------------------------ from files
STACK = schema.to_data(spec.Stack(dim=8, layers=(spec.Layer(mixer=HEADS, mlp=spec.Mlp(hidden=8)),)))


@pytest.mark.parametrize("place, value, words", [
    (("is",), "Heap", "spec: 'Heap' is not a kind of spec"),
    (("is",), ["Stack"], "is not a kind of spec"),
    (("width",), 3, "spec: Stack has no field width"),
    (("dim",), "8", "spec: '8' is not a valid Stack.dim"),
    (("dim",), True, "True is not a valid Stack.dim"),
    (("dim",), 8.5, "8.5 is not a valid Stack.dim"),
    (("layers", 0, "placement"), "behind", r"spec.layers\[0\]: 'behind' is not a valid Layer.placement"),
    (("layers", 0, "mlp", "act"), "swish", r"spec.layers\[0\].mlp: 'swish' is not a valid Mlp.act"),
    (("layers", 0, "mixer"), None, r"spec.layers\[0\]: None is not a valid Layer.mixer"),
    (("layers", 0, "mixer", "kv_heads"), 3, r"spec.layers\[0\].mixer: 4 heads cannot share 3"),
    (("layers", 0, "mlp"), {"is": "Mlp"}, r"spec.layers\[0\].mlp: Mlp needs hidden"),
    (("layers", 0, "norm"), {"is": "Window"}, "is not a valid Layer.norm"),
    (("layers",), 7, "7 is not a valid Stack.layers"),
])
def test_mistakes_in_a_file_are_named(place, value, words):
    data = json.loads(json.dumps(STACK))
    *path, last = place
    here = data
    for step in path:
        here = here[step]
    here[last] = value
    with pytest.raises(InputError, match=words):
        schema.from_json(json.dumps(data))


def test_text_that_is_not_json_is_refused():
    with pytest.raises(InputError, match="JSON"):
        schema.from_json("{'is': 'Stack'}")


# --------------------------------------------------------------------------------------------- contradictions
MIXED = spec.Rope(axes=spec.Mixed())


@pytest.mark.parametrize("make, words", [
    (lambda: spec.Window(left=-1), "left must not be negative"),
    (lambda: spec.Window(right=-1), "right must not be negative"),
    (lambda: spec.Window(chunk=0), "chunk must be positive"),
    (lambda: spec.Window(left=4, right=0, chunk=8, first=2), "need a causal window"),
    (lambda: spec.Mlp(hidden=8, act="swish"), "'swish' is not a valid Mlp.act"),
    (lambda: spec.Attention(heads=0, kv_heads=1, head_dim=8), "positive"),
    (lambda: spec.Attention(heads=4, kv_heads=3, head_dim=8), "cannot share"),
    (lambda: dataclasses.replace(HEADS, rope=spec.Rope(dim=10)), "at most head_dim 8, not 10"),
    (lambda: dataclasses.replace(HEADS, head_dim=7, rope=spec.Rope()), "even"),
    (lambda: dataclasses.replace(HEADS, rope=spec.Rope(axes=spec.Axial(axes=3))), "4 angles cannot be shared by 3"),
    (lambda: dataclasses.replace(HEADS, rope=spec.Rope(axes=spec.Sections(sizes=(1, 2)))), "add up to 4"),
    (lambda: dataclasses.replace(HEADS, rope=MIXED), "a key head per query head"),
    (lambda: dataclasses.replace(HEADS, rope=spec.Rope(scaling=spec.LongRope(
        original=8, factor=2.0, short=(1.0,), long=(1.0,)))), "4 factors"),
    (lambda: dataclasses.replace(MIXED, scaling=spec.LinearScaling(factor=2.0)), "no Rope.scaling"),
    (lambda: spec.Rope(axes=spec.Axial(), scaling=spec.Yarn(factor=2.0, original=8)), "axial"),
    (lambda: spec.Differential(base=dataclasses.replace(HEADS, sinks=True), lambda_init=0.5), "differential"),
    (lambda: spec.Layer(mixer=HEADS, cross=dataclasses.replace(HEADS, rope=spec.Rope())), "cross-attention has no"),
    (lambda: spec.Layer(mixer=HEADS, drop_path=1.0), r"Layer.drop_path must lie in \[0, 1\), not 1.0"),
    (lambda: spec.Layer(mixer=HEADS, dropout=-0.1), "Layer.dropout"),
    (lambda: spec.Mlp(hidden=8, dropout=1.5), "Mlp.dropout"),
    (lambda: spec.Mlp(hidden=0), "Mlp.hidden"),
    (lambda: dataclasses.replace(HEADS, dropout=2.0), "Attention.dropout"),
    (lambda: spec.Rope(theta=0.0), "theta must be positive"),
    (lambda: spec.Buckets(count=32, distance=8), "32 buckets do not reach a distance of 8"),
    (lambda: spec.Layer(mixer=HEADS, placement="parallel"), "parallel"),
    (lambda: spec.Stack(dim=0, layers=()), "dim must be positive"),
    (lambda: spec.Stack(dim=8, relative=spec.Alibi(), layers=tuple(
        spec.Layer(mixer=dataclasses.replace(HEADS, heads=heads)) for heads in (2, 4))), "equal heads"),
    (lambda: spec.Stack(dim=8, relative=spec.Alibi(), layers=(
        spec.Layer(mixer=dataclasses.replace(HEADS, extra_key=True)),)), "extra key"),
])
def test_contradictions_are_refused_when_a_spec_is_made(make, words):
    with pytest.raises(InputError, match=words):
        make()
