"""`mm bench NAME`: each benchmark measures ours and the peer in one process and prints the ratio."""

from __future__ import annotations

BENCHES = {
    "clip": ("mm.recipes.bench.clip:Clip", "ViT-B/32 encode and training step against open_clip"),
    "vit": ("mm.recipes.bench.vit:Vit", "ViT-B/16, EVA-02-B and DINOv3-B against timm"),
    "codec": ("mm.recipes.bench.codec:Codec", "Mimi in streams and whole against moshi and transformers"),
    "duplex": ("mm.recipes.bench.duplex:Duplex", "a step of a dialogue and of training against moshi, time and memory"),
    "talk": ("mm.recipes.bench.talk:Talk", "how many people `mm talk` holds here: frames on time, latency, memory"),
    "dialogue": ("mm.recipes.bench.dialogue:Dialogues",
                 "how a duplex model answers recorded people: right answers, delay, overlap, silence"),
    "codec-quality": ("mm.recipes.bench.codec_quality:CodecQuality",
                      "what a codec does to speech it was not trained on, beside Opus at 6 kbit/s"),
    "whisper": ("mm.recipes.bench.whisper:Whisper", "transcripts of clips against openai-whisper, and word error rate"),
    "decode": ("mm.recipes.bench.decode:Decode", "a language model's tokens per second against transformers"),
    "perplexity": ("mm.recipes.bench.perplexity:Perplexity", "what few bits of weights and caches cost a decoder"),
    "lm": ("mm.recipes.bench.lm_step:Lm", "a training step of a language model against transformers, time and memory"),
    "loss": ("mm.recipes.bench.loss:LossBench", "contrastive losses in tiles against open_clip's, memory and time"),
    "gradcache": ("mm.recipes.bench.gradcache:Gradcache", "a large batch in chunks against open_clip's accumulation"),
    "search": ("mm.recipes.bench.search:Search", "a million vectors against an exact matrix product"),
    "attention": ("mm.recipes.bench.attention:Attention",
                  "our Triton kernels against PyTorch's on a GPU; what they compile to without one"),
    "imports": ("mm.recipes.bench.imports:Imports", "what `import mm` costs beside `import torch`"),
    "emojicross": ("mm.recipes.bench.emojicross:Emojicross", "unseen styles and concepts beside non-neural floors"),
    "open_clip_emoji": ("mm.recipes.bench.open_clip_emoji:OpenClipEmoji",
                        "our emoji recipe against open_clip's model and loss (half an hour)"),
}
