"""Tar shards of sounds: waves, classes, transcripts and parts; and tars within tars."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from d2v.data.open import check_data, guess_modality, open_data, open_labelled
from d2v.data.speech.transcripts import read_spoken
from d2v.data.types import DataError, Position, unused
from tests.d2v.test_tar import classes, opened, png, seen, shard
from tests.d2v.tiny_runs import tiny


def encoded(number: int, kind: str = "wav") -> bytes:
    wave = 0.1 * np.random.default_rng(number).standard_normal(8_000 + 800 * (number % 4))
    file = io.BytesIO()
    soundfile.write(file, wave, 16_000, format=kind.upper())
    return file.getvalue()


def test_tars_give_what_files_give(tmp_path: Path) -> None:
    """The same steps, bit for bit, as from the same files in folders, and a tar in a tar is read in place."""
    files = {f"{i:02}.wav": encoded(i) for i in range(12)}
    (tmp_path / "files").mkdir()
    for name, content in files.items():
        (tmp_path / "files" / name).write_bytes(content)
    (tmp_path / "tars").mkdir()
    items = list(files.items())
    shard(tmp_path / "inner.tar", **dict(items[7:]), **{"notes.txt": b"x"})
    shard(tmp_path / "tars" / "a.tar", **dict(items[:7]), **{"z.tar": (tmp_path / "inner.tar").read_bytes()})
    assert guess_modality(str(tmp_path / "tars")) == "audio"
    pipelines = [open_data(str(tmp_path / name), tiny("audio")) for name in ("tars", "files")]
    assert pickle.loads(pickle.dumps(pipelines[0].source)).read(11, None).shape == (10_400,)
    streams = [pipeline.micro_batches(Position(), 4) for pipeline in pipelines]
    for _ in range(4):
        (tars, *_), (folder, *_) = (next(stream) for stream in streams)
        assert torch.equal(tars.source, folder.source) and torch.equal(tars.ids, folder.ids)


def test_classes_transcripts_and_parts(tmp_path: Path) -> None:
    for part, count in (("train-000", 7), ("train-001", 5), ("dev-000", 4), ("extra", 1)):
        members: dict[str, bytes] = {}
        for i in range(count):
            kind = ("flac", "ogg", "wav")[i % 3]
            members |= {f"k{i}.{kind}": encoded(i, kind), f"k{i}.cls": b"wind" if i % 2 else b"dog"}
            said = f"said {i}"
            members |= (
                {f"k{i}.txt": said.encode()} if i % 2 else {f"k{i}.json": json.dumps({"text": said}).encode()}
            )
        shard(tmp_path / f"{part}.tar", **members)
    found = open_labelled(str(tmp_path), tiny("audio"))
    assert list(found.classes) == ["dog", "wind"]
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 12, "dev": 4}
    labels = torch.cat([labels for _, _, labels in found.splits["dev"].batches(3)])
    assert labels.tolist() == [0, 1, 0, 1]
    spoken = read_spoken(str(tmp_path), tiny("audio"), 16_000)
    assert {part: some.texts for part, some in spoken.items()} == {
        "train": [f"said {i}" for i in (*range(7), *range(5))], "dev": [f"said {i}" for i in range(4)],
    }  # fmt: skip
    report = check_data(str(tmp_path), tiny("audio"))
    assert report.left_out["in no part"] == ["extra.tar"] and not report.unreadable and not report.refused


def test_held_out_tars_without_classes_are_left_out_by_name(tmp_path: Path) -> None:
    for part in ("train", "dev", "test"):
        members = {f"{i}.wav": encoded(i) for i in range(4)}
        members |= {f"{i}.cls": b"xy"[i % 2 : i % 2 + 1] for i in range(4) if part != "test"}
        shard(tmp_path / f"{part}.tar", **members)
    found = open_labelled(str(tmp_path), tiny("audio"))
    assert {part: len(split) for part, split in found.splits.items()} == {"train": 4, "dev": 4}
    assert any("part test: held out without labels" in line for line in unused(found.splits.values()))
    shard(tmp_path / "train.tar", **{"0.wav": encoded(0)})
    with pytest.raises(DataError, match=r"labels missing: .*train\.tar:0\.wav has no \.cls"):
        open_labelled(str(tmp_path), tiny("audio"))


def test_folders_within_a_tar_and_broken_members(tmp_path: Path) -> None:
    members = {f"set/{part}/{name}/{i}.wav": encoded(i)
               for part in ("train", "test") for name in ("dog", "wind") for i in range(3)}  # fmt: skip
    path = shard(
        tmp_path / "x.tar",
        **members,
        **{"set/train/dog/bad.wav": b"no sound", "set/train/dog/empty.wav": b""},
    )
    cfg = tiny("audio")
    found = open_labelled(str(path), cfg)
    assert list(found.classes) == ["dog", "wind"]
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 6, "test": 6}
    report = check_data(str(path), cfg)
    assert [name.rpartition("/")[2] for name in report.unreadable] == ["bad.wav", "empty.wav"]
    assert report.unreadable[f"{path}:set/train/dog/empty.wav"] == "the file is empty"
    shard(tmp_path / "flat.tar", **{"1.wav": encoded(1)})
    with pytest.raises(DataError, match=r"labels missing: .*1.wav has no .cls"):
        open_labelled(str(tmp_path / "flat.tar"), cfg)
    with pytest.raises(DataError, match="labels missing: .*no audio file has a transcript"):
        read_spoken(str(tmp_path / "flat.tar"), cfg, 16_000)


def test_tars_within_a_tar_are_folders_of_their_names(tmp_path: Path) -> None:
    """ImageNet's own form: a tar of a tar for each class."""
    inner = {"n02": {"n02_1.JPEG": png(3), "n02_2.JPEG": "n02_1.JPEG"}, "n01": {"n01_1.JPEG": png(1)}}
    tars = {
        f"{name}.tar": shard(tmp_path / f"{name}.bin", **some).read_bytes() for name, some in inner.items()
    }
    stores, _ = opened(shard(tmp_path / "x.tar", **tars))
    assert seen(stores["all"]) == [3, 3, 1] and classes(stores["all"]) == ["n02", "n02", "n01"]
    assert stores["all"].name(0).endswith("x.tar:n02/n02_1.JPEG")
    with pytest.raises(DataError, match="x.tar: not a whole, uncompressed tar file: n03.tar"):
        opened(shard(tmp_path / "x.tar", **tars, **{"n03.tar": b"no tar" * 200}))


def test_compressed_tars_are_refused_by_name(tmp_path: Path) -> None:
    path, content = tmp_path / "x.tar.gz", io.BytesIO(png(1))
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo("1.png")
        member.size = len(content.getvalue())
        tar.addfile(member, content)
    for door in (guess_modality, lambda name: open_data(name, tiny("image"))):
        with pytest.raises(DataError, match=r"x.tar.gz: a compressed tar .*; decompress it first"):
            door(str(path))
