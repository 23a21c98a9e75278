"""Reads files of `torch.save` without running anything they say.

A `.pt` file is a pickle, and a pickle may name any function to be called on load. Here a name is
either a plain container, a tensor (rebuilt by bounds-checked code of ours), or one that the
original's checkpoints hold (OmegaConf's tree, fairseq's classes, numpy's scalars), each replaced by
an inert object that only remembers what it was given. Every other name is refused.
Nothing is imported, and tensors are read from disk one by one when asked for, so the optimizer
state of a 5 GB file costs nothing.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import reprlib
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

from ..config.toml import CheckpointError

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

_INERT = frozenset((
    *(f"builtins.{name}" for name in (
        "int", "long", "float", "bool", "str", "unicode", "bytes", "tuple", "complex", "object", "type",
    )),
    *map(str, _STORAGES.values()),
    "torch.Size", "torch.device", "torch.Tensor", "torch.nn.parameter.Parameter", "_codecs.encode",
    "argparse.Namespace", "types.GenericAlias", "types.UnionType",
))  # fmt: skip
"""global names that become inert objects"""

_INERT_PATTERN = re.compile(r"(omegaconf|typing|numpy|fairseq|fairseq_cli|examples|data2vec)(\.\w+)+")
"""packages all of whose names do: a structured config mentions its dataclasses, enums and annotations, the
state of a task its dictionaries, meters numpy's scalars (`common.user_dir` imports examples/data2vec as
data2vec too)"""


LARGEST = 100_000
"""values of a tuple, and of a config: with everything in it, counted as often as it is held"""


class Inert:
    """Stands for an object of a class that was named but never imported."""

    name: ClassVar[str]
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Inert:
        made = object.__new__(cls)
        made.args = args
        made.state = None
        return made

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<{self.name}>"


@cache
def _stand_in(name: str) -> type[Inert]:
    return type(name, (Inert,), {"name": name})


class _Mapping(dict):
    """OrderedDict, less the attributes torch hangs on a state dict."""

    def __setstate__(self, state: Any) -> None:
        pass


class _DefaultMapping(dict):
    """defaultdict, less its factory."""

    def __init__(self, *_: Any) -> None:
        super().__init__()


_CONTAINERS: dict[str, type] = {
    "collections.OrderedDict": _Mapping,
    "collections.defaultdict": _DefaultMapping,
    **{f"builtins.{t.__name__}": t for t in (dict, list, set, frozenset)},
}


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class LazyTensor:
    """A view of a storage; `PtFile.tensor` reads it."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)


class _Unpickler(pickle._Unpickler):
    """The pure-Python unpickler: its memo is a dict, so a forged memo index cannot eat memory."""

    def __init__(self, file: IO[bytes], owner: PtFile) -> None:
        super().__init__(file, encoding="utf-8")
        self.owner = owner
        self._sizes: dict[int, int] = {}

    def _tuple(self, load: Callable[[_Unpickler], None]) -> None:
        """A tuple of tuples, each held twice, is short in a file but never done hashing as a key."""
        load(self)
        made = self.stack[-1]  # type: ignore[attr-defined]
        parts = (self._sizes.get(id(item), 1) for item in made if isinstance(item, tuple))
        self._sizes[id(made)] = size = len(made) + sum(parts)
        if size > LARGEST:
            raise CheckpointError(f"{self.owner.path}: a tuple in it has more than {LARGEST:,} values")

    dispatch: ClassVar[dict[int, Any]] = pickle._Unpickler.dispatch | {
        code[0]: lambda self, load=pickle._Unpickler.dispatch[code[0]]: self._tuple(load)
        for code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
    }

    def _refuse(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.owner.path}: refusing to call `{name}`: "
            "a checkpoint needs only tensors, plain containers and its config"
        )

    def find_class(self, module: str, name: str) -> Any:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full in _CONTAINERS:
            return _CONTAINERS[full]
        if full in _INERT or _INERT_PATTERN.fullmatch(full):
            return _stand_in(full)
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if full == "torch._utils._rebuild_tensor_v2":
            return self._tensor
        if full in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return self._parameter
        if full == "torch._tensor._rebuild_from_type_v2":
            return self._with_attributes
        if full in ("builtins.getattr", "operator.getitem", "_operator.getitem"):
            return self._member(full)
        raise self._refuse(full)

    def _member(self, full: str) -> Any:
        """Enum members (`getattr(Modality, "IMAGE")`) and typing generics: on stand-ins only."""

        def member(*args: Any) -> Inert:
            if len(args) != 2 or not (isinstance(args[0], type) and issubclass(args[0], Inert)):
                raise self._refuse(full)
            return args[0](args[1])

        return member

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _location, numel, *view = pid
        known = kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str)
        if not known or not isinstance(numel, int) or numel < 0 or any(view):
            raise CheckpointError(f"{self.owner.path}: unknown storage {reprlib.repr(pid)}")
        storage = Storage(key, dtype, numel)
        if self.owner.storages.setdefault(key, storage) != storage:
            raise CheckpointError(f"{self.owner.path}: storage {key} has two types or sizes")
        return storage

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> LazyTensor:
        """Stands for torch._utils._rebuild_tensor_v2; hooks and requires_grad are dropped."""
        numbers = [offset, *size, *stride]
        if not isinstance(storage, Storage) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            wrong = f"{reprlib.repr(storage)} with {reprlib.repr(numbers)}"
            raise CheckpointError(f"{self.owner.path}: tensor over {wrong} is malformed")
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        count = math.prod(size)
        if count > storage.numel or (count and last >= storage.numel):
            raise CheckpointError(
                f"{self.owner.path}: tensor of size {tuple(size)}, stride {tuple(stride)} at {offset} "
                f"reaches past the {storage.numel} values of storage {storage.key}"
            )
        return LazyTensor(storage, offset, tuple(size), tuple(stride))

    def _parameter(self, data: Any, *_: Any) -> Any:
        return data

    def _with_attributes(self, make: Any, _kind: Any, args: Any, _attributes: Any) -> Any:
        """Stands for torch._tensor._rebuild_from_type_v2: a tensor that had attributes, which are dropped."""
        if make not in (self._tensor, self._parameter):
            raise self._refuse("torch._tensor._rebuild_from_type_v2")
        return make(*args)


