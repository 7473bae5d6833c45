"""Encoder-decoders of text as data."""

from __future__ import annotations

from mm.spec.encoders import EncoderSpec
from mm.spec.language import DecoderSpec
from mm.spec.schema import require, spec


@spec
class Seq2SeqSpec:
    """The decoder reads what the encoder made of a text, by cross-attention in every layer. Both look tokens up in the
    decoder's table. `start` are the ids that every answer begins with, `end` the one that ends it."""

    encoder: EncoderSpec
    decoder: DecoderSpec
    start: tuple[int, ...]
    end: int

    def __post_init__(self) -> None:
        check_memory(self.decoder, self.encoder.stack.dim)
        vocab, dim = self.decoder.embed.vocab, self.decoder.stack.dim
        require((self.encoder.embed.vocab, self.encoder.stack.dim) == (vocab, dim),
                "an encoder and a decoder that share a table of tokens have one vocabulary and one width")
        require(self.encoder.embed.scale == self.decoder.embed.scale, "the shared table of tokens has one Embed.scale")
        require(self.encoder.head is None and self.encoder.pooling is None, "the encoder has no head and no pooling")
        require(len(self.start) > 0 and all(0 <= i < vocab for i in (*self.start, self.end)),
                f"Seq2SeqSpec.start and end must be ids below {vocab}")


def check_memory(decoder: DecoderSpec, dim: int) -> None:
    """Raises InputError unless every layer of the decoder reads an encoder of this width."""
    reads = decoder.stack.memory_dim or decoder.stack.dim
    require(reads == dim, f"the decoder reads {reads} channels, the encoder makes {dim}")
    require(all(layer.cross is not None for layer in decoder.stack.layers),
            "every layer of a decoder that reads an encoder has cross-attention")
