"""One transformer block behind text, vision and audio."""

from mm.lazy import keep_old_names, lazy

__version__ = "0.1.0"
keep_old_names()

__getattr__, __dir__, __all__ = lazy(__name__, {
    "CSM": "mm.speech.csm",
    "DuplexLM": "mm.speech.duplex",
    "TextDecoder": "mm.text.decoder",
    "TextEncoder": "mm.text.encoder",
    "Transformer": "mm.nn.transformer",
    "Seq2Seq": "mm.text.seq2seq",
    "Sampling": "mm.decode.sampling",
    "load": "mm.checkpoint.pretrained",
    "InputError": "mm.errors",
})
