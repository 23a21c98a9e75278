"""Rows of Hugging Face data sets on disk, each by its number: the .arrow files of `save_to_disk`, and
.parquet files as the hub keeps them.

Arrow files are mapped into memory and read where they lie. Parquet has no access to a single row, so each of
its files is unpacked once, the columns that are read alone, into the cache. Pictures and sounds are taken as
they were encoded. Order, parts and what is drawn are ours, as for files in folders.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..config.fronts import Modality
from .cache import default_cache
from .types import DataError, Report, Unreadable
from .walk import suffix_of

SUFFIXES = (".arrow", ".parquet")
BATCH = 64
"""rows unpacked at a time"""
KINDS: dict[str, Modality] = {"Image": "image", "Audio": "audio"}
"""type of a column, as the `datasets` library names it -> of what samples are"""


class Rows:
    """Some columns of the rows of several files. Picklable: each process maps the files itself."""

    def __init__(self, files: Sequence[Path], kind: str, label: str, texts: Sequence[str] = ()) -> None:
        """kind: of the feature that is read, Image or Audio. label: the column of classes, if there is one.
        texts: columns of transcripts, of which the first that is there is read.

        Raises DataError for files that cannot be read, and where it is not clear which column is meant.
        """
        self.files, self.label = list(files), None
        schemas = [_schema(file) for file in self.files]
        self.features = _features(schemas[0])
        self.value = _column(self.features, schemas[0].names, kind, files[0])
        for file, schema in zip(files, schemas, strict=True):
            if self.value not in schema.names:
                raise DataError(f"data: {file} has no column {self.value!r}, which {files[0]} has")
        self.unlabelled, self.label = _label(self.features, schemas[0].names, label, files[0])
        self.text = next((name for name in texts if name in schemas[0].names), None)
        columns = [name for name in dict.fromkeys((self.value, self.label, self.text)) if name is not None]
        self.mapped = [_as_arrow(file, columns) for file in self.files]
        self._open()
        self.counts = [sum(len(batch) for batch in batches) for batches in self._batches]
        self.ends = list(accumulate(self.counts))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_batches", "_starts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        self._batches = [_mapped(file) for file in self.mapped]
        self._starts = [[0, *accumulate(len(batch) for batch in batches)] for batches in self._batches]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def _place(self, index: int) -> tuple[int, int]:
        file = bisect_right(self.ends, index)
        return file, index - (self.ends[file - 1] if file else 0)

    def name(self, index: int) -> str:
        """File and row, from 0."""
        file, row = self._place(index)
        return f"{self.files[file]}:{row}"

    def encoded(self, index: int) -> bytes | Path | None:
        """The bytes of a picture or sound, or the file that a row names; None in an empty row."""
        file, row = self._place(index)
        batch = bisect_right(self._starts[file], row) - 1
        value = self._batches[file][batch].column(self.value)[row - self._starts[file][batch]].as_py()
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        return self.files[file].parent / value if isinstance(value, str) else value

    def texts(self) -> list[str | None]:
        """The transcript of every row; None where there is none."""
        if self.text is None:
            return [None] * len(self)
        batches = (batch for some in self._batches for batch in some)
        return [value for batch in batches for value in batch.column(self.text).to_pylist()]

    def labels(self) -> list[str] | None:
        """The class of every row; None where there are none, with the reason in `unlabelled`."""
        if self.label is None:
            return None
        names = (self.features.get(self.label) or {}).get("names")
        found: list[str] = []
        for batches in self._batches:
            for batch in batches:
                for value in batch.column(self.label).to_pylist():
                    if value is None or (names and not 0 <= value < len(names)):
                        self.unlabelled = f"row {len(found)} of {self.files[0].parent} has no {self.label}"
                        return None
                    found.append(names[value] if names else str(value))
        return found


def kind_of_rows(file: Path) -> Modality:
    """Whether rows are pictures, sounds, or else texts. Raises DataError."""
    schema = _schema(file)
    kinds = {feature.get("_type") for feature in _features(schema).values()}
    for kind, modality in KINDS.items():
        if kind in kinds or kind.lower() in schema.names:
            return modality
    return "text"


def batches_of(file: Path, choose: Callable[[Sequence[str]], list[str]]) -> Iterator[Any]:
    """The rows of a file, some at a time. choose: from all columns those that are read. Unreadable."""
    arrow = _pyarrow(file)
    try:
        if suffix_of(file.name) == ".parquet":
            from pyarrow import parquet

            with parquet.ParquetFile(file) as table:
                yield from table.iter_batches(4 * BATCH, columns=choose(table.schema_arrow.names))
            return
        with _reader(file) as reader:
            columns = choose(reader.schema.names)
            for batch in _each_batch(reader):
                for first in range(0, len(batch), 4 * BATCH):
                    yield batch.select(columns).slice(first, 4 * BATCH)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from None


def _each_batch(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        return (reader.get_batch(i) for i in range(reader.num_record_batches))
    return iter(reader)


def listed(root: Path, files: Sequence[str], report: Report) -> list[str]:
    """The files that belong to the data set: `save_to_disk` lists them in state.json, beside which results of
    `map` may be left."""
    kept = []
    states: dict[str, set[str] | None] = {}
    for file in files:
        folder, name = os.path.split(file)
        if folder not in states:
            state = root / folder / "state.json"
            states[folder] = _listed_in(state) if state.is_file() else None
        known = states[folder]
        if known is None or name in known or suffix_of(name) != ".arrow":
            kept.append(file)
        else:
            report.leave_out("not listed in the state.json beside it", [file])
    return kept


def _listed_in(state: Path) -> set[str]:
    try:
        return {str(file["filename"]) for file in json.loads(state.read_text("utf-8"))["_data_files"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"data: {state}: not what `save_to_disk` writes: {error!r}") from None


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f'data: {file}: {suffix_of(file.name)} needs pyarrow: pip install "d2vkern[texts]"'
        ) from None
    return pyarrow


def _schema(file: Path) -> Any:
    arrow = _pyarrow(file)
    try:
        if suffix_of(file.name) == ".parquet":
            from pyarrow import parquet

            return parquet.read_schema(file)
        return _reader(file).schema
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"data: {file}: not a readable {suffix_of(file.name)} file: {error}") from None


def _reader(file: Path) -> Any:
    arrow = _pyarrow(file)
    source = arrow.memory_map(str(file))
    magic = source.read(6)
    source.seek(0)
    return arrow.ipc.open_file(source) if magic == b"ARROW1" else arrow.ipc.open_stream(source)


def _mapped(file: Path) -> list[Any]:
    arrow = _pyarrow(file)
    try:
        return _reader(file).read_all().to_batches()
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"data: {file}: damaged: {error}") from None


def _as_arrow(file: Path, columns: list[str]) -> Path:
    """The file itself, or of a .parquet its columns as an arrow file in the cache."""
    if suffix_of(file.name) != ".parquet":
        return file
    arrow = _pyarrow(file)
    from pyarrow import parquet

    stat = file.stat()
    key = json.dumps([str(file.resolve()), stat.st_size, stat.st_mtime_ns, columns])
    made = default_cache() / "arrow" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.arrow"
    if made.is_file():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    handle, making = tempfile.mkstemp(dir=made.parent, suffix=".making")
    os.close(handle)
    try:
        opened = parquet.ParquetFile(file)
        schema = arrow.schema([opened.schema_arrow.field(name) for name in columns])
        with arrow.OSFile(making, "wb") as out, arrow.ipc.new_stream(out, schema) as writer:
            for batch in opened.iter_batches(BATCH, columns=columns):
                writer.write_batch(batch.select(columns))
        os.replace(making, made)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"data: {file}: damaged, or no room to unpack it in {made.parent}: {error}") from None
    finally:
        Path(making).unlink(missing_ok=True)
    return made


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What the `datasets` library says of each column, with its "_type"; empty for other programs' files."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, dict)}


def _column(features: dict[str, dict[str, Any]], names: Sequence[str], kind: str, file: Path) -> str:
    found = [name for name, feature in features.items() if feature.get("_type") == kind and name in names]
    found = found or [name for name in (kind.lower(), "bytes", "file", "path") if name in names][:1]
    if len(found) != 1:
        raise DataError(
            f"data: {file}: {'several columns' if found else 'no column'} of type {kind}: "
            f"{', '.join(found or names)}"
        )
    return found[0]


def _label(
    features: dict[str, dict[str, Any]], names: Sequence[str], label: str, file: Path
) -> tuple[str, str | None]:
    """Why there are no labels, or the column that holds them."""
    if label in names:
        return "", label
    found = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    if len(found) == 1:
        return "", found[0]
    several = f"several columns of classes ({', '.join(found)}): choose one by --data.label-column"
    return f"{file} has {several if found else f'no column {label}'}", None
