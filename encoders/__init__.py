"""Pixels, words and sounds to vectors."""

from mm.lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {
    **dict.fromkeys(("CLIP", "TextTower", "open_model"), "mm.encoders.clip"),
    **dict.fromkeys(("Segment", "Settings", "Transcript", "transcribe"), "mm.encoders.audio.transcribe"),
    **dict.fromkeys(("LogMel", "Spectrogram", "read_sound"), "mm.encoders.audio.spectrogram"),
    **dict.fromkeys(("TEMPLATES", "classify", "zeroshot_classifier"), "mm.encoders.zeroshot"),
    **dict.fromkeys(("Preprocess", "read_image"), "mm.encoders.vision.image"),
    **dict.fromkeys(("Flex", "FlexPreprocess", "flex_batch"), "mm.encoders.vision.flex"),
    "Hubert": "mm.encoders.audio.hubert",
    "ViT": "mm.encoders.vision.vit",
    "Whisper": "mm.encoders.audio.whisper"})
