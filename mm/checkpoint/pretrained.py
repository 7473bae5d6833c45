"""What every model with a directory on disk shares: reading it, writing it, a fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import nn

from mm.checkpoint import files as checkpoint
from mm.checkpoint.family import Extras, Families
from mm.checkpoint.files import SHARD_BYTES
from mm.spec.schema import fingerprint
from mm.tokenizer.tokenizer import Tokenizer


class Pretrained(nn.Module):
    """A model of one `kind` with a `spec`; `preprocessing`, `tokenizer`, `labels` and `generation` are what its
    directory holds beside the weights, each None or empty where there is none."""

    kind: ClassVar[str]
    families: ClassVar[Families]
    spec: Any
    preprocessing: Any = None
    tokenizer: Tokenizer | None = None
    labels: tuple[str, ...] = ()
    generation: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path, dtype: torch.dtype | None = None,
                        device: torch.device | str | None = None, *, allow_pickle: bool = False) -> Self:
        """A model in evaluation mode from a directory, a hub name or a file, in any layout that is known.

        `dtype` None keeps that of the file. `allow_pickle` reads torch files that hold more than tensors. Raises
        InputError for a config that is not understood and for weights that contradict it.
        """
        found = cls.families.open(name_or_dir, cls.kind, allow_pickle)
        model = checkpoint.load(lambda: cls(found.spec), found.weights, found.table, dtype=dtype, device=device)
        model.preprocessing, model.tokenizer = found.extras.preprocess, found.extras.tokenizer
        model.labels, model.generation = found.extras.labels, found.extras.generation
        model.check_files(str(name_or_dir))
        return model.to(device).eval()  # also what no file holds

    def check_files(self, where: str) -> None:
        """Whether what lies beside the weights fits them; raises InputError."""

    def save_pretrained(self, folder: str | Path, layout: str = "mm", *, shard_bytes: int = SHARD_BYTES) -> None:
        """Write weights (in several files of at most `shard_bytes` where they are more), tokenizer, preprocessing and,
        last, the config. Raises InputError when there is no such layout for this kind of model, or when it cannot hold
        this one."""
        (family, config), folder = self.families.to_write(self.kind, layout, self.spec), Path(folder)
        if family.layout == "hf":
            config |= {"dtype": str(next(self.parameters()).dtype).removeprefix("torch.")}
        files = family.files(config, Extras(self.preprocessing, self.tokenizer, self.labels, self.generation))
        state = family.table(self.spec, ()).save(self.state_dict(), layout)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_weights(folder, state, family.weights[0], shard_bytes=shard_bytes)
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        for name, content in files.items():
            checkpoint.write_json(folder / name, content)

    def fingerprint(self) -> str:
        """Sixteen hex digits of the spec, the preprocessing and every weight: the same after saving and loading."""
        digest = hashlib.sha256(f"{fingerprint(self.spec)} {fingerprint(self.preprocessing)}".encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


