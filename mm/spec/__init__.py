"""A model is data: frozen, keyword-only dataclasses describe each layer, and a stack is a tuple of layers.

Every spec checks itself when it is made and goes through JSON and back (`mm.spec.schema`).
"""

# ruff: noqa: F401
from mm.spec.duplex import Choice, Condition, Conditioning, CSMSpec, Depth, DuplexSpec, TextStream, Vectors
from mm.spec.encoders import Dense, EncoderSpec, SentencePooling
from mm.spec.language import DecoderSpec, Embed, LearnedTable, LMHead, Transform
from mm.spec.mixers import Attention, Differential, Latent, QKNorm, Temperature
from mm.spec.mlp import Clamp, Groups, Mlp, Moe, Router
from mm.spec.norms import L2Norm, LayerNorm, Norm, RMSNorm
from mm.spec.positions import (
    CAUSAL,
    EVERYWHERE,
    Alibi,
    Axial,
    Buckets,
    DynamicNTK,
    LinearScaling,
    Llama3Scaling,
    LongRope,
    Mixed,
    Rope,
    Scaling,
    Sections,
    Window,
    Yarn,
)
from mm.spec.seq2seq import Seq2SeqSpec, check_memory
from mm.spec.stack import Layer, Stack, attention, drop_path_ramp

Sight = Window  # its name in version 0.1
