"""`mm bench NAME`: each benchmark measures ours and the peer in one process and prints the ratio."""

from __future__ import annotations

import importlib

from mm.errors import InputError

BENCHES = {
    "clip": ("mm.recipes.bench.clip:clip", "ViT-B/32 encode and training step against open_clip"),
    "vit": ("mm.recipes.bench.vit:vit", "ViT-B/16, EVA-02-B and DINOv3-B against timm"),
    "codec": ("mm.recipes.bench.codec:codec", "Mimi in streams and whole against moshi and transformers"),
    "duplex": ("mm.recipes.bench.duplex:duplex", "a step of a dialogue and of training against moshi, time and memory"),
    "talk": ("mm.recipes.bench.talk:talk", "how many people `mm talk` holds here: frames on time, latency, memory"),
    "dialogue": ("mm.recipes.bench.dialogue:dialogue",
                 "how a duplex model answers recorded people: right answers, delay, overlap, silence"),
    "codec-quality": ("mm.recipes.bench.codec_quality:codec_quality",
                      "what a codec does to speech it was not trained on, beside Opus at 6 kbit/s"),
    "whisper": ("mm.recipes.bench.whisper:whisper", "transcripts of clips against openai-whisper, and word error rate"),
    "decode": ("mm.recipes.bench.decode:decode", "a language model's tokens per second against transformers"),
    "perplexity": ("mm.recipes.bench.perplexity:perplexity", "what few bits of weights and caches cost a decoder"),
    "lm": ("mm.recipes.bench.lm_step:lm", "a training step of a language model against transformers, time and memory"),
    "loss": ("mm.recipes.bench.loss:loss", "contrastive losses in tiles against open_clip's, memory and time"),
    "gradcache": ("mm.recipes.bench.gradcache:gradcache", "a large batch in chunks against open_clip's accumulation"),
    "search": ("mm.recipes.bench.search:search", "a million vectors against an exact matrix product"),
    "attention": ("mm.recipes.bench.attention:attention",
                  "our Triton kernels against PyTorch's on a GPU; what they compile to without one"),
    "imports": ("mm.recipes.bench.imports:imports", "what `import mm` costs beside `import torch`"),
    "emojicross": ("mm.recipes.bench.emojicross:emojicross", "unseen styles and concepts beside non-neural floors"),
    "open_clip_emoji": ("mm.recipes.bench.open_clip_emoji:open_clip_emoji",
                        "our emoji recipe against open_clip's model and loss (half an hour)"),
}


def bench(argv: list[str]) -> int:
    """Exit status 1 when a case falls short of its threshold."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: mm bench NAME [--json FILE]\n")
        print("\n".join(f"  {name:<17}{text}" for name, (_, text) in BENCHES.items()))
        return 0
    if argv[0] not in BENCHES:
        raise InputError(f"there is no benchmark {argv[0]!r}; there are {', '.join(BENCHES)}")
    module, function = BENCHES[argv[0]][0].split(":")
    return getattr(importlib.import_module(module), function)(argv[1:])
