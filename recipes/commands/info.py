"""`mm info`: what a checkpoint is, and what it costs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..common.command import argument
from .info_codec import codec_facts, codec_layout, codec_sentences
from .info_codec import count_parameters as codec_parameters
from .info_sound import count_parameters as sound_parameters
from .info_sound import hubert_facts, sound_sentences, whisper_facts
from .info_speech import count_parameters as speech_parameters
from .info_speech import speech_facts, speech_sentences
from .info_text import count_parameters as language_parameters
from .info_text import language_facts, language_sentences

if TYPE_CHECKING:
    from ...encoders.clip import CLIP
    from ...encoders.spec import Backbone, ViTSpec
    from ...encoders.vision.vit import ViT

PARTS = {  # the longest prefix of a parameter's name counts
    "image": "image embeddings", "image.stack": "image layers", "image.head": "image layers",
    "image.trunk": "image layers", "image.head.mlp": "projections",
    "text": "text embeddings", "text.stack": "text layers", "text.head": "text layers",
    "audio": "audio tower", "image.head.proj": "projections", "text.head.proj": "projections",
    "logit": "scale and bias"}


@dataclass(frozen=True, kw_only=True)
class Info:
    """Describe a checkpoint: family, parameters per part, memory, FLOPs per picture and text, preprocessing, tokenizer;
    of a language model its context and the memory of its cache; of a duplex model its streams; of a codec its rates and
    the memory of a stream.

    Args:
        model: a shipped model, a directory, a hub name, or a .gguf, llama2.c or Whisper .pt file.
        json: machine-readable, in plain numbers and bytes.
        table: print the name of every weight in the file beside its name here.
        allow_pickle: read .bin files that hold more than tensors, which can run code.
    """

    model: str = argument()
    json: bool = False
    table: bool = False
    allow_pickle: bool = False

    def run(self) -> None:
        if self.table:
            show_table(self.model, allow_pickle=self.allow_pickle)
            return
        report = describe(self.model, allow_pickle=self.allow_pickle)
        if self.json:
            print(json.dumps(report, indent=2, ensure_ascii=False))
        else:
            show(report)


def describe(name: str, *, allow_pickle: bool = False) -> dict[str, Any]:
    """The facts about a checkpoint: counts, bytes, FLOPs (two per multiply-add), settings. The whole file is read, so
    that a broken one is an InputError."""
    from mm.checkpoint.pretrained import load

    model = load(name, allow_pickle=allow_pickle)
    count, facts = READERS.get(model.kind, (language_parameters, language_facts))
    counts = count(model)
    total = sum(counts.values())
    layout = model.origin.layout
    if model.kind == "mimi":
        layout = codec_layout(model.origin.path, "kyutai" if model.origin.path.is_file() else layout)
    about = {"model": str(name), "family": model.families.names[model.kind], "layout": layout,
             "dtype": str(next(model.parameters()).dtype).split(".")[1], "parameters": counts | {"total": total},
             "bytes": {"float32": 4 * total, "bfloat16": 2 * total}}
    return about | facts(model)


def show_table(name: str, *, allow_pickle: bool = False) -> None:
    """Print a line per weight: its name in the file, its name here, its shape, and how it changes on the way."""
    from mm.checkpoint.door import find

    opened = find(name).open(allow_pickle)
    for theirs, ours, change in opened.table.rows(opened.weights.shapes):
        shape = " x ".join(map(str, opened.weights.shapes.get(theirs, ()))) or "one number"
        print(f"{theirs}  ->  {ours}  ({shape}{change})")


def tower_facts(model: CLIP | ViT) -> dict[str, Any]:
    from ...encoders.spec import out_dim

    if model.kind == "vit":
        told = {"image": image_facts(model.spec), "features": out_dim(model.spec), "classes": len(model.labels)}
    else:
        told = {"image": image_facts(model.spec.image), "text": text_facts(model), "features": model.spec.dim,
                "logit_scale": math.exp(model.logit_scale.item())}
    return told | {"preprocessing": model.preprocessing and asdict(model.preprocessing),
                   "flops": count_flops(model.to("meta").requires_grad_(False))}


def count_parameters(model: CLIP | ViT) -> dict[str, int]:
    counts = dict.fromkeys(dict.fromkeys(PARTS.values()), 0)
    above = "image." if model.kind == "vit" else ""
    for name, value in model.named_parameters():
        counts[PARTS[max(filter((above + name).startswith, PARTS), key=len)]] += value.numel()
    shown = {PARTS["audio"]} if model.kind == "clip" else set(counts)  # left out where there is nothing
    return {part: count for part, count in counts.items() if count or part not in shown}


READERS = {"duplex": (speech_parameters, speech_facts), "csm": (speech_parameters, speech_facts),
           "mimi": (codec_parameters, codec_facts), "clip": (count_parameters, tower_facts),
           "vit": (count_parameters, tower_facts), "whisper": (sound_parameters, whisper_facts),
           "hubert": (sound_parameters, hubert_facts)}  # by kind: what counts parameters by part, and the other facts


def count_flops(model: CLIP | ViT) -> dict[str, int]:
    """FLOPs of one picture of the model's own size, and of one text that fills the context, of a model on "meta"."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    image = model.spec if model.kind == "vit" else model.spec.image
    encode_image = model.encode if model.kind == "vit" else model.encode_image
    calls = {"image": (encode_image, (image.channels, *image.image), None)}
    if model.kind == "clip":
        calls["text"] = model.encode_text, (model.spec.text.context,), torch.int64
    found = {}
    with torch.device("meta"), torch.no_grad():
        for kind, (encode, shape, dtype) in calls.items():
            with FlopCounterMode(display=False) as counter:
                encode(torch.zeros(1, *shape, dtype=dtype))
            found[kind] = counter.get_total_flops()
    return found


