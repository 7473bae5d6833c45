"""One transformer block behind text, vision and audio."""

from mm.lazy import lazy

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy(__name__, {
    "CSM": "mm.csm",
    "DuplexLM": "mm.duplex",
    "TextDecoder": "mm.decoder",
    "TextEncoder": "mm.encoder",
    "Transformer": "mm.transformer",
    "Seq2Seq": "mm.seq2seq",
    "Sampling": "mm.sampling",
    "InputError": "mm.errors",
})
