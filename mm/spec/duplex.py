"""Duplex models as data: streams of text and audio codes that go on side by side."""

from __future__ import annotations

from typing import Literal

from mm.spec.mixers import Attention
from mm.spec.mlp import Mlp
from mm.spec.schema import require, spec
from mm.spec.stack import Layer, Stack


@spec
class TextStream:
    """The stream of text, tokens below `vocab`; `vocab` itself stands before its first token. `padding` goes on until
    the next word, `word_end` is the last padding before one. The head scores `outputs` tokens (None: the vocabulary).
    `second`: a token may carry another speaker's, `(other + 1) * (vocab + 1) + token` (Kyutai's text to speech).
    `end`, which a model writes when it believes to be done, it reads as padding, and goes on (Hibiki)."""

    vocab: int
    outputs: int | None = None
    padding: int = 3
    word_end: int = 0
    second: bool = False
    end: int | None = None

    def __post_init__(self) -> None:
        require(self.vocab > 0 and (self.outputs is None or self.outputs > 0), "TextStream.vocab must be positive")
        require(0 <= min(self.padding, self.word_end) <= max(self.padding, self.word_end) < self.vocab,
                f"TextStream.padding and word_end must be tokens below {self.vocab}")

    @property
    def most(self) -> int:
        """The largest token that the stream can carry."""
        return (self.vocab + 2) * (self.vocab + 1) - 1 if self.second else self.vocab


@spec
class Depth:
    """The depth transformer, which writes the codes of one frame one after the other, causally, after the text.

    `weights[k]` says which set of projections and MLPs the step of codebook k uses; norms are shared, but the final
    one. `hidden` are the widths of the sets' MLPs (empty: all as in the layers). `rank` is the width of the embeddings'
    tables, each followed by a projection (None: as wide as the stack). `one_input`: one projection of the temporal
    stack's output for all steps instead of one per set."""

    stack: Stack
    weights: tuple[int, ...]
    hidden: tuple[int, ...] = ()
    rank: int | None = None
    one_input: bool = False

    def __post_init__(self) -> None:
        require(len(self.weights) > 0 and set(self.weights) == set(range(self.sets)),
                f"Depth.weights must name the sets 0 to {max(self.weights, default=0)}, each at least once")
        require(len(self.hidden) in (0, self.sets), f"Depth.hidden must hold a width for each of {self.sets} sets")
        require(self.rank is None or self.rank > 0, "Depth.rank must be positive")
        require(len(self.stack.layers) > 0, "Depth.stack needs a layer")
        for layer in self.stack.layers:
            require(plain(layer), "layers of a depth stack have causal attention before a gated MLP without biases")

    @property
    def codebooks(self) -> int:
        return len(self.weights)

    @property
    def sets(self) -> int:
        return max(self.weights) + 1


def plain(layer: Layer) -> bool:
    """Whether a layer is of the kind that the depth transformer has."""
    a, mlp = layer.mixer, layer.mlp
    return (isinstance(a, Attention) and isinstance(mlp, Mlp) and layer.cross is None and layer.placement == "pre"
            and layer.mixer_norm and not (a.q_bias or a.k_bias or a.v_bias or a.out_bias) and a.window.right == 0
            and a.window.left is None and a.window.chunk is None and mlp.gated and not (mlp.up_bias or mlp.down_bias)
            and a == Attention(heads=a.heads, kv_heads=a.kv_heads, head_dim=a.head_dim, window=a.window, rope=a.rope,
                               q_bias=False, k_bias=False, v_bias=False, out_bias=False)
            and mlp == Mlp(hidden=mlp.hidden, act=mlp.act, gated=True, up_bias=False, down_bias=False))


@spec
class Choice:
    """A condition that is one of a list of words, or none; without `values`, any word falls into one of `bins`."""

    bins: int
    dim: int
    values: tuple[str, ...] = ()
    learned_absence: bool = True

    def __post_init__(self) -> None:
        require(min(self.bins, self.dim) > 0, "Choice.bins and dim must be positive")
        require(len(self.values) <= self.bins, f"Choice.values are {len(self.values)}, more than {self.bins} bins")


@spec
class Vectors:
    """A condition that is a sequence of vectors of width `dim`, for example of a speaker."""

    dim: int
    learned_absence: bool = True

    def __post_init__(self) -> None:
        require(self.dim > 0, "Vectors.dim must be positive")


@spec
class Condition:
    """One condition and how it enters: added to every frame (`sum`), read by cross-attention, or put before the
    frames."""

    name: str
    of: Choice | Vectors
    into: Literal["sum", "cross", "prepend"]


@spec
class Conditioning:
    """What a model is told beside its streams. `cross_positions`: sines times this are added to what cross-attention
    reads; 0 adds none."""

    conditions: tuple[Condition, ...]
    cross_positions: float = 0.0

    def __post_init__(self) -> None:
        names = [condition.name for condition in self.conditions]
        require(len(names) > 0 and len(set(names)) == len(names), "Conditioning.conditions need a name each")

    def any(self, into: str) -> bool:
        return any(condition.into == into for condition in self.conditions)


@spec
class DuplexSpec:
    """A model of one stream of text and `codebooks` streams of audio codes below `card`; `card` itself stands before a
    stream's first code. The depth transformer writes the first streams of audio, the model's own; the others are heard.
    `delays` are in frames, the text's first. `extra` are the sizes of further heads (a voice activity, for example);
    `context` is the number of frames that a session remembers, where a layer has no window of its own."""

    text: TextStream
    stack: Stack
    card: int
    delays: tuple[int, ...]
    context: int
    depth: Depth | None = None
    conditioning: Conditioning | None = None
    extra: tuple[int, ...] = ()
    head_bias: bool = False

    def __post_init__(self) -> None:
        require(min(self.card, self.context) > 0, "DuplexSpec.card and context must be positive")
        require(len(self.delays) > 1 and min(self.delays) >= 0,
                "DuplexSpec.delays must hold one delay for the text and one for each codebook")
        require(self.own <= self.codebooks, f"a depth of {self.own} codebooks is more than {self.codebooks} streams")
        require(all(size > 0 for size in self.extra), "DuplexSpec.extra must hold positive sizes")
        cross = any(layer.cross is not None for layer in self.stack.layers)
        told = self.conditioning is not None and self.conditioning.any("cross")
        require(cross == told, "cross-attention in the stack and conditions for it go together")

    @property
    def codebooks(self) -> int:
        """Streams of audio codes, own and heard."""
        return len(self.delays) - 1

    @property
    def own(self) -> int:
        """Streams of audio codes that the model writes."""
        return self.depth.codebooks if self.depth else 0

    @property
    def heard(self) -> int:
        return self.codebooks - self.own

    @property
    def lag(self) -> int:
        """Frames until all streams of a frame are known."""
        return max(self.delays)


@spec
class CSMSpec:
    """Sesame's CSM: frames of text or of one voice's codes below `card`, without delays. The depth stack reads what the
    temporal stack made of the frames before, then the frame's codes, all steps with one set of weights. A frame of
    nothing but `end` ends a text's audio."""

    text_vocab: int
    stack: Stack
    card: int
    depth: Depth
    context: int
    end: int = 0

    def __post_init__(self) -> None:
        require(min(self.text_vocab, self.card, self.context) > 0, "CSMSpec.text_vocab, card and context are positive")
        require(self.depth.codebooks > 1 and self.depth.sets == 1 and self.depth.rank is None,
                "CSMSpec.depth has at least two codebooks, one set of weights and no rank")
        require(0 <= self.end < self.card, f"CSMSpec.end must be a code below {self.card}")
