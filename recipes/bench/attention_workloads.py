"""Workloads of `mm bench attention`: shapes and features, made on a GPU to run, on `meta` to compile, on a CPU to try.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mm.kernels.options import AttentionOptions, Bias
from mm.positions import rope
from mm.positions.absolute import AlibiBias, BucketBias
from mm.positions.visibility import At, along, packed
from mm.spec import CAUSAL, EVERYWHERE, Alibi, Buckets, Rope, Window

DOCUMENTS = 512  # tokens of a packed document, on average


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One call of attention. kv: key heads; keys: as many as queries by default. tokens: one plain `run`, packed
    `documents`, `ragged` rows with padding at the end, such rows that begin with a `prefix`, or the newest tokens over
    a `ring` of keys in any order. rope: of queries and keys, or of queries alone over a ring."""

    batch: int = 2
    heads: int = 16
    kv: int = 16
    length: int = 8192
    keys: int | None = None
    width: int = 128
    value_width: int | None = None
    tokens: Literal["run", "documents", "ragged", "prefix", "ring"] = "run"
    window: Window = EVERYWHERE
    softcap: float = 0.0
    sinks: bool = False
    bias: Alibi | Buckets | None = None
    rope: Rope | None = None
    dropout: float = 0.0

    @property
    def trained(self) -> bool:
        """Whether it has a backward pass: decoding has none."""
        return self.tokens != "ring"

    def tensors(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """q, k and v, which want gradients."""
        keys = self.keys or self.length
        shapes = ((self.batch, self.heads, self.length, self.width), (self.batch, self.kv, keys, self.width),
                  (self.batch, self.kv, keys, self.value_width or self.width))
        return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]

    def options(self, device: torch.device) -> AttentionOptions:
        q_at, k_at = self.places(device)
        rotation = None if self.rope is None else rope.rotation(q_at.position[:1], self.rope, self.width)
        sinks = torch.randn(self.heads, device=device, requires_grad=True) if self.sinks else None
        return AttentionOptions(q_at, k_at, self.window, self.width**-0.5, rotation,
                                None if self.tokens == "ring" else rotation, self.biased(device), sinks, self.softcap,
                                self.dropout)

    def places(self, device: torch.device) -> tuple[At, At]:
        keys = self.keys or self.length
        if self.tokens == "ring":
            newest = torch.arange(keys - self.length, keys, device=device).expand(self.batch, -1)
            return At(newest), At(torch.arange(keys, device=device).roll(keys // 3).expand(self.batch, -1))
        at = along(self.batch, self.length, device=device)
        if self.tokens in ("ragged", "prefix"):
            at = At(torch.where(at.position < self.length * 3 // 5, at.position, -1),
                    prefix=at.position < self.length // 4 if self.tokens == "prefix" else None)
        if self.tokens == "documents":
            at = packed(self.documents().to(device).expand(self.batch, -1))
        return at, at if self.keys is None else along(self.batch, keys, device=device)

    def documents(self) -> Tensor:
        """(length,) ids of documents of random lengths, always the same."""
        begins = torch.rand(self.length, generator=torch.Generator().manual_seed(0)) < 1 / DOCUMENTS
        return begins.cumsum(0)

    def biased(self, device: torch.device) -> Bias | None:
        if self.bias is None:
            return None
        kind = AlibiBias if isinstance(self.bias, Alibi) else BucketBias
        return kind(self.bias, self.heads).to(device)


def weights(options: AttentionOptions) -> list[Tensor]:
    """What is learned beside q, k and v."""
    return [x for x in (options.sinks, getattr(options.bias, "weight", None)) if x is not None]


GROUPED = dict(heads=32, kv=8)
SMALL = dict(length=333, heads=4, kv=2, width=64)
FEATURES = {
    "full": {}, "causal": dict(window=CAUSAL), "window": dict(window=Window(left=40, right=0)),
    "two-sided window": dict(window=Window(left=70, right=30)), "chunks": dict(window=Window(right=0, chunk=100)),
    "documents": dict(tokens="documents", window=CAUSAL, length=1500),
    "ragged rows": dict(tokens="ragged", window=CAUSAL),
    "a prefix": dict(tokens="prefix", window=CAUSAL), "more keys": dict(keys=517),
    "softcap and sinks": dict(softcap=5.0, sinks=True, window=CAUSAL), "T5 bias": dict(bias=Buckets()),
    "ALiBi": dict(bias=Alibi(), window=CAUSAL), "rotation": dict(rope=Rope(dim=32)),
    "rotation, interleaved": dict(rope=Rope(layout="interleaved")), "groups of 7": dict(heads=14, window=CAUSAL),
    **{f"heads {width}/{value}": dict(width=width, value_width=value, window=CAUSAL)
       for width, value in ((32, 32), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))},
    "few queries over many keys": dict(heads=16, length=3, keys=3000),
    "decoding": dict(tokens="ring", heads=16, length=1, keys=3000, window=CAUSAL, rope=Rope()),
}
CHECKED = {name: Workload(**{**SMALL, **more}) for name, more in FEATURES.items()}

COMPILED = {
    "head 64, full": Workload(width=64), "head 64, causal": Workload(width=64, window=CAUSAL),
    "head 80, causal": Workload(width=80, window=CAUSAL), "head 96, causal": Workload(width=96, window=CAUSAL),
    "head 128, full": Workload(), "head 128, causal": Workload(window=CAUSAL),
    "head 256, causal": Workload(width=256, window=CAUSAL),
    "head 192/128 (MLA), causal": Workload(width=192, value_width=128, window=CAUSAL),
    "head 128, window 1024, GQA 4:1": Workload(**GROUPED, window=Window(left=1023, right=0)),
    "head 64, documents, GQA 4:1": Workload(**GROUPED, width=64, tokens="documents", window=CAUSAL),
    "head 128, documents, GQA 4:1": Workload(**GROUPED, tokens="documents", window=CAUSAL),
    "head 128, ragged rows": Workload(tokens="ragged", window=CAUSAL),
    "head 128, a prefix": Workload(tokens="prefix", window=CAUSAL),
    "head 192/128 (MLA), documents": Workload(width=192, value_width=128, tokens="documents", window=CAUSAL),
    "head 128, softcap, sinks, causal": Workload(softcap=30.0, sinks=True, window=CAUSAL),
    "head 64, T5 bias": Workload(width=64, bias=Buckets()), "head 128, T5 bias": Workload(bias=Buckets()),
    "head 64, ALiBi": Workload(width=64, bias=Alibi(), window=CAUSAL),
    "head 64, dropout": Workload(width=64, dropout=0.1),
    "head 64, rotation on load (ViT)": Workload(width=64, length=197, rope=Rope()),
    "head 128, rotation on load": Workload(length=512, rope=Rope(), window=CAUSAL),
}
EXACT = ("head 64, causal", "head 128, causal", "head 256, causal", "head 128, documents, GQA 4:1", "head 64, T5 bias",
         "head 64, rotation on load (ViT)", "head 128, decode, GQA 8:1")  # those compiled for float32 as well
DECODED = {
    f"head {width}, decode, GQA 8:1": Workload(batch=1, heads=64, kv=8, length=1, keys=32768, width=width,
                                               tokens="ring", rope=Rope(), window=CAUSAL)
    for width in (64, 128, 256)}
