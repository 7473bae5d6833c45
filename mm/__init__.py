"""One transformer block behind text, vision and audio."""

from mm.lazy import lazy

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy(__name__, {
    "CSM": "mm.speech.csm",
    "DuplexLM": "mm.speech.duplex",
    "TextDecoder": "mm.text.decoder",
    "TextEncoder": "mm.text.encoder",
    "Transformer": "mm.nn.transformer",
    "Seq2Seq": "mm.text.seq2seq",
    "Sampling": "mm.decode.sampling",
    "InputError": "mm.errors",
})
