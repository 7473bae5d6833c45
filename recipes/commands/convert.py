"""`mm convert`: a checkpoint rewritten in another layout, and read back before it counts."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mm.errors import InputError

from ..common.command import argument

if TYPE_CHECKING:
    from torch import Tensor

    from mm.checkpoint.pretrained import Pretrained
    from mm.speech.duplex import DuplexLM

SHARD_BYTES = 5 * 2**30
OUTPUTS = {"decoder": "logits", "seq2seq": "logits", "encoder": "hidden states", "duplex": "logits", "csm": "logits",
           "mimi": "latents and waves", "whisper": "logits"}
CONFIGS = ("config.json", "open_clip_config.json")
SAMPLES = ("a photo of a dog", "It's 3.14 & “naïve” 🐱", "")


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Rewrite a checkpoint for another library: transformers and vLLM (hf), open_clip, timm, moshi (kyutai), or this
    package (mm). hf_halves and kyutai_memory name the weights of a codec as those packages do in memory.

    Args:
        source: a shipped model, a directory in any layout, a hub name, or a file that is a whole model.
        target: the directory to write.
        to: the layout of the target.
        force: replace the checkpoint that the target holds.
        shard_size: the most that one file of weights holds, such as 500MB.
        allow_pickle: read .bin files that hold more than tensors, which can run code.
    """

    source: str = argument()
    target: Path = argument()
    to: Literal["hf", "open_clip", "timm", "kyutai", "mm", "hf_halves", "kyutai_memory"]
    force: bool = False
    shard_size: str = "5GiB"
    allow_pickle: bool = False

    def run(self) -> None:
        rewrite(self.source, self.target, self.to, force=self.force, allow_pickle=self.allow_pickle,
                shard_bytes=size(self.shard_size))


def size(text: str) -> int:
    """Bytes: 500MB, 2GiB, or a plain number."""
    found = re.fullmatch(r"(\d+)\s*([KMG]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not found or not int(found[1]):
        raise InputError(f"--shard-size: {text!r} is not a size such as 500MB")
    return int(found[1]) * (1024 if found[3] else 1000) ** " KMG".index(found[2].upper() or " ")


def rewrite(source: str, target: Path, layout: str, *, force: bool = False, allow_pickle: bool = False,
            shard_bytes: int = SHARD_BYTES) -> None:
    """Source in `layout` under `target`, complete and read back, or not there at all; a duplex model with the codec in
    its directory.

    Raises InputError where the layout cannot hold the model or `target` is taken.
    """
    target = Path(os.path.abspath(target.expanduser()))
    check_target(source, target, force)
    from mm.checkpoint.pretrained import load

    model = load(source, allow_pickle=allow_pickle)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as room:
            fresh, old = Path(room) / "new", Path(room) / "old"
            model.save_pretrained(fresh, layout=layout, shard_bytes=shard_bytes)
            again = load(fresh)
            told = compare(model, again, layout)
            notes = differences(model, again)
            if model.kind == "duplex":
                notes += carry_codec(model, fresh, layout)
            if target.exists():
                os.rename(target, old)
            os.rename(fresh, target)
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror})") from None
    show(target, f"{layout} layout, {told}", notes)


def check_target(source: str, target: Path, force: bool) -> None:
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file, expected a directory to write")
    if Path(source).expanduser().exists() and Path(source).expanduser().resolve() == target.resolve():
        raise InputError(f"{target} is the checkpoint that is read; write to another directory")
    names = sorted(os.listdir(target)) if target.is_dir() else []
    if names and not force:
        raise InputError(f"{target} is not empty (it holds {names[0]}); --force replaces it")
    foreign = [name for name in names if (target / name).is_dir() and not holds_codec(target / name)]
    if names and (foreign or not any(name in names for name in CONFIGS)):
        raise InputError(f"{target} holds more than a checkpoint ({(foreign or names)[0]}) and is not replaced")


def holds_codec(folder: Path) -> bool:
    """Whether it is what a duplex model keeps beside it."""
    from ..talk.codec_of import CODEC

    return folder.name == CODEC and (folder / CONFIGS[0]).is_file()


def carry_codec(model: DuplexLM, target: Path, layout: str) -> list[str]:
    """Keeps the codec of the source's directory, ours or Kyutai's, beside the model in `target`, and says what others
    will not find."""
    from ...codecs.mimi import Mimi
    from ..talk.codec_of import CODEC, Note, kyutais

    home, note = model.origin.folder, Note.of(model)
    ours, theirs = home / CODEC, kyutais(home)
    if theirs is not None and layout == "kyutai" and not ours.is_dir():
        copy_files(home, target, theirs.name, model.generation.get("mimi_config_name"))
        return []
    if ours.is_dir() or theirs is not None:
        Mimi.from_pretrained(ours if ours.is_dir() else theirs).save_pretrained(target / CODEC)
        return [] if layout == "mm" else [f"codec: in the folder {CODEC}, where only this package looks for it"]
    name = model.generation.get("mimi_name") or (note.name if note is not None and layout != "mm" else None)
    return [f"codec: {name} does not come along; mm talk takes it with --codec"] if name else []


