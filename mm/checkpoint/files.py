"""Weights and configs on disk: read lazily, checked, and written whole or not at all."""

from __future__ import annotations

import functools
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mm.checkpoint.tables import IDENTITY, Shape, Table
from mm.errors import InputError
from mm.spec import schema

M = TypeVar("M", bound=nn.Module)
S = TypeVar("S")
CONFIG, WEIGHTS = "config.json", "model.safetensors"
LINE = 64  # bytes that a processor reads from memory at once
SHARD_BYTES = 5 * 2**30


# -------------------------------------------------------------------------------------------- reading
@dataclass(frozen=True)
class Folder(os.PathLike):
    """A checkpoint's directory whose JSON files are read once each."""

    path: Path
    held: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, folder: str | os.PathLike[str]) -> Folder:
        return folder if isinstance(folder, Folder) else cls(Path(folder))

    def json(self, name: str) -> dict[str, Any]:
        """The object in a file, empty where there is no such file. Raises InputError for a broken one."""
        if name not in self.held:
            self.held[name] = read_json(self.path / name) if (self.path / name).is_file() else {}
        return self.held[name]

    def describe(self, names: Sequence[str]) -> str:
        """Names the kinds of model that these configs are of, for messages."""
        seen = []
        for name in (name for name in names if (self.path / name).is_file()):
            config = self.json(name)
            kind = config.get("model_type") or config.get("family") or config.get("architecture") or "unknown"
            seen.append(f"{name} is of the kind {kind}")
        return " and ".join(seen) or f"there is no {' or '.join(names)}"

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint, by name; `read` loads one. `where` is the file, for messages. `dtype` is that of the
    file, where some are read in a wider one."""

    where: str
    shapes: Mapping[str, Shape]
    read: Callable[[str], Tensor]
    dtype: torch.dtype | None = None


def open_weights(folder: Path, names: Sequence[str] = (WEIGHTS,), *, allow_pickle: bool = False) -> Weights:
    """The first of these files that the folder holds, whole or in shards listed by `NAME.index.json`.

    `allow_pickle` admits `.bin`, `.pt` and `.pth` files that hold more than tensors: they can run code when read.
    Raises InputError for an absent, truncated or foreign file.
    """
    for name in names:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return open_files([folder / name], allow_pickle)
        if index.is_file():
            return open_files(shards(index), allow_pickle)
    raise InputError(f"{folder} holds none of {', '.join(names)}")


def shards(index: Path) -> list[Path]:
    """The files that a shard index names, which must lie beside it."""
    listing = read_json(index).get("weight_map")
    if not isinstance(listing, dict) or not listing:
        raise InputError(f"{index} has no weight_map")
    files = sorted({str(name) for name in listing.values()})
    for name in files:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise InputError(f"{index} lists the shard {name}, which is not beside it")
    return [index.parent / name for name in files]


def open_files(files: list[Path], allow_pickle: bool) -> Weights:
    shapes: dict[str, Shape] = {}
    readers: dict[str, Callable[[str], Tensor]] = {}
    for file in files:
        held, read = open_safetensors(file) if file.suffix == ".safetensors" else open_pickle(file, allow_pickle)
        shapes.update(held)
        readers.update(dict.fromkeys(held, read))
    return Weights(str(files[0]) if len(files) == 1 else str(files[0].parent), shapes, lambda name: readers[name](name))


def open_safetensors(file: Path) -> tuple[dict[str, Shape], Callable[[str], Tensor]]:
    try:
        handle = safe_open(file, "pt")
        return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}, handle.get_tensor  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is truncated or not a safetensors file ({error})") from None


def open_pickle(file: Path, allow_pickle: bool) -> tuple[dict[str, Shape], Callable[[str], Tensor]]:
    content = unpickle(file, allow_pickle)
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state:
        raise InputError(f"{file} holds a {type(state).__name__}, not weights by name")
    odd = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise InputError(f"{file} holds more than tensors: {odd} is a {type(state[odd]).__name__}")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    return {name: tuple(value.shape) for name, value in state.items()}, state.__getitem__


def unpickle(file: Path, allow_pickle: bool) -> Any:
    """The content of a torch file, tensors and plain containers only unless `allow_pickle`."""
    if is_archive(file):
        if not allow_pickle:
            raise InputError(f"{file} is a TorchScript archive, a program with weights inside: read it with "
                             "allow_pickle=True if you trust it, or convert it to safetensors")
        return dict(torch.jit.load(file, map_location="cpu").state_dict())
    try:
        return torch.load(file, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise InputError(f"{file} holds more than tensors, and reading it could run code: "
                             "allow_pickle=True reads it if you trust it") from None
        reason = "unknown content"
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0] or "it ends early"
    raise InputError(f"{file} is truncated or not a torch file ({reason})")


def is_archive(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError when the file is absent or holds something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} should hold a JSON object, not a {type(data).__name__}")
    return data


# -------------------------------------------------------------------------------------------- loading
def load(build: Callable[[], M], weights: Weights, table: Table = IDENTITY, *, dtype: torch.dtype | None = None,
         device: torch.device | str | None = None) -> M:
    """A module made without memory and then given its weights, one at a time, in this dtype on this device.

    `dtype` None keeps the dtype of the file, or the widest where it mixes several; what a module names in its `float32`
    is so in any case. Raises InputError for weights that are missing, unknown, wrongly shaped or not finite.
    """
    with torch.device("meta"), Unfilled():
        module = build()
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    exact = {f"{place}.{name}".lstrip(".") for place, part in module.named_modules()
             for name in getattr(part, "float32", ())}

    def read(name: str) -> Tensor:
        value = weights.read(name).to(device or "cpu")
        if value.is_floating_point() and not finite(value):
            raise InputError(f"{weights.where}: {name} holds values that are not finite")
        return value

    def cast(name: str, value: Tensor, dtype: torch.dtype | None = dtype or weights.dtype) -> Tensor:
        kind = torch.float32 if name in exact else dtype
        return value if kind is None or not value.is_floating_point() else value.to(kind)
    state = table.load(weights.shapes, read, wanted, weights.where, cast)
    floats = {value.dtype for name, value in state.items() if value.is_floating_point() and name not in exact}
    if len(floats) > 1:
        widest = functools.reduce(torch.promote_types, floats)
        state = {name: cast(name, value, widest) for name, value in state.items()}
    module.load_state_dict({name: aligned(own(value)) for name, value in state.items()}, assign=True)
    return module


def finite(value: Tensor) -> bool:
    """Returns whether no value is NaN or infinite; a finite sum shows it at the speed of reading."""
    return bool(torch.isfinite(value.sum(dtype=torch.float32))) or bool(torch.isfinite(value).all())


class Unfilled(TorchFunctionMode):
    """Makes modules without drawing initial values, which are about to be replaced."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def own(value: Tensor) -> Tensor:
    """The tensor, contiguous and alone in its memory."""
    alone = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
    return value if alone else value.clone(memory_format=torch.contiguous_format)


