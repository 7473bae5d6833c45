"""What `mm info` says about codecs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .info_text import stack_facts

if TYPE_CHECKING:
    from ...codecs.mimi import Mimi

PARTS = {"encoder": "encoder convolutions", "encoder_stack": "encoder layers", "downsample": "resampling",
         "quantizer": "projections of codebooks", "upsample": "resampling", "decoder_stack": "decoder layers",
         "decoder": "decoder convolutions"}


def count_parameters(model: Mimi) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, value in model.named_parameters():
        part = PARTS[name.partition(".")[0]]
        counts[part] = counts.get(part, 0) + value.numel()
    entries = sum(value.numel() for name, value in model.named_buffers() if name.endswith(".sum"))
    return counts | {"entries of codebooks": entries}


def codec_facts(model: Mimi) -> dict[str, Any]:
    """Rates in Hz and bit/s, codebooks, sizes of the stacks, bytes of one stream's state, FLOPs per frame."""
    from mm.spec import attention
    from mm.tree import tensors

    s, q = model.spec, model.spec.quantizer
    layer = attention(s.encoder.layers[0])
    return {"rate": s.rate, "channels": s.seanet.channels, "frame": s.frame, "frame_rate": s.frame_rate,
            "codebooks": {"count": q.codebooks, "semantic": q.semantic, "size": q.size, "width": q.dim},
            "bits_per_second": (q.size - 1).bit_length() * s.frame_rate,  # of one codebook
            "stack": stack_facts(s.encoder) | {"remembers": (layer.window.left + 1) / s.frame_rate / s.stride},
            "stream_bytes": sum(value.nbytes for _, value in tensors(model.init_state(1, device="meta"))),
            "flops": count_flops(model.to("meta").requires_grad_(False))}


def count_flops(model: Mimi) -> dict[str, int]:
    """FLOPs of one frame in a stream, of a model on "meta"."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    s, found = model.spec, {}
    with torch.device("meta"), torch.no_grad():
        state = model.init_state(1)
        wave, codes = torch.zeros(1, s.seanet.channels, s.frame), torch.zeros(1, s.quantizer.codebooks, 1).long()
        for name, call, given in (("encode", model.encode, wave), ("decode", model.decode, codes)):
            with FlopCounterMode(display=False) as counter:
                call(given, state=state)
            found[name] = counter.get_total_flops()
    return found


def codec_layout(path: Path, config: str) -> str:
    """Which names the weights of a file or folder have, where a layout's config allows several."""
    from mm.checkpoint import files as checkpoint

    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    names = [name for file in files for name in checkpoint.open_files([file], False).shapes]
    if any(name.startswith("encoder.encoder_seanet.") for name in names):
        return "hf_halves"
    return "kyutai_memory" if any(".in_projs." in name for name in names) else config


def codec_sentences(report: dict[str, Any]) -> dict[str, str]:
    """The facts for a person."""
    books, stack, work = report["codebooks"], report["stack"], report["flops"]
    kbits = report["bits_per_second"] / 1000
    sides = "mono" if report["channels"] == 1 else f"{report['channels']} channels"
    return {
        "sound": f"{report['rate']:,} Hz, {sides}, {report['frame_rate']:g} frames a second of {report['frame']:,} "
                 "samples",
        "codebooks": f"{books['count']} of {books['size']:,} entries, the first {books['semantic']} semantic; "
                     f"{kbits:.4g} kbit/s each, {kbits * books['count']:.4g} in all",
        "stacks": f"{stack['layers']} layers of width {stack['width']} with {stack['heads']} heads on either side, "
                  f"{stack['remembers']:g} s remembered",
        "stream": f"{report['stream_bytes'] / 1e6:,.2f} MB of state",
        "work": f"{work['encode'] / 1e6:,.1f} MFLOP to encode a frame, {work['decode'] / 1e6:,.1f} to decode it"}