def copy_files(source: Path, target: Path, *names: str | None) -> None:
    """Those files that a folder holds."""
    for name in names:
        if name and (file := source / Path(name).name).is_file():
            shutil.copyfile(file, target / file.name)


def compare(model: Pretrained, again: Pretrained, layout: str) -> str:
    """What was found equal, in words: every tensor bit for bit, and what the model makes of a picture and a text up to
    rounding. Anything lost is an InputError."""
    family, _ = model.families.to_write(model.kind, layout, model.spec)
    before, after = (family.table(one.spec, ()).save(one.state_dict(), layout) for one in (model, again))
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after or not same(before[name], after[name]):
            raise InputError(f"nothing was written: {name} does not come back from the {layout} layout as it was")
    gap, what = output_gap(model, again), OUTPUTS.get(model.kind, "features")
    if not gap <= (1e-5 if next(model.parameters()).dtype.itemsize >= 4 else 1e-1):
        raise InputError(f"nothing was written: {what} from the {layout} layout are {gap:.1e} away")
    return f"{len(before)} tensors read back bit for bit, {what} {f'within {gap:.0e}' if gap else 'equal'}"


def same(before: Tensor, after: Tensor) -> bool:
    return before.dtype == after.dtype and before.shape == after.shape and bool((before == after).all())


def output_gap(model: Pretrained, again: Pretrained) -> float:
    """The largest difference of what the two make of the same input, relative to the largest value."""
    import torch

    with torch.inference_mode():
        pairs = zip(outputs(model), outputs(again), strict=True)
        return max(((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item() for a, b in pairs)


def outputs(model: Pretrained) -> tuple[Tensor, ...]:
    """What a model makes of one random picture and one random text, of random codes, or of noise."""
    import torch

    draw = torch.Generator().manual_seed(0)

    def ids(vocab: int, length: int) -> Tensor:
        return torch.randint(vocab, (1, length), generator=draw.manual_seed(1))
    spec = model.spec
    if model.kind == "seq2seq":
        return (model(*[ids(spec.decoder.embed.vocab, 24)] * 2),)
    if model.kind in ("decoder", "encoder"):
        return (model(ids(spec.embed.vocab, min(spec.context, 64))),)
    if model.kind in ("duplex", "csm"):
        streams = spec.codebooks if model.kind == "duplex" else spec.depth.codebooks
        codes = torch.cat([ids(spec.text.vocab if model.kind == "duplex" else spec.text_vocab, 16).unsqueeze(1),
                           ids(spec.card, 16 * streams).view(1, streams, 16)], 1)
        made = model(codes)
        return tuple(x.nan_to_num() for x in (made if model.kind == "duplex" else (made,)) if x.numel())
    if model.kind == "mimi":
        wave = torch.randn(1, spec.seanet.channels, 4 * spec.frame, generator=draw)
        return model.latents(wave), model.decode(ids(spec.quantizer.size, spec.quantizer.codebooks).unsqueeze(-1))
    if model.kind == "whisper":
        mel = torch.randn(1, spec.mels, 2 * spec.frames, generator=draw)
        return (model(mel, ids(spec.decoder.embed.vocab, 16)),)
    if model.kind == "hubert":
        return (model(torch.randn(1, 16000, generator=draw)),)
    image = spec if model.kind == "vit" else spec.image
    pixels = torch.randn(1, image.channels, *image.image, generator=draw)
    return (model.encode(pixels),) if model.kind == "vit" else model(pixels, ids(spec.text.vocab, spec.text.context))


def differences(model: Pretrained, again: Pretrained) -> list[str]:
    """What the new layout says otherwise: the preprocessing's finer points, the tokenizer's cleaning."""
    told = []
    if model.preprocessing is not None:
        after = vars(again.preprocessing)
        told += [f"preprocessing: {name} is {after[name]}, was {value}"
                 for name, value in vars(model.preprocessing).items() if value != after[name]]
    if (model.tokenizer is None) != (again.tokenizer is None):
        told.append("tokenizer: " + ("CLIP's own, the source had none" if model.tokenizer is None else "none"))
    elif model.tokenizer is not None:
        told += [f"tokenizer: {text!r} has other ids" for text in SAMPLES
                 if model.tokenizer.encode(text) != again.tokenizer.encode(text)]
    return told


def show(target: Path, told: str, notes: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("file", "size")
    table.columns[1].justify = "right"
    for path in sorted(path for path in target.rglob("*") if path.is_file()):
        table.add_row(str(path.relative_to(target)), f"{path.stat().st_size:,}")
    console = Console(highlight=False)
    console.print(f"{target}: {told}", markup=False, soft_wrap=True)
    console.print(table)
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