def aligned(value: Tensor) -> Tensor:
    """The tensor where products read it fastest: a file puts it anywhere, which costs them up to a fifth."""
    return value.clone() if value.device.type == "cpu" and value.data_ptr() % LINE else value


def pack(family: str, settings: Any) -> dict[str, Any]:
    """The config of this package's own layout."""
    return {"family": family, "spec": schema.to_data(settings)}


def unpack(config: Mapping[str, Any], kind: type[S], where: str) -> S:
    """The spec in such a config; raises InputError unless it is one of this kind."""
    settings = schema.from_data(config.get("spec"), where)
    if not isinstance(settings, kind):
        raise InputError(f"{where} should hold a {kind.__name__} under spec, not {settings!r:.80}")
    return settings


# -------------------------------------------------------------------------------------------- writing
@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes otherwise. Raises
    InputError where nothing can be written."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror})") from None
    mode = part.stat().st_mode  # what the umask grants, where safetensors grants the owner alone
    try:
        yield part
        part.chmod(mode)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    with replacing(path) as part:
        part.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(folder: Path, state: Mapping[str, Tensor], name: str = WEIGHTS, *,
                  shard_bytes: int = SHARD_BYTES) -> None:
    """Safetensors under `name`, or shards with an index when there are more than `shard_bytes`; older files of that
    name go once the new ones are complete."""
    parts, stem = split(state, shard_bytes), name.removesuffix(".safetensors")
    count = len(parts)
    files = [name] if count == 1 else [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    with ExitStack() as whole:
        for file, part in zip(files, parts, strict=True):
            path = whole.enter_context(replacing(folder / file))
            save_file({key: own(value.detach().cpu()) for key, value in part.items()}, path, {"format": "pt"})
    index = folder / f"{name}.index.json"
    if count > 1:
        where = {key: file for file, part in zip(files, parts, strict=True) for key in part}
        write_json(index, {"metadata": {"total_size": sum(x.nbytes for x in state.values())}, "weight_map": where})
    for old in [folder / name, index, *folder.glob(f"{stem}-*-of-*.safetensors")]:
        if old.name not in files and not (count > 1 and old == index):
            old.unlink(missing_ok=True)


def split(state: Mapping[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """Parts of at most `most` bytes, in order; a larger tensor has a part of its own."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in state.items():
        if parts[-1] and size + value.nbytes > most:
            parts.append({})
            size = 0
        parts[-1][name] = value
        size += value.nbytes
    return parts
