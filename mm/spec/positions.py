"""Positions as data: rotary embeddings and their scalings, tables, biases, and how far a token sees."""

from __future__ import annotations

from typing import Literal

from mm.spec.schema import require, spec


@spec
class LinearScaling:
    factor: float


@spec
class DynamicNTK:
    factor: float
    original: int


@spec
class Llama3Scaling:
    factor: float
    original: int
    low: float = 1.0
    high: float = 4.0


@spec
class Yarn:
    """`mscale` and `mscale_all` are DeepSeek's; both 0 gives the paper's gain 0.1 ln(factor) + 1."""

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all: float = 0.0
    truncate: bool = True
    gain: float | None = None


@spec
class LongRope:
    original: int
    factor: float
    short: tuple[float, ...]
    long: tuple[float, ...]
    gain: float | None = None


Scaling = LinearScaling | DynamicNTK | Llama3Scaling | Yarn | LongRope


@spec
class Axial:
    """Each of `axes` coordinates turns its own equal share of the angles (2-D pictures: EVA, DINOv3)."""

    axes: int = 2


@spec
class Sections:
    """M-RoPE: one frequency table, `sizes[a]` of its angles turned by coordinate a, in runs or interleaved."""

    sizes: tuple[int, ...]
    interleaved: bool = False


@spec
class Mixed:
    """Learned frequencies per layer and head over all `axes` coordinates at once (RoPE-ViT)."""

    axes: int = 2


@spec
class Rope:
    """Rotary positions. `dim` is the rotated width (None: the whole head), `layout` how the pairs lie in it;
    `frequency` multiplies every angle (2 pi where coordinates are fractions of a turn, as in DINOv3)."""

    theta: float = 10000.0
    dim: int | None = None
    layout: Literal["half", "interleaved"] = "half"
    frequency: float = 1.0
    scaling: Scaling | None = None
    axes: Axial | Sections | Mixed | None = None

    def __post_init__(self) -> None:
        require(self.theta > 0, "Rope.theta must be positive")
        require(not isinstance(self.axes, Mixed) or self.scaling is None, "learned mixed axes have no Rope.scaling")
        by_band = isinstance(self.scaling, DynamicNTK | Yarn | LongRope)
        require(not (isinstance(self.axes, Axial) and by_band), "axial rope scales by LinearScaling or Llama3Scaling")

    def check(self, head_dim: int) -> None:
        """Raises InputError unless the angles fit heads of this width."""
        width = self.dim or head_dim
        require(0 < width <= head_dim and width % 2 == 0,
                f"Rope.dim must be even and at most head_dim {head_dim}, not {width}")
        if isinstance(self.axes, Axial):
            require(width // 2 % self.axes.axes == 0, f"{width // 2} angles cannot be shared by {self.axes.axes} axes")
        if isinstance(self.axes, Sections):
            require(sum(self.axes.sizes) == width // 2, f"Sections.sizes must add up to {width // 2} angles")
        if isinstance(self.scaling, LongRope):
            counts = {len(self.scaling.short), len(self.scaling.long)}
            require(counts == {width // 2}, f"LongRope.short and long must hold {width // 2} factors each")


@spec
class Alibi:
    """A penalty that grows with distance, one slope a head."""


@spec
class Buckets:
    """T5's learned bias: one value per head and logarithmic distance bucket."""

    count: int = 32
    distance: int = 128
    two_sided: bool = True

    def __post_init__(self) -> None:
        near = self.count // (4 if self.two_sided else 2)
        require(0 < near < self.distance, f"{self.count} buckets do not reach a distance of {self.distance}")


@spec
class Window:
    """How far a token sees: `left` and `right` count positions beside its own (None: without limit), `chunk` cuts the
    axis into blocks that do not see each other. Causal is `Window(right=0)`; Mistral's window W is `left=W - 1`.
    `first`: so many positions at the beginning stay in window, in place of the oldest of a window, and as near as those
    were (attention sinks: Xiao et al., 2023, StreamingLLM)."""

    left: int | None = None
    right: int | None = None
    chunk: int | None = None
    first: int = 0

    def __post_init__(self) -> None:
        causal = self.left is not None and self.right == 0 and self.chunk is None
        require(self.first == 0 or (causal and 0 < self.first <= self.left),
                f"{self.first} positions that stay in sight need a causal window that is longer")
        for name in ("left", "right"):
            require(getattr(self, name) is None or getattr(self, name) >= 0, f"Window.{name} must not be negative")
        require(self.chunk is None or self.chunk > 0, "Window.chunk must be positive")


CAUSAL = Window(right=0)
EVERYWHERE = Window()
