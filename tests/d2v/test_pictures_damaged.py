"""Pictures that lie, are damaged or too large: one sample's problem, named, and never an allocation."""

from __future__ import annotations

import io
import pickle
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import PngImagePlugin

from d2v.data.images import store as stores
from d2v.data.images.store import ArrayStore
from d2v.data.open import check_data, open_data
from d2v.data.types import DataError, Unreadable
from tests.d2v.pictures import config, encoded, first, pixels, source_of, tiff, write


def reason(path: Path, epoch: int | None = None, **settings) -> str:
    """Why the only picture at a path cannot be read."""
    with pytest.raises(Unreadable) as error:
        source_of(path, **settings).read(0, epoch)
    return str(error.value)


def resized_header(kind: str, width: int, height: int) -> bytes:
    """A small file whose header says that it is large."""
    data = bytearray(encoded(pixels(16, 16, 3), kind, **({"progressive": True} if kind == "JPEG" else {})))
    if kind == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    elif kind == "JPEG":
        start = data.index(b"\xff\xc2") + 5
        data[start : start + 4] = struct.pack(">HH", height, width)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


@pytest.mark.parametrize("epoch", [None, 0])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF"])
def test_a_picture_that_says_it_is_large_is_not_decoded(tmp_path: Path, kind: str, epoch: int | None):
    """Below Pillow's own limits (12,000 x 9,000), between its warning and its error, and above that."""
    sizes = ["12,000 x 9,000 pixels are more than data.max_pixels, 80,000,000", "178956970"]
    for (width, height), said in zip([(12_000, 9_000), (60_000, 40_000)], sizes, strict=True):
        if kind == "TIFF":
            data = tiff(bytes(64), width, height, bits_per_sample=8)
        else:
            data = resized_header(kind, width, height)
        write(tmp_path / f"a.{kind.lower()}", data)
        tracemalloc.start()
        assert said in reason(tmp_path, epoch)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()


def test_the_limit_of_pixels_is_a_setting(tmp_path: Path):
    write(tmp_path / "a.png", encoded(pixels(20, 30, 3)))
    source_of(tmp_path, max_pixels=600).read(0, 0)
    assert reason(tmp_path, max_pixels=599) == "30 x 20 pixels are more than data.max_pixels, 599"
    with pytest.raises(ValueError, match=r"data.max_pixels must be .*178,956,970"):
        config(max_pixels=200_000_000)


def test_a_file_larger_than_any_picture_is_not_read(tmp_path: Path):
    with open(write(tmp_path / "a.png", b"\x89PNG"), "r+b") as file:
        file.truncate(stores.MOST_BYTES + 1)
    assert "1,073,741,825 bytes are too many for a picture" in reason(tmp_path)


RAISED = [
    MemoryError(), zlib.error("Error -3"), struct.error("unpack requires"), OverflowError("too large"),
    IndexError("list index"), KeyError(274), TypeError("not a number"), ZeroDivisionError("by zero"),
    AssertionError(), RecursionError("depth"), SyntaxError("broken PNG"), EOFError(), AttributeError("read"),
    NotImplementedError("codec"), RuntimeError("plugin"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "start"),
]  # fmt: skip


@pytest.mark.parametrize("where", ["load", "__init__"])
def test_whatever_a_damaged_file_makes_pillow_raise_is_its_own_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    write(tmp_path / "a.png", encoded(pixels(16, 16, 3)))
    for error in RAISED:

        def fail(*_, error=error) -> None:
            raise error

        monkeypatch.setattr(PngImagePlugin.PngImageFile, where, fail)
        said = reason(tmp_path), reason(tmp_path, 0)
        assert said[0] == said[1] and said[0]
        assert type(error).__name__ in said[0] or str(error) in said[0] or "format" in said[0]
    report = check_data(str(tmp_path), config())
    assert list(report.unreadable) == [str(tmp_path / "a.png")]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF"])
def test_damage_anywhere_is_named_or_overlooked(tmp_path: Path, kind: str):
    """Cut and overwritten files: read or `Unreadable`, in words, in evaluation and in training."""
    whole = encoded(pixels(24, 30, 3), kind)
    rng = np.random.default_rng(0)
    file, found = tmp_path / f"a.{kind.lower()}", 0
    for i in range(40):
        data = bytearray(whole)
        if i % 2:
            del data[int(rng.integers(len(data))) :]
        else:
            for place in rng.integers(min(len(data), 200), size=3):
                data[place] = int(rng.integers(256))
        write(file, bytes(data))
        source = source_of(tmp_path)
        for epoch in (None, i):
            try:
                source.read(0, epoch)
            except Unreadable as error:
                found += 1
                assert str(error) and "BytesIO" not in str(error) and str(file) not in str(error)
    assert found > 20


