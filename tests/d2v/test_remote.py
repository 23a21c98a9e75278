"""Data sets at URLs: the same samples as from the folders, fetched by need, and what happens to a network."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from d2v.config.run import Config
from d2v.data import remote
from d2v.data.open import check_data, guess_modality, open_data, open_labelled
from d2v.data.remote import at_hand, braces
from d2v.data.types import DataError
from tests.d2v.tiny_runs import tiny

MEMORY = "memory://sets"


def of(modality: str, **data: Any) -> Config:
    cfg = tiny(modality)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch=2, **data))


def picture(value: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(value).integers(0, 255, (12, 12), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def sound(value: int) -> bytes:
    file = io.BytesIO()
    wave = 0.1 * np.random.default_rng(value).standard_normal(8_000)
    soundfile.write(file, wave, 16_000, format="FLAC")
    return file.getvalue()


def shard(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def make(root: Path, modality: str) -> None:
    """Two shards for training, one for validation."""
    one, suffix = (picture, "png") if modality == "image" else (sound, "flac")
    for number, name in enumerate(("train-000", "train-001", "val-000")):
        members: dict[str, bytes] = {}
        for i in range(4):
            members[f"{i}.{suffix}"] = one(10 * number + i)
            members[f"{i}.cls"] = b"xy"[i % 2 : i % 2 + 1]
            members[f"{i}.txt"] = b"AB"
        shard(root / f"{name}.tar", members)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("D2V_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAIT", 0.0)
    yield tmp_path / "cache"
    fsspec.filesystem("memory").store.clear()


def in_memory(root: Path) -> None:
    fs = fsspec.filesystem("memory")
    for file in root.rglob("*"):
        if file.is_file():
            fs.pipe_file(f"/sets/{file.relative_to(root)}", file.read_bytes())


def steps(path: str, cfg: Config) -> list[torch.Tensor]:
    stream = open_data(path, cfg).micro_batches((0, 1), 2)
    return [batch.source for _ in range(5) for batch in next(stream)]


@pytest.mark.parametrize("modality", ["image", "audio"])
@pytest.mark.parametrize("url", ["folder", "glob", "braces", "memory", "workers"])
def test_urls_give_what_folders_give(url: str, modality: str, tmp_path: Path) -> None:
    make(tmp_path / "set", modality)
    in_memory(tmp_path / "set")
    base = f"file://{tmp_path}/set"
    patterns = {"glob": f"{base}/*.tar", "braces": f"{base}/{{train,val}}-{{000..001}}.tar", "memory": MEMORY}
    if url == "braces":
        shard(tmp_path / "set" / "val-001.tar", {})
    path = patterns.get(url, base)
    workers = 2 if url == "workers" else 0
    ours, theirs = (steps(one, of(modality, workers=workers)) for one in (path, str(tmp_path / "set")))
    assert all(map(torch.equal, ours, theirs)) and len(ours) == len(theirs)
    assert guess_modality(path) == modality
    found = open_labelled(path, of(modality))
    assert {part: len(split) for part, split in found.splits.items()} == {"train": 8, "val": 4}
    assert check_data(path, of(modality)).total == 8


def test_members_alone_are_fetched_and_an_index_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "set", "image")
    in_memory(tmp_path / "set")
    fs = type(fsspec.filesystem("memory"))
    ranges: list[int] = []
    plain, opened = fs.cat_file, fs.open
    monkeypatch.setattr(
        fs,
        "cat_file",
        lambda self, path, start, end: ranges.append(end - start) or plain(self, path, start, end),
    )
    source = open_data(MEMORY, of("image")).source
    source.read(0, 0)
    assert ranges[-1] == len(picture(0))

    def closed(*_: Any, **__: Any) -> None:
        raise AssertionError("a shard is indexed again")

    monkeypatch.setattr(fs, "open", closed)
    assert len(open_data(MEMORY, of("image")).source) == 8
    monkeypatch.setattr(fs, "open", opened)
    with tarfile.open(tmp_path / "more.tar", "w") as tar:
        info = tarfile.TarInfo("9.png")
        info.size = len(picture(9))
        tar.addfile(info, io.BytesIO(picture(9)))
    fsspec.filesystem("memory").pipe_file("/sets/train-000.tar", (tmp_path / "more.tar").read_bytes())
    assert len(open_data(MEMORY, of("image")).source) == 5, "a shard that changed is indexed anew"
    fsspec.filesystem("memory").rm("/sets/train-000.tar")
    assert len(open_data(MEMORY, of("image")).source) == 4


def test_texts_are_fetched_whole(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/sets/en/train.txt", b"some words of a text " * 400)
    fs.pipe_file("/sets/en/valid.txt", b"held out " * 9)
    report = open_data(MEMORY, of("text"), run_dir=tmp_path / "run").report
    assert report.total == 1 and any("valid left out" in note for note in report.notes)
    assert guess_modality(f"{MEMORY}/en/train.txt") == "text"


def test_processes_that_fetch_one_set_at_once_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second fetches while the first does, and is done before."""
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/sets/train.txt", b"some words")
    memory.pipe_file("/sets/valid.txt", b"held out")
    fs = type(memory)
    plain, inner = fs.get_file, []

    def twice(self: Any, path: str, to: str) -> None:
        plain(self, path, to)
        if not inner:
            inner.append(to)
            at_hand(MEMORY)

    monkeypatch.setattr(fs, "get_file", twice)
    home = Path(at_hand(MEMORY))
    assert {file.name: file.read_bytes() for file in home.glob("*.txt")} == {
        "train.txt": b"some words",
        "valid.txt": b"held out",
    }


