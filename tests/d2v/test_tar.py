"""Shards of pictures: names, links, holes, classes and parts within a tar."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2v.data.images.parts import open_stores
from d2v.data.images.store import Store
from d2v.data.types import DataError, Report


def png(value: int, side: int = 4) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, **members: bytes | str) -> Path:
    """Names and contents; a string is where a link leads, one that begins with = a hard link."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type = tarfile.LNKTYPE if content.startswith("=") else tarfile.SYMTYPE
                member.linkname = content.removeprefix("=")
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def opened(path: Path) -> tuple[dict[str, Store], Report]:
    report = Report(str(path), 0)
    return open_stores(path, report), report


def seen(store: Store) -> list[int]:
    return [int(np.asarray(store.load(i)).max()) for i in range(len(store))]


def classes(store: Store) -> list[str]:
    assert store.labels is not None, store.unlabelled
    return [store.classes[label] for label in store.labels]


def test_keys_with_dots(tmp_path: Path) -> None:
    members = {
        "IMG_2024.05.01.jpg": png(1), "IMG_2024.cls": b"day",
        "k.input.jpg": png(2), "k.v2.jpg": png(3), "k.cls": b"night",
        "a/IMG.06.png": png(4), "a/IMG.06.cls": b"day",
        "./._k.jpg": b"of a system", "notes.docx": b"", "k.json": b"{}",
    }  # fmt: skip
    stores, report = opened(shard(tmp_path / "x.tar", **members))
    assert seen(stores["all"]) == [1, 2, 3, 4]
    assert classes(stores["all"]) == ["day", "night", "night", "day"]
    assert report.left_out == {"suffix .docx is not read": [f"{tmp_path / 'x.tar'}:notes.docx"]}


def test_links_and_sparse_members(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "links.tar", **{"a/1.png": png(1), "b/2.png": "../a/1.png", "b/3.png": "=a/1.png"}
    )
    stores, _ = opened(path)
    assert seen(stores["all"]) == [1, 1, 1] and classes(stores["all"]) == ["a", "b", "b"]
    picture = np.zeros((256, 256, 3), np.uint8)
    picture[-1] = 200
    (tmp_path / "holes").mkdir()
    for name in ("0.bmp", "1.bmp"):
        Image.fromarray(picture).save(tmp_path / "whole.bmp")
        content = (tmp_path / "whole.bmp").read_bytes()
        with open(tmp_path / "holes" / name, "wb") as file:
            file.write(content[:54])
            file.truncate(1 << 17)  # a hole
            file.seek(1 << 17)
            file.write(content[1 << 17 :])
    subprocess.run(["tar", "-S", "-cf", "holes.tar", "holes"], cwd=tmp_path, check=True)
    with tarfile.open(tmp_path / "holes.tar") as tar:
        if not any(member.issparse() for member in tar):
            pytest.skip("this file system keeps no holes")
    stores, _ = opened(tmp_path / "holes.tar")
    first, second = (np.asarray(stores["all"].load(i)) for i in range(2))
    assert first.shape == picture.shape and np.array_equal(first, second)
    assert first[:100].any() == (tmp_path / "holes/0.bmp").read_bytes()[54:].startswith(b"\xc8")


def test_classes_and_parts_within_a_tar_and_by_shards(tmp_path: Path) -> None:
    inside = {
        f"./set/{part}/{name}/{i}.png": png(i) for part in ("train", "val") for name in "ab" for i in (1, 2)
    }
    plain = {name.removeprefix("./set/"): content for name, content in inside.items()}
    stores, _ = opened(shard(tmp_path / "inside.tar", **plain))
    assert {part: classes(store) for part, store in stores.items()} == {
        "train": list("aabb"),
        "val": list("aabb"),
    }
    (tmp_path / "shards").mkdir()
    for name, value in (("train-000", 1), ("train-001", 2), ("val-000", 3), ("extra", 4)):
        shard(
            tmp_path / "shards" / f"{name}.tar",
            **{"k.png": png(value), "k.cls": f"class {value % 2}".encode()},
        )
    stores, report = opened(tmp_path / "shards")
    assert {part: seen(store) for part, store in stores.items()} == {"train": [1, 2], "val": [3]}
    assert classes(stores["train"]) == ["class 1", "class 0"] and classes(stores["val"]) == ["class 1"]
    assert report.left_out == {"in no part": ["extra.tar"]}


def test_what_is_no_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match="x.tar: not a whole, uncompressed tar file"):
        opened(tmp_path / "x.tar")
    shard(tmp_path / "empty.tar", **{"a.docx": b""})
    with pytest.raises(DataError, match=r"no pictures in it; .*a.docx: suffix .docx is not read"):
        opened(tmp_path / "empty.tar")


def test_tars_of_a_class_each(tmp_path: Path) -> None:
    """ImageNet's form once its one tar is unpacked; shards of other names have no classes."""
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        for name in ("n01", "n02"):
            shard(tmp_path / part / f"{name}.tar", **{f"{name}_{i}.JPEG": png(i) for i in range(3)})
    found = open_stores(tmp_path, Report(str(tmp_path), 0))
    assert {part: len(store) for part, store in found.items()} == {"train": 6, "val": 6}
    assert all(list(store.classes) == ["n01", "n02"] for store in found.values())
    shard(tmp_path / "train" / "n02.tar", **{"other_0.JPEG": png(0)})
    assert "has no .cls" in open_stores(tmp_path, Report(str(tmp_path), 0))["train"].unlabelled


def test_members_may_have_absolute_names(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", **{"/data/cat/0.png": png(0), "dog/1.png": png(1), "/data/cat/2.png": png(2)})
    assert len(open_stores(tmp_path, Report(str(tmp_path), 0))["all"]) == 3
