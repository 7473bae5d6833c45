"""What `mm info` says about models that speak."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .info_text import stack_facts, tokenizer_facts

if TYPE_CHECKING:
    from mm.speech.csm import CSM
    from mm.speech.duplex import DuplexLM

PARTS = {"text": "embeddings", "codes": "embeddings", "stack": "temporal layers", "head": "head",
         "extra": "further heads", "conditions": "conditions", "depth": "depth layers",
         "depth.text": "depth embeddings", "depth.codes": "depth embeddings", "depth.up": "depth embeddings",
         "depth.input": "depth inputs and heads", "depth.head": "depth inputs and heads",
         "depth_input": "depth inputs and heads", "depth_head": "depth inputs and heads"}


def count_parameters(model: DuplexLM | CSM) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, value in model.named_parameters():
        part = PARTS[max((key for key in PARTS if name.startswith(key + ".")), key=len)]
        counts[part] = counts.get(part, 0) + value.numel()
    return counts


def speech_facts(model: DuplexLM | CSM) -> dict[str, Any]:
    """Streams and their delays in frames, sizes of both stacks, what a session holds, tokenizer."""
    import torch

    s = model.spec
    duplex = model.kind == "duplex"
    streams = {"own": s.own, "heard": s.heard, "delays": list(s.delays)} if duplex else {
        "own": s.depth.codebooks, "heard": 0, "delays": [0] * (1 + s.depth.codebooks)}
    state = model.init_state(1, **({"device": "meta"} if duplex and not s.conditioning else {}))
    caches = (state.stack if duplex else state).caches
    size = sum(value.nbytes for cache in caches for value in vars(cache).values() if isinstance(value, torch.Tensor))
    told = [] if not duplex or s.conditioning is None else [
        {"name": one.name, "into": one.into, "values": list(getattr(one.of, "values", ()))}
        for one in s.conditioning.conditions]
    return {"streams": streams, "codes": s.card, "vocabulary": s.text.vocab if duplex else s.text_vocab,
            "context": s.context, "temporal": stack_facts(s.stack), "conditions": told,
            "depth": None if s.depth is None else stack_facts(s.depth.stack) | {"sets": s.depth.sets},
            "session_bytes": size, "tokenizer": tokenizer_facts(model.tokenizer)}


def speech_sentences(report: dict[str, Any]) -> dict[str, str]:
    """The facts for a person."""
    def stack(facts: dict[str, Any]) -> str:
        heads = f"{facts['heads']} heads"
        heads += f" over {facts['kv_heads']} of keys" if facts["kv_heads"] != facts["heads"] else ""
        return f"{facts['layers']} layers of width {facts['width']}, {heads}"
    streams, depth, token = report["streams"], report["depth"], report["tokenizer"]
    return {
        "streams": f"text, {streams['own']} codebooks said, {streams['heard']} heard, the last known after "
                   f"{max(streams['delays'])} frames; {report['codes']:,} codes, {report['vocabulary']:,} tokens",
        "temporal stack": f"{stack(report['temporal'])}, {report['context']:,} frames remembered",
        "depth stack": "none" if depth is None else f"{stack(depth)}, {depth['sets']} sets of weights",
        "conditions": ", ".join(f"{one['name']} ({one['into']})" for one in report["conditions"]) or "none",
        "session": f"{report['session_bytes'] / 1e6:,.1f} MB of keys and values",
        "tokenizer": "none in its files" if token is None else f"{token['entries']:,} entries"}
