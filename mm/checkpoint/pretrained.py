"""The base of every model with files on disk: reading them, writing them, a card, a fingerprint; and `load`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import nn

from mm.checkpoint import files as checkpoint
from mm.checkpoint.door import Found, Hub, class_of, find
from mm.checkpoint.family import Extras, Families
from mm.checkpoint.files import SHARD_BYTES, Folder
from mm.errors import InputError
from mm.spec.schema import fingerprint
from mm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Origin:
    """The files that a model was read from: its name, its directory or file, the layout."""

    name: str
    path: Path
    layout: str

    @property
    def folder(self) -> Path:
        return self.path.parent if self.path.is_file() else self.path


class Pretrained(nn.Module):
    """A model of one `kind` with a `spec`; `preprocessing`, `tokenizer`, `labels` and `generation` are what its
    directory holds beside the weights, each None or empty where there is none. `origin` is where it was read, None for
    a model that was made here. `inside` names the kinds of model that hold one of this class, and under which name."""

    kind: ClassVar[str]
    families: ClassVar[Families]
    inside: ClassVar[Mapping[str, str]] = MappingProxyType({})
    spec: Any
    preprocessing: Any = None
    tokenizer: Tokenizer | None = None
    labels: tuple[str, ...] = ()
    generation: Mapping[str, Any] = MappingProxyType({})
    origin: Origin | None = None

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path, dtype: torch.dtype | None = None,
                        device: torch.device | str | None = None, *, revision: str | None = None,
                        token: str | bool | None = None, cache_dir: str | Path | None = None,
                        local_files_only: bool = False, allow_pickle: bool = False) -> Self:
        """A model in evaluation mode from the name of a shipped model, a directory, a file or a hub name, in any layout
        that is known. Arguments as of `load`. Raises InputError for a config that is not understood, for weights that
        contradict it and for a model of another kind."""
        hub = Hub(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        found = find(name_or_dir, (*cls.inside, cls.kind), hub)
        if found.kind == cls.kind:
            return cls.build(found, dtype, device, allow_pickle)
        whole = class_of(found.kind).build(found, dtype, device, allow_pickle)
        part = getattr(whole, cls.inside[found.kind])
        if not isinstance(part, cls):
            raise InputError(f"{name_or_dir}: its {cls.inside[found.kind]} tower is "
                             f"{getattr(part, 'title', type(part).__name__)}, not a {cls.__name__}")
        part.preprocessing, part.origin = whole.preprocessing, whole.origin
        return part

    @classmethod
    def build(cls, found: Found, dtype: torch.dtype | None, device: torch.device | str | None,
              allow_pickle: bool) -> Self:
        """Builds the model of files that were found. Raises InputError."""
        opened = found.open(allow_pickle)
        model = checkpoint.load(lambda: cls(opened.spec), opened.weights, opened.table, dtype=dtype, device=device)
        model.preprocessing, model.tokenizer = opened.extras.preprocess, opened.extras.tokenizer
        model.labels, model.generation = opened.extras.labels, opened.extras.generation
        path = found.place.path if isinstance(found.place, Folder) else found.place
        model.origin = Origin(found.name, path, found.family.layout if found.family else path.suffix[1:])
        model.check_files(found.name)
        return model.to(device).eval()  # also what no file holds

    def check_files(self, where: str) -> None:
        """Raises InputError where the files beside the weights do not fit them."""

    def save_pretrained(self, folder: str | Path, layout: str = "mm", *, shard_bytes: int = SHARD_BYTES,
                        card: bool = False, push_to_hub: str | None = None, token: str | None = None,
                        private: bool = False) -> None:
        """Write weights (in several files of at most `shard_bytes` where they are more), tokenizer, preprocessing and,
        last, the config. With `card`, or when the directory is pushed to the hub as the repository `push_to_hub`
        (owner/name), a README.md too. Raises InputError when there is no such layout for this kind of model, when it
        cannot hold this one, and with the hub's reason."""
        (family, config), folder = self.families.to_write(self.kind, layout, self.spec), Path(folder)
        if family.layout == "hf":
            config |= {"dtype": str(next(self.parameters()).dtype).removeprefix("torch.")}
        files = family.files(config, Extras(self.preprocessing, self.tokenizer, self.labels, self.generation))
        state = family.table(self.spec, ()).save(self.state_dict(), layout)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_weights(folder, state, family.weights[0], shard_bytes=shard_bytes)
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        self.write_beside(folder, layout)
        for name, content in files.items():
            checkpoint.write_json(folder / name, content)
        if card or push_to_hub:
            from mm.checkpoint.card import CARD, license_of, model_card, upload

            license = license_of(self.origin and self.origin.folder)
            title = push_to_hub or str(folder)
            (folder / CARD).write_text(model_card(self, type(self).__name__, layout, title, license), "utf-8")
        if push_to_hub:
            upload(folder, push_to_hub, token, private)

    def write_beside(self, folder: Path, layout: str) -> None:
        """Writes files that only this kind of model has."""

    def fingerprint(self) -> str:
        """Sixteen hex digits of the spec, the preprocessing and every weight: the same after saving and loading."""
        digest = hashlib.sha256(f"{fingerprint(self.spec)} {fingerprint(self.preprocessing)}".encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def load(name: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None, *,
         revision: str | None = None, token: str | bool | None = None, cache_dir: str | Path | None = None,
         local_files_only: bool = False, allow_pickle: bool = False, kinds: Sequence[str] = ()) -> Pretrained:
    """The model behind a name, of whatever kind, in evaluation mode.

    Args:
        name: of a shipped model (stories260k, emoji_clip, codec_small, duplex_small), a directory, a file that is a
            whole model (.gguf, llama2.c's .bin, OpenAI's Whisper .pt, Kyutai's .safetensors), owner/model on the hub.
        dtype: of the weights; None keeps that of the file.
        device: where the weights go; None is the CPU.
        revision: a branch, tag or commit of the hub repository.
        token: for repositories that are private or gated.
        cache_dir: where files from the hub are kept.
        local_files_only: do not ask the hub for files that are not there.
        allow_pickle: read torch files that hold more than tensors, which can run code.
        kinds: of models that the caller can use, such as clip and vit; all by default.

    Raises InputError for a name that means nothing, a config that is not understood, weights that contradict it.
    """
    hub = Hub(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    found = find(name, kinds, hub)
    return class_of(found.kind).build(found, dtype, device, allow_pickle)
