"""What `mm info` says about models that hear: Whisper and HuBERT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .info_text import cache_facts, stack_facts, tokenizer_facts

if TYPE_CHECKING:
    from ...encoders.audio.hubert import Hubert
    from ...encoders.audio.whisper import Whisper

PARTS = {"encoder": "encoder", "decoder": "decoder", "decoder.embed": "embeddings", "stack": "layers",
         "positions": "positions"}
RATE = 100  # spectra a second of Whisper's


def count_parameters(model: Whisper | Hubert) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, value in model.named_parameters():
        part = PARTS[max((key for key in PARTS if name.startswith(key + ".")), key=len, default="")] if any(
            name.startswith(key + ".") for key in PARTS) else "convolutions"
        counts[part] = counts.get(part, 0) + value.numel()
    return counts


def whisper_facts(model: Whisper) -> dict[str, Any]:
    """Seconds of sound in a window, mel bins, both stacks, the decoder's context and cache, the tokenizer."""
    s = model.spec
    return {"seconds": 2 * s.frames / RATE, "mels": s.mels, "context": s.decoder.context,
            "vocabulary": s.decoder.embed.vocab, "encoder": stack_facts(s.encoder),
            "decoder": stack_facts(s.decoder.stack), "cache": cache_facts(model.decoder),
            "tokenizer": tokenizer_facts(model.tokenizer)}


def hubert_facts(model: Hubert) -> dict[str, Any]:
    """The length of a step in seconds, and the stack."""
    hop = 1
    for stride in model.spec.strides:
        hop *= stride
    rate = getattr(model.preprocessing, "rate", 16000)
    return {"seconds": hop / rate, "rate": rate, "encoder": stack_facts(model.spec.stack)}


def sound_sentences(report: dict[str, Any]) -> dict[str, str]:
    """The facts for a person."""
    def stack(facts: dict[str, Any]) -> str:
        return f"{facts['layers']} layers of width {facts['width']} with {facts['heads']} heads"
    if "mels" not in report:
        return {"sound": f"{report['rate']:,} Hz, a vector every {report['seconds'] * 1000:g} ms",
                "encoder": stack(report["encoder"])}
    token, cache = report["tokenizer"], report["cache"]
    return {"sound": f"windows of {report['seconds']:g} s, {report['mels']} mel bins",
            "encoder": stack(report["encoder"]), "decoder": stack(report["decoder"]),
            "context": f"{report['context']:,} tokens, vocabulary {report['vocabulary']:,}",
            "cache": f"{cache['at_context'] / 1e6:,.1f} MB at the full context",
            "tokenizer": "none in its files" if token is None else f"{token['entries']:,} entries"}
