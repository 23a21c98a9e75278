"""Which files are read, and that every other one is named with its reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from d2v.data import walk as module
from d2v.data.walk import walk


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def test_what_is_read_and_why_the_rest_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "b/2.JPG", "a/1.jpg", "a/1.txt", "notes.docx", "more.docx", "README", "locked/3.jpg")
    hidden = (
        ".git/x.jpg",
        "._1.jpg",
        "__MACOSX/1.jpg",
        "@eaDir/1.jpg",
        "Thumbs.db",
        "a/.ipynb_checkpoints/1.jpg",
    )
    touch(tmp_path, *hidden)
    os.mkfifo(tmp_path / "pipe.jpg")
    os.symlink("nowhere.jpg", tmp_path / "broken.jpg")
    scandir = os.scandir

    def locked(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(module.os, "scandir", locked)
    found = walk(tmp_path, (".jpg",))
    assert found.files == ["a/1.jpg", "b/2.JPG"]
    assert found.left_out == {
        "broken link": ["broken.jpg"],
        "folder cannot be read: Permission denied": ["locked"],
        "not a file": ["pipe.jpg"],
        "suffix .docx is not read": ["more.docx", "notes.docx"],
        "without a suffix": ["README"],
    }


def test_links_are_followed_and_files_read_once(tmp_path: Path) -> None:
    touch(tmp_path, "set/b/1.jpg", "set/b/2.jpg", "elsewhere/4.jpg", "elsewhere/5.jpg")
    for name, target in {
        "loop": ".",
        "a": "b",
        "b/up": "../..",
        "far": "../elsewhere",
        "0.jpg": "b/1.jpg",
    }.items():
        os.symlink(target, tmp_path / "set" / name)
    os.link(tmp_path / "set/b/2.jpg", tmp_path / "set/b/3.jpg")
    found = walk(tmp_path / "set", (".jpg",))
    assert len(found.files) == 4 and found.files[:2] == ["b/1.jpg", "b/2.jpg"], (
        "a file's own name comes first"
    )
    assert {os.path.basename(name) for name in found.files[2:]} == {"4.jpg", "5.jpg"}
    assert found.left_out == {"another name of a file that is read": ["0.jpg", "b/3.jpg"]}


def test_a_file_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "x.bin", "y.jpg")
    assert walk(tmp_path / "x.bin", (".jpg",)).files == ["x.bin"]
    with pytest.raises(FileNotFoundError):
        walk(tmp_path / "nowhere", (".jpg",))
