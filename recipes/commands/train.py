"""What `mm train` can train: for each task the job whose settings are the options, and what runs it."""

from __future__ import annotations

KINDS = {
    "clip": ("mm.recipes.clip.settings:ClipJob", "a CLIP from pairs of pictures and captions",
             "mm.recipes.clip.fit:fit"),
    "vit": ("mm.recipes.vit.settings:VitJob", "a classifier from pictures in classes, from scratch or from any ViT",
            "mm.recipes.vit.fit:fit"),
    "tokenizer": ("mm.recipes.lm.settings:TokenizerJob", "a byte-level BPE tokenizer from a corpus",
                  "mm.recipes.lm.tokenizer:fit"),
    "lm": ("mm.recipes.lm.settings:LmJob", "a language model on texts or conversations, from scratch or a checkpoint",
           "mm.recipes.lm.fit:fit"),
    "duplex": ("mm.recipes.duplex.settings:DuplexJob", "a duplex model on stereo conversations with aligned words",
               "mm.recipes.duplex.fit:fit"),
    "codec": ("mm.recipes.codec.settings:CodecJob", "a neural codec from sounds, from scratch or from a checkpoint",
              "mm.recipes.codec.fit:fit"),
}
