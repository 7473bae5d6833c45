"""`mm features`: a model's features of every picture in a folder, as a Lance table with a row per picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import PositiveInt

from mm.errors import InputError

from ..common.command import argument
from ..common.files import PictureFile, batches, read_ahead, read_bytes
from ..common.options import choose_device
from ..common.progress import Bar
from ..search.pictures import decode, walk

if TYPE_CHECKING:
    from torch import Tensor

    from ...encoders.clip import CLIP
    from ...encoders.vision.vit import ViT

TABLE = "features"
NUMBERS = ("size", "mtime_ns")
COMPACT = 256  # commits between two rounds of joining small files


@dataclass(frozen=True, kw_only=True)
class Features:
    """Write a vector, and feature maps of chosen layers, of every picture in a folder to a table. The same command
    again adds what is new or changed, also after it was killed.

    Args:
        folder: pictures, searched with the sub-folders.
        model: a ViT or CLIP: a shipped model, a directory or a hub name.
        to: the table, such as features.lance.
        layers: blocks whose maps are kept, from 0 or, from the end, from -1.
        batch: pictures per forward pass and commit.
        device: where the model runs, such as cpu or cuda:0; none is a GPU if there is one.
    """

    folder: str = argument()
    model: str
    to: Path
    layers: tuple[int, ...] = ()
    batch: PositiveInt = 32
    device: str | None = None

    def run(self) -> None:
        written, skipped, same = extract(self.folder, self.model, self.to, self.layers, self.batch, self.device)
        print(f"wrote {written}, unchanged {same}, skipped {skipped} (bad)")


def extract(folder: str, name: str, target: Path, layers: Sequence[int], batch: int, device: str | None
            ) -> tuple[int, int, int]:
    """(pictures written, unreadable, unchanged). Raises InputError for a table of another model or other layers."""
    import torch

    from mm.checkpoint.pretrained import load

    found = walk(folder)
    if not found.files:
        raise InputError(f"{folder} holds no pictures")
    model = load(name, torch.float32, choose_device(device), kinds=("clip", "vit"))
    encode = partial(encoded, model, layers)
    table = open_table(target.expanduser(), model, name, layers, encode)
    known = {row["path"]: (row["size"], row["mtime_ns"]) for row in
             table.search().select(["path", "size", "mtime_ns"]).limit(max(1, table.count_rows())).to_list()}
    fresh = [file for file in found.files if known.get(file.path) != (file.size, file.mtime_ns)]
    forget(table, set(known) - {file.path for file in found.files})
    read = partial(prepared, root=found.root, preprocess=model.preprocess)
    bad = len(found.unreadable)
    with Bar("features", len(fresh)) as bar:
        for path, reason in found.unreadable.items():
            bar.say(f"{path}: {reason}")
        for count, part in enumerate(batches(read_ahead(fresh, read), batch), 1):
            good = [(file, pixels) for file, pixels in part if not isinstance(pixels, InputError)]
            for _, error in (pair for pair in part if isinstance(pair[1], InputError)):
                bar.say(str(error))
            bad += len(part) - len(good)
            if good:
                add(table, [file for file, _ in good], encode([pixels for _, pixels in good]))
            if count % COMPACT == 0:
                table.optimize()
            bar.step(len(part))
    return len(fresh) - bad + len(found.unreadable), bad, len(found.files) - len(fresh)


def prepared(file: PictureFile, root: Path, preprocess: Callable[[Any], Tensor]) -> Tensor:
    path = root / file.path
    return preprocess(decode(read_bytes(path), str(path)))


def encoded(model: CLIP | ViT, layers: Sequence[int], pictures: Sequence[Tensor]) -> dict[str, Tensor]:
    """Columns of B rows: `vector`, a ViT's pooled tokens or a CLIP's image features as they are, and `layer_N`, maps
    (D, h, w) of every chosen block."""
    import torch

    tower = model if model.kind == "vit" else model.image
    pixels = model.collate(pictures).to(next(model.parameters()).device)
    with torch.inference_mode():
        vector = model.encode_image(pixels) if model.kind == "clip" else model.pool(model(pixels))
        if layers and not hasattr(tower, "maps"):
            raise InputError("feature maps need a vision transformer, and this model's tower is none")
        maps = tower(pixels, features=list(layers)) if layers else []
    columns = {f"layer_{layer}": x for layer, x in zip(layers, maps, strict=True)}
    return {"vector": vector.float().cpu()} | {name: x.float().cpu() for name, x in columns.items()}


def open_table(target: Path, model: CLIP | ViT, name: str, layers: Sequence[int], encode: Callable) -> Any:
    """The table there, checked, or a new one."""
    import lancedb
    import numpy as np

    if target.suffix != ".lance":
        raise InputError(f"{target} should end in .lance")
    facts = {"model": name, "fingerprint": model.fingerprint(), "layers": " ".join(map(str, layers))}
    if not any((target / f"{TABLE}.lance" / "_versions").glob("*.manifest")):
        if target.exists() and (target.is_file() or any(entry.name != f"{TABLE}.lance" for entry in target.iterdir())):
            raise InputError(f"{target} exists and is no table of features; give --to another name")
        example = encode([model.preprocess(np.zeros((64, 64, 3), np.uint8))])
        return lancedb.connect(target).create_table(TABLE, schema=schema_of(example, facts))
    table = lancedb.connect(target).open_table(TABLE)
    held = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    for key in ("fingerprint", "layers"):
        if held.get(key) != facts[key]:
            raise InputError(f"{target} holds features with {key} {held.get(key)!r} of the model {held.get('model')}, "
                             f"not {facts[key]!r}; give --to another name")
    return table


def schema_of(columns: dict[str, Tensor], facts: dict[str, str]) -> Any:
    """Fixed-size lists; `shape` in a column's metadata says how to fold a row."""
    import pyarrow as pa

    values = [pa.field(name, pa.list_(pa.float32(), x[0].numel()), metadata={"shape": " ".join(map(str, x.shape[1:]))})
              for name, x in columns.items()]
    own = [pa.field("path", pa.string(), nullable=False), *(pa.field(name, pa.int64()) for name in NUMBERS)]
    return pa.schema([*own, *values], metadata=facts)


def add(table: Any, files: Sequence[PictureFile], columns: dict[str, Tensor]) -> None:
    """One commit; rows of the same path are replaced."""
    import pyarrow as pa

    schema, data = table.schema, [pa.array([file.path for file in files])]
    data += [pa.array([getattr(file, name) for file in files], pa.int64()) for name in NUMBERS]
    for x in columns.values():
        data.append(pa.FixedSizeListArray.from_arrays(pa.array(x.flatten().numpy()), x[0].numel()))
    rows = pa.Table.from_arrays(data, schema=schema)
    table.merge_insert("path").when_matched_update_all().when_not_matched_insert_all().execute(rows)


def forget(table: Any, paths: set[str]) -> None:
    for path in sorted(paths):
        quoted = path.replace("'", "''")
        table.delete(f"path = '{quoted}'")
