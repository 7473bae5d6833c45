"""Decoding with a language model: continuous batching, sampling, speculation, beam search, and the plain `generate`."""

from mm.lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {
    "Engine": "mm.decode.engine",
    **dict.fromkeys(("LanguageModel", "Prefix", "Request", "TextStream"), "mm.decode.requests"),
    **dict.fromkeys(("GREEDY", "Sampling"), "mm.decode.sampling"),
    **dict.fromkeys(("Ahead", "Draft", "PromptLookup", "Proposer"), "mm.decode.speculate"),
    **dict.fromkeys(("Beams", "beam_search"), "mm.decode.beam"),
    **dict.fromkeys(("GenerateOptions", "Output", "generate", "stream"), "mm.decode.generation")})
