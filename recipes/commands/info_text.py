"""What `mm info` says about language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm.checkpoint.pretrained import Pretrained
    from mm.spec import Layer, Stack
    from mm.text.decoder import TextDecoder
    from mm.tokenizer.tokenizer import Tokenizer

PARTS = {"embed": "embeddings", "stack": "layers", "head": "head", "pooling": "pooling",
         "ahead": "heads that look ahead"}


def count_parameters(model: Pretrained) -> dict[str, int]:
    """By part; an encoder-decoder's parts apart."""
    counts: dict[str, int] = {}
    for name, value in model.named_parameters():
        side, _, rest = name.partition(".")
        above = f"{side} " if side in ("encoder", "decoder") else ""
        part = above + PARTS[(rest if above else name).split(".")[0]]
        counts[part] = counts.get(part, 0) + value.numel()
    return counts


def language_facts(model: Pretrained) -> dict[str, Any]:
    """Context, vocabulary, sizes of the stack, cache, tokenizer."""
    reader = model.decoder if model.kind == "seq2seq" else model
    spec = reader.spec
    told = {"context": spec.context, "vocabulary": spec.embed.vocab, **stack_facts(spec.stack),
            "tokenizer": tokenizer_facts(model.tokenizer)}
    if idle := idle_parameters(reader):
        told["active"] = sum(value.numel() for value in model.parameters()) - idle
    return told if model.kind == "encoder" else told | {"cache": cache_facts(reader)}


def stack_facts(stack: Stack) -> dict[str, Any]:
    from mm.spec import attention

    first = attention(stack.layers[0])
    return {"layers": len(stack.layers), "width": stack.dim, "heads": first.heads, "kv_heads": first.kv_heads,
            "windows": sum(windowed(layer) for layer in stack.layers)}


def windowed(layer: Layer) -> bool:
    """Whether a layer remembers a bounded number of tokens."""
    from mm.spec import attention

    window = attention(layer).window
    return window.left is not None or window.chunk is not None


def idle_parameters(model: Pretrained) -> int:
    """Weights of the experts that a token does not choose."""
    from mm.nn.grouped import StackedLinear

    idle = 0
    for block in model.stack.blocks:
        held = [module for module in block.modules() if isinstance(module, StackedLinear)]
        count = sum(value.numel() for module in held for value in module.parameters())
        idle += count - count * block.layer.mlp.chosen // block.layer.mlp.experts if held else 0
    return idle


def cache_facts(model: TextDecoder) -> dict[str, int]:
    """Bytes of one row's keys and values in the model's dtype: what every token adds in layers without a window, what
    all take at the full context, and that in eight bits."""
    import torch

    size = next(model.parameters()).element_size()
    grows = sum(block.mixer.cached[0] * sum(block.mixer.cached[1:]) for block in model.stack.blocks
                if not windowed(block.layer))
    full, eight = (sum(value.nbytes for cache in model.init_state(1, cache=kind, device=torch.device("meta")).caches
                       for value in vars(cache).values()) for kind in ("full", "int8"))
    return {"per_token": grows * size, "at_context": full, "at_context_int8": eight}


def tokenizer_facts(tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    return None if tokenizer is None else {
        "entries": tokenizer.vocab_size, "start": tokenizer.bos_id, "end": tokenizer.eos_id, "pad": tokenizer.pad_id,
        "chat": bool(tokenizer.settings.get("chat_template"))}


def language_sentences(report: dict[str, Any]) -> dict[str, str]:
    """The facts for a person."""
    heads = f"{report['heads']} heads" + (
        f" over {report['kv_heads']} of keys" if report["kv_heads"] != report["heads"] else "")
    windows = f", {report['windows']} of them with a window" if report["windows"] else ""
    told = {"stack": f"{report['layers']} layers{windows}, width {report['width']}, {heads}",
            "context": f"{report['context']:,} tokens, vocabulary {report['vocabulary']:,}"}
    if "active" in report:
        told["active"] = f"{report['active']:,} parameters for each token"
    if "cache" in report:
        cache = report["cache"]
        told["cache"] = (f"{cache['per_token']:,} bytes per token, {cache['at_context'] / 1e6:,.1f} MB at the full "
                         f"context ({cache['at_context_int8'] / 1e6:,.1f} MB in 8 bits)")
    token = report["tokenizer"]
    told["tokenizer"] = "none in its files" if token is None else (
        f"{token['entries']:,} entries, start {token['start']}, end {token['end']}, padding {token['pad']}, "
        f"{'a' if token['chat'] else 'no'} chat template")
    return told