def test_words_for_what_is_no_picture(tmp_path: Path):
    file = write(tmp_path / "a.jpg", b"")
    assert reason(tmp_path) == "the file is empty"
    write(file, b"<html>404</html>")
    assert reason(tmp_path) == "not a picture in a format that Pillow reads"
    source = source_of(tmp_path)
    file.unlink()
    with pytest.raises(Unreadable, match="^No such file or directory$"):
        source.read(0, None)


def test_warnings_of_pillow_are_not_passed_on(tmp_path: Path):
    """Here they would be errors; in a run each worker would say them."""
    broken = encoded(pixels(16, 16, 3), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    write(tmp_path / "a.jpg", broken)
    write(tmp_path / "b.png", resized_header("PNG", 12_000, 9_000))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        source = source_of(tmp_path)
        source.read(0, 0)
        with pytest.raises(Unreadable):
            source.read(1, 0)
    assert not said


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("channels", [1, 3])
def test_numbers_that_are_none_make_a_picture_unreadable(tmp_path: Path, value: float, channels: int):
    """One pixel in a corner, which most crops and the evaluation's miss: mean and deviation stay finite."""
    images = np.random.default_rng(0).normal(2, 3, (400, 20, 20, channels))
    images[7, 0, 0, 0] = value
    np.savez(tmp_path / "d.npz", images=images)
    pipeline = open_data(str(tmp_path / "d.npz"), config(channels=channels, batch=100))
    assert abs(np.array(pipeline.meta["mean"]) - 2).max() < 0.05
    assert np.isfinite(pipeline.meta["std"]).all()
    batches = first(pipeline, 4, micro=100)
    assert all(torch.isfinite(b.source).all() and 7 not in b.ids for b in batches)
    assert pipeline.report.unreadable == {f"{tmp_path}/d.npz:images[7]": "NaN or inf among the pixels"}
    assert len(check_data(str(tmp_path / "d.npz"), config(channels=channels)).unreadable) == 1


def test_numbers_beyond_single_precision_are_named(tmp_path: Path):
    images = np.ones((4, 16, 16))
    images[0, 0, 0] = 1e300
    images[1, ::2] = 3.4e38  # below the largest number, until it is enlarged
    np.savez(tmp_path / "d.npz", images=images)
    source = source_of(tmp_path / "d.npz", channels=1, height=24, width=24)
    for index in (0, 1):
        with pytest.raises(Unreadable, match="NaN or inf among the pixels"):
            source.read(index, None)


def npz_with_header(shape: tuple[int, ...]) -> bytes:
    """64 bytes of pixels under a header of any shape."""
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": shape})
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("images.npy", array.getvalue() + bytes(64))
    return archive.getvalue()


def test_arrays_that_are_smaller_than_they_say_are_refused(tmp_path: Path):
    file = write(tmp_path / "d.npz", npz_with_header((4, 4, 4)))
    assert len(source_of(file, channels=1)) == 4
    write(file, npz_with_header((1 << 20, 1 << 12, 1 << 12)))
    with pytest.raises(DataError, match="not a readable .npz: images has 64 bytes, not those of shape"):
        open_data(str(file), config(channels=1))


def test_damage_anywhere_in_arrays_is_a_line(tmp_path: Path):
    np.savez_compressed(tmp_path / "whole.npz", images=pixels(4, 16, 16), labels=np.arange(4))
    whole, rng, found = (tmp_path / "whole.npz").read_bytes(), np.random.default_rng(0), 0
    for i in range(60):
        data = bytearray(whole)
        if i % 3:
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        else:
            del data[int(rng.integers(len(data))) :]
        try:
            source_of(write(tmp_path / "d.npz", bytes(data)), channels=1)
        except DataError as error:
            found += 1
            assert "d.npz" in str(error)
    assert found > 20


def test_arrays_are_shared_between_processes(tmp_path: Path):
    """11 MB go to a worker as a handle, once for all of them, however they were made or cut."""
    images = np.broadcast_to(pixels(1, 24, 20), (24_000, 24, 20))
    store = ArrayStore("d", images)
    handles = [len(ForkingPickler.dumps(store)) for _ in range(2)]
    assert max(handles) < 10_000
    assert np.array_equal(store.load(5)[..., 0], images[5]) and store.images.shape == images.shape


def test_arrays_are_copied_where_shared_memory_is_too_small(monkeypatch: pytest.MonkeyPatch):
    def full(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    store = ArrayStore("d", pixels(3, 8, 8))
    assert np.array_equal(pickle.loads(pickle.dumps(store)).images, store.images)
