"""Hugging Face data sets of sounds on disk: waves, classes, transcripts and parts of rows."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from d2v.data.open import check_data, guess_modality, open_data, open_labelled
from d2v.data.speech.transcripts import read_spoken
from d2v.data.types import DataError, Position
from tests.d2v.tiny_runs import tiny

arrow = pytest.importorskip("pyarrow")
KINDS = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS"}


def wave(number: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(number).standard_normal(8_000 + 800 * (number % 4))


def encoded(number: int, kind: str = "wav") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave(number), 16_000, format=kind.upper(), subtype=KINDS[kind])
    return file.getvalue()


def write(path: Path, values: list[bytes | None], **columns: Any) -> None:
    """Rows as the `datasets` library writes them."""
    names = ["dog", "wind"]
    features: dict[str, Any] = {"audio": {"_type": "Audio", "sampling_rate": 16_000}}
    features["label"] = {"_type": "ClassLabel", "names": names}
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    table = arrow.table(
        {
            "audio": arrow.array([{"bytes": value, "path": None} for value in values], kind),
            "label": arrow.array([i % 2 for i in range(len(values))], arrow.int64()),
            **{name: arrow.array(column) for name, column in columns.items()},
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def test_rows_give_what_files_give(tmp_path: Path) -> None:
    """The same steps, bit for bit, as from files in a folder, from several files of rows too."""
    numbers = range(12)
    for i in numbers:
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / f"{i:02}.wav").write_bytes(encoded(i))
    for shard, some in enumerate((numbers[:7], numbers[7:])):
        write(tmp_path / "rows" / "train" / f"data-{shard}.arrow", [encoded(i) for i in some])
    write(tmp_path / "rows" / "test" / "data-0.arrow", [encoded(3)])
    assert guess_modality(str(tmp_path / "rows")) == "audio"
    pipelines = [open_data(str(tmp_path / name), tiny("audio")) for name in ("rows", "files")]
    assert pickle.loads(pickle.dumps(pipelines[0].source)).read(4, None).shape == (8_000,)
    streams = [pipeline.micro_batches(Position(), 4) for pipeline in pipelines]
    for _ in range(4):
        (rows, *_), (files, *_) = (next(stream) for stream in streams)
        assert torch.equal(rows.source, files.source) and torch.equal(rows.ids, files.ids)


def test_classes_and_transcripts_of_rows(tmp_path: Path) -> None:
    values = [encoded(i, kind) for i in range(4) for kind in KINDS]
    for part, count in (("train", 12), ("validation", 4)):
        texts = [f"said {i}" for i in range(count)]
        write(tmp_path / part / "data-0.arrow", values[:count], sentence=texts)
    found = open_labelled(str(tmp_path), tiny("audio"))
    assert list(found.classes) == ["dog", "wind"] and [len(x) for x in found.splits.values()] == [12, 4]
    labels = torch.cat([labels for _, _, labels in found.splits["validation"].batches(3)])
    assert labels.tolist() == [0, 1, 0, 1]
    spoken = read_spoken(str(tmp_path), tiny("audio"), 16_000)
    assert {part: some.texts for part, some in spoken.items()} == {
        "train": [f"said {i}" for i in range(12)], "validation": [f"said {i}" for i in range(4)],
    }  # fmt: skip
    report = check_data(str(tmp_path), tiny("audio"))
    assert report.total == 12 and not report.unreadable and not report.refused


def test_broken_rows_are_named(tmp_path: Path) -> None:
    write(tmp_path / "x.arrow", [*map(encoded, range(9)), None, b"no sound", encoded(2)[:900]])
    report = check_data(str(tmp_path / "x.arrow"), tiny("audio"))
    rows = {name.rpartition(":")[2]: reason for name, reason in report.unreadable.items()}
    assert rows["9"] == "an empty row" and rows.keys() == {"9", "10", "11"} and not report.refused
    assert all(".sound" not in reason for reason in rows.values())
    with pytest.raises(DataError, match="no audio file has a transcript"):
        read_spoken(str(tmp_path / "x.arrow"), tiny("audio"), 16_000)