def test_a_request_is_tried_again_and_a_network_that_is_down_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "set", "image")
    in_memory(tmp_path / "set")
    expected = steps(MEMORY, of("image"))
    fs, failures = type(fsspec.filesystem("memory")), iter([True, True, False] * 99)
    plain = fs.cat_file

    def flaky(self: Any, path: str, start: int, end: int) -> bytes:
        if next(failures, True):
            raise TimeoutError("no answer")
        return plain(self, path, start, end)

    monkeypatch.setattr(fs, "cat_file", flaky)
    assert all(map(torch.equal, steps(MEMORY, of("image")), expected))
    failures = iter([])
    refused = check_data(MEMORY, of("image")).refused
    assert re.fullmatch(r"data: memory:/+sets/train-00\d\.tar: TimeoutError: no answer", refused)
    with pytest.raises(DataError, match=r"memory:/+sets/train-00\d\.tar: TimeoutError: no answer"):
        steps(MEMORY, of("image"))


@pytest.mark.parametrize(
    "url, match",
    [
        ("memory://sets/nothing", "memory://sets/nothing does not exist"),
        ("memory://sets/loose", "it holds .jpg: pack the files into tars, or copy them"),
        ("nosuch://a/b.tar", "nosuch://a/b.tar: Protocol not known: nosuch"),
        ("memory://sets/half.tar", "memory:/+sets/half.tar: not a whole, uncompressed tar file"),
    ],
)
def test_what_is_not_read_from_urls_is_one_line(url: str, match: str, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/sets/loose/a.jpg", b"x")
    shard(tmp_path / "whole.tar", {"a.png": picture(0) * 9})
    fs.pipe_file("/sets/half.tar", (tmp_path / "whole.tar").read_bytes()[:700])
    with pytest.raises(DataError, match=match):
        open_data(url, of("image"))


@pytest.mark.skipif(importlib.util.find_spec("aiohttp") is not None, reason="what HTTP needs is there")
def test_what_a_protocol_needs_is_named() -> None:
    with pytest.raises(DataError, match=r"https://host/a\.tar: .*aiohttp"):
        at_hand("https://host/a.tar")


def test_braces() -> None:
    assert braces("a{08..11}b{x,y}") == [f"a{n}b{c}" for n in ("08", "09", "10", "11") for c in "xy"]
    assert braces("plain") == ["plain"]
