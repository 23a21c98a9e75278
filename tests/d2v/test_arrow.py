"""Hugging Face data sets on disk: rows of pictures by their number, as files in folders are read."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d2v.data.images.parts import open_stores
from d2v.data.open import check_data, guess_modality, open_data, open_labelled
from d2v.data.types import DataError, Position, Report
from tests.d2v.tiny_runs import tiny

arrow = pytest.importorskip("pyarrow")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("D2V_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(value).integers(0, 255, (20, 24), np.uint8)).save(file, "PNG")
    return file.getvalue()


def table(numbers: Any, *, kind: str = "Image", names: tuple[str, ...] = ("cat", "dog"), **more: Any) -> Any:
    """Rows as the `datasets` library writes them: pictures, numbers of classes, their types beside."""
    features = {"picture": {"_type": kind}, "animal": {"_type": "ClassLabel", "names": list(names)}}
    columns = {
        "picture": arrow.array(
            [{"bytes": None if i is None else png(i), "path": None} for i in numbers],
            arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())]),
        ),
        "animal": arrow.array([None if i is None else i % len(names) for i in numbers], arrow.int64()),
        **more,
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return arrow.table(columns).replace_schema_metadata(metadata)


def write(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        from pyarrow import parquet

        parquet.write_table(rows, path, row_group_size=5)
    else:
        with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_stream(file, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=3)
    return path


def saved(root: Path, parts: dict[str, list[range]]) -> Path:
    """As `DatasetDict.save_to_disk` leaves it, with a result of `map` beside the first part."""
    for part, shards in parts.items():
        files = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
        for file, numbers in zip(files, shards, strict=True):
            write(root / part / file, table(numbers))
        (root / part / "state.json").write_text(json.dumps({"_data_files": [{"filename": f} for f in files]}))
    write(root / next(iter(parts)) / "cache-0123.arrow", table(range(90, 99)))
    (root / "dataset_dict.json").write_text(json.dumps({"splits": list(parts)}))
    return root


def test_saved_parts_and_classes(tmp_path: Path) -> None:
    root = saved(tmp_path / "set", {"train": [range(7), range(7, 12)], "validation": [range(4)]})
    assert guess_modality(str(root)) == "image"
    report = Report(str(root), 0)
    stores = open_stores(root, report)
    assert {part: len(store) for part, store in stores.items()} == {"train": 12, "validation": 4}
    assert report.left_out == {"not listed in the state.json beside it": ["train/cache-0123.arrow"]}
    copied = pickle.loads(pickle.dumps(stores["train"]))
    for store in (stores["train"], copied):
        for i in (11, 0, 6, 7, 3):
            assert np.array_equal(store.load(i), Image.open(io.BytesIO(png(i))))
    assert stores["train"].name(8) == f"{root}/train/data-00001-of-00002.arrow:1"
    found = open_labelled(str(root), tiny("image"))
    assert list(found.classes) == ["cat", "dog"]
    labels = torch.cat([labels for _, _, labels in found.splits["validation"].batches(3)])
    assert labels.tolist() == [0, 1, 0, 1]
    whole = open_data(str(root), tiny("image"), purpose="eval")
    assert whole.report.total == 16


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_rows_give_what_files_give(kind: str, tmp_path: Path, cache: Path) -> None:
    """The same steps, bit for bit, from rows and from files in folders."""
    names = [f"{number:02}" for number in range(20)]
    write(tmp_path / "set" / "data" / f"train-00000-of-00001.{kind}", table(range(20)))
    write(tmp_path / "set" / "data" / f"test-00000-of-00001.{kind}", table(range(3)))
    for number, name in enumerate(names):
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / f"{name}.png").write_bytes(png(number))
    streams = [
        open_data(str(tmp_path / place), tiny("image")).micro_batches(Position(), 8)
        for place in ("set", "files")
    ]
    for _ in range(5):
        (rows,), (files,) = (next(stream) for stream in streams)
        assert torch.equal(rows.source, files.source) and torch.equal(rows.ids, files.ids)
    assert len(list(cache.rglob("*.arrow"))) == (1 if kind == "parquet" else 0) * 2
    if kind == "parquet":
        unpacked = {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")}
        open_data(str(tmp_path / "set"), tiny("image"))
        assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")} == unpacked


def test_empty_rows_are_unreadable_and_rows_may_name_files(tmp_path: Path) -> None:
    rows = table([*range(9), None])
    write(tmp_path / "x.arrow", rows)
    report = check_data(str(tmp_path / "x.arrow"), tiny("image"))
    assert report.total == 10 and not report.refused
    assert list(report.unreadable) == [f"{tmp_path}/x.arrow:9"] and "empty" in str(report.unreadable)
    (tmp_path / "a.png").write_bytes(png(1))
    paths = {"bytes": None, "path": "a.png"}
    write(tmp_path / "paths" / ".." / "p.arrow", table([0], extra=arrow.array([1])).set_column(
        0, "picture", arrow.array([paths], rows.schema.field("picture").type)))  # fmt: skip
    (store,) = open_stores(tmp_path / "p.arrow", Report("", 0)).values()
    assert np.array_equal(store.load(0), Image.open(tmp_path / "a.png"))


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    def refused(path: Path, match: str) -> None:
        with pytest.raises(DataError, match=match):
            open_stores(path, Report("", 0))

    for name in ("x.arrow", "x.parquet"):
        (tmp_path / name).write_bytes(b"nothing of the kind" * 9)
        refused(tmp_path / name, f"{name}: not a readable .{name[2:]} file")
    whole = write(tmp_path / "cut.arrow", table(range(9))).read_bytes()
    (tmp_path / "cut.arrow").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.arrow", "cut.arrow: damaged: ")
    refused(write(tmp_path / "no.arrow", arrow.table({"words": ["a"]})), "no column of type Image: words")
    two = table(range(3))
    two = two.append_column("other", two.column("picture"))
    features = {"picture": {"_type": "Image"}, "other": {"_type": "Image"}}
    two = two.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    refused(write(tmp_path / "two.arrow", two), "several columns of type Image: picture, other")
    write(tmp_path / "differ" / "a.arrow", table(range(3)))
    write(tmp_path / "differ" / "b.arrow", table(range(3)).drop_columns(["picture"]))
    refused(tmp_path / "differ", "b.arrow has no column 'picture'")
    (tmp_path / "differ" / "state.json").write_text("{}")
    refused(tmp_path / "differ", "state.json: not what `save_to_disk` writes")


def test_classes_that_are_not_clear_are_no_classes(tmp_path: Path) -> None:
    cfg = tiny("image")
    write(tmp_path / "x.arrow", table([0, 1, None]))
    with pytest.raises(DataError, match="labels missing: .* row 2 of .* has no animal"):
        open_labelled(str(tmp_path / "x.arrow"), cfg)
    rows = table(range(12), shade=arrow.array(["dark", "light"] * 6))
    write(tmp_path / "y.arrow", rows)
    assert list(open_labelled(str(tmp_path / "y.arrow"), cfg).classes) == ["cat", "dog"]
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, label_column="shade"))
    assert list(open_labelled(str(tmp_path / "y.arrow"), cfg).classes) == ["dark", "light"]