class PtFile:
    """An open file of `torch.save`, zip or the older stream; `root` is what was saved.

    Use as a context manager. Any damage, refusal or surprise raises `CheckpointError` naming the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.storages: dict[str, Storage] = {}
        self._read: dict[str, Tensor] = {}
        self._spans: dict[str, tuple[int, int]] = {}
        self._zip: zipfile.ZipFile | None = None
        try:
            self._file: io.BufferedReader = self.path.open("rb")
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror}") from error
        try:
            self.root = self._open_zip() if zipfile.is_zipfile(self._file) else self._open_stream()
        except CheckpointError:
            self.close()
            raise
        except Exception as error:  # damaged bytes can raise anything
            self.close()
            raise CheckpointError(f"{self.path}: damaged or not a checkpoint: {error!r}") from error

    def __enter__(self) -> PtFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._zip is not None:
            self._zip.close()
        self._file.close()

    def _open_zip(self) -> Any:
        self._zip = zipfile.ZipFile(self._file)
        names = self._zip.namelist()
        pickles = [n for n in names if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{self.path}: not a file of torch.save: {len(pickles)} entries data.pkl")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if self._zip.getinfo(pickles[0]).compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self.path}: {pickles[0]} is compressed, which torch.save never does")
        order = f"{self._prefix}byteorder"
        if order in names and self._zip.read(order) != b"little":
            raise CheckpointError(f"{self.path}: written on a big-endian machine")
        return _Unpickler(io.BytesIO(self._zip.read(pickles[0])), self).load()

    def _open_stream(self) -> Any:
        """The format before torch 1.6: magic, protocol, system, object, storage keys, storages."""
        self._file.seek(0)
        if self._file.peek(2)[:2] == b"PK":
            raise CheckpointError(f"{self.path}: truncated zip file")
        magic, protocol, _system, root, keys = (_Unpickler(self._file, self).load() for _ in range(5))
        if magic != 0x1950A86A20F9469CFC6C or protocol != 1001:
            raise CheckpointError(f"{self.path}: not a file of torch.save")
        end = self.path.stat().st_size
        for key in keys:
            (numel,) = struct.unpack("<q", self._file.read(8))
            storage = self.storages[key]
            start, size = self._file.tell(), numel * storage.dtype.itemsize
            if numel != storage.numel or start + size > end:
                raise CheckpointError(f"{self.path}: storage {key} is truncated")
            self._spans[key] = (start, size)
            self._file.seek(start + size)
        return root

    def _bytes(self, storage: Storage) -> bytearray:
        size = storage.numel * storage.dtype.itemsize
        if self._zip is None:
            buffer = bytearray(size)
            self._file.seek(self._spans[storage.key][0])
            self._file.readinto(buffer)
            return buffer
        info = self._zip.getinfo(f"{self._prefix}data/{storage.key}")
        if info.file_size != size or info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{self.path}: storage {storage.key} has {info.file_size} bytes, its tensors need {size}"
            )
        buffer = bytearray(size)
        done = 0
        with self._zip.open(info) as entry:
            while block := entry.read(1 << 22):
                buffer[done : done + len(block)] = block
                done += len(block)
        if done != size:
            raise CheckpointError(f"{self.path}: storage {storage.key} is truncated")
        return buffer

    def tensor(self, lazy: LazyTensor) -> Tensor:
        """Read `lazy` from disk (checksum of the zip entry verified) as a contiguous CPU tensor."""
        storage = lazy.storage
        if storage.key not in self._read:
            try:
                data = self._bytes(storage)
            except (OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise CheckpointError(
                    f"{self.path}: storage {storage.key} cannot be read: {error}"
                ) from error
            self._read[storage.key] = (
                torch.frombuffer(data, dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)
            )
        return self._read[storage.key].as_strided(lazy.size, lazy.stride, lazy.offset).contiguous()