def image_facts(image: ViTSpec | Backbone) -> dict[str, Any]:
    from ...encoders.spec import Backbone

    if isinstance(image, Backbone):
        return {"size": list(image.image), "timm": image.name}
    across, down = image.patches.grid(*image.image)
    return {"size": list(image.image), "patch": list(image.patches.size),
            "tokens": across * down + image.cls + image.registers, **stack_facts(image.stack)}


def text_facts(clip: CLIP) -> dict[str, Any]:
    text, tokenizer = clip.spec.text, clip.tokenizer
    told = None if tokenizer is None else {"entries": tokenizer.vocab_size, "clean": tokenizer.clean,
                                           "start": tokenizer.bos_id, "end": tokenizer.eos_id, "pad": tokenizer.pad_id}
    return {"context": text.context, "vocabulary": text.vocab, "tokenizer": told, **stack_facts(text.stack)}


def stack_facts(stack: Any) -> dict[str, Any]:
    from mm.spec import attention

    return {"layers": len(stack.layers), "width": stack.dim, "heads": attention(stack.layers[0]).heads,
            "act": stack.layers[0].mlp.act}


def show(report: dict[str, Any]) -> None:
    """The report as tables for a person."""
    from rich.console import Console
    from rich.table import Table

    counts, facts = Table("part", "parameters", "share"), Table(show_header=False)
    for column in counts.columns[1:]:
        column.justify = "right"
    for part, count in report["parameters"].items():
        counts.add_row(part, f"{count:,}", f"{count / report['parameters']['total']:.1%}")
    ways = {"streams": speech_sentences, "codebooks": codec_sentences, "seconds": sound_sentences,
            "context": language_sentences}
    told = next((ways[key] for key in ways if key in report), sentences)
    for name, sentence in (memory(report) | told(report)).items():
        facts.add_row(name, sentence)
    console = Console(highlight=False)
    console.print(f"{report['model']}: {report['family']} in the {report['layout']} layout, {report['dtype']}",
                  markup=False, soft_wrap=True)
    console.print(counts, facts, sep="\n")


def memory(report: dict[str, Any]) -> dict[str, str]:
    return {"memory": ", ".join(f"{size / 1e6:,.1f} MB in {kind}" for kind, size in report["bytes"].items())}


def sentences(report: dict[str, Any]) -> dict[str, str]:
    image, text, work = report["image"], report.get("text"), report["flops"]
    told = {
        "work": ", ".join(f"{flops(count)} per {WORK[kind]}" for kind, count in work.items())
                + " (two per multiply-add)",
        "image tower": f"{side(image['size'])} pixels, timm's {image['timm']}" if "timm" in image else
                       f"{side(image['size'])} pixels in patches of {side(image['patch'])}, {image['tokens']} tokens, "
                       f"{tower(image)}"}
    if text is None:
        classes = f", {report['classes']} named classes" if report["classes"] else ""
        return told | {"features": f"{report['features']}{classes}", "preprocessing": pixels(report["preprocessing"])}
    token = text["tokenizer"]
    return told | {
        "text tower": f"context {text['context']}, vocabulary {text['vocabulary']:,}, {tower(text)}",
        "features": f"{report['features']}, cosines times {report['logit_scale']:.2f}",
        "preprocessing": pixels(report["preprocessing"]),
        "tokenizer": "none in its files" if token is None else f"{token['entries']:,} entries, cleaning "
                     f"{token['clean']}, start {token['start']}, end {token['end']}, padding {token['pad']}"}


WORK = {"image": "picture", "text": "text"}


def pixels(given: dict[str, Any] | None) -> str:
    """The preprocessing of pictures or sounds in words."""
    if given is None:
        return "none in its files"
    if "frames" in given:
        return f"{given['bins']} mel bins, {given['frames']} frames of sound at {given['rate']} Hz"
    size = (f"own aspect, at most {given['tokens']} patches of {given['patch']} pixels" if "tokens" in given else
            f"{given['resize']} to {side(given['edge'] or given['size'])}, crop {side(given['size'])}")
    return f"{size}, {given['interpolation']}, mean {numbers(given['mean'])}, std {numbers(given['std'])}"


def flops(count: int) -> str:
    for power, unit in ((12, "TFLOP"), (9, "GFLOP"), (6, "MFLOP")):
        if count >= 10**power:
            return f"{count / 10**power:.2f} {unit}"
    return f"{count:,} FLOP"


def side(pair: list[int]) -> str:
    return f"{pair[0]} x {pair[1]}"


def tower(facts: dict[str, Any]) -> str:
    return f"{facts['layers']} layers of width {facts['width']} with {facts['heads']} heads, {facts['act']}"


def numbers(values: list[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
