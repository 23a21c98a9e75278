"""Pictures from folders, tar shards, arrays and the embedded digits."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from d2v.config.presets import preset
from d2v.data.embedded import digits
from d2v.data.images.eval_picture import eval_box
from d2v.data.images.source import crop_box, enlarge_and_flip
from d2v.data.loader import generator
from d2v.data.normalisation import IMAGENET
from d2v.data.open import check_data, open_data, open_labelled
from d2v.data.types import DataError, Position
from tests.d2v.pictures import config, encoded, first, pixels, unnormalised, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine pictures of nine sizes and several formats in two class folders."""
    kinds = ["PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF"]
    for i in range(9):
        kind = kinds[i % len(kinds)]
        image = pixels(10 + 5 * i, 40 - 3 * i, 3, seed=i)
        write(tmp_path / f"class{i % 2}" / "deep" / f"{i}.{kind.lower()}", encoded(image, kind))
    write(tmp_path / "class0" / "notes.md", b"no picture")
    return tmp_path


def test_folder_gives_batches_of_one_size(folder: Path):
    pipeline = open_data(str(folder), config(16, 24))
    for batch in first(pipeline, 4):
        assert batch.source.shape == (4, 3, 16, 24) and batch.source.dtype == torch.float32
        values = unnormalised(batch.source, pipeline.meta)
        assert values.min() >= -1e-5 and values.max() <= 1 + 1e-5
    assert pipeline.meta == {"mean": list(IMAGENET.mean), "std": list(IMAGENET.std)}
    assert pipeline.report.total == 9 and not pipeline.report.unreadable


def test_a_sample_is_augmented_the_same_in_any_company(folder: Path):
    """Keyed by (seed, epoch, id): neither batch size nor micro-batch nor order matters."""

    def samples(**data) -> dict[int, torch.Tensor]:
        cfg = config(**data)
        pipeline = open_data(str(folder), cfg)
        steps = 8 // cfg.data.batch
        return {
            i: x
            for b in first(pipeline, steps, micro=3)
            for i, x in zip(b.ids.tolist(), b.source, strict=True)
        }

    one, other = samples(batch=1), samples(batch=8)
    assert one.keys() == other.keys() and len(one) == 8
    assert all(torch.allclose(one[i], other[i], atol=1e-5) for i in one)


def test_epochs_differ_and_resuming_continues_exactly(folder: Path):
    cfg = config()
    whole = first(open_data(str(folder), cfg), 6)
    assert whole[0].epoch == 0 and whole[2].epoch == 1
    assert not torch.equal(whole[0].source, whole[2].source)
    rest = first(open_data(str(folder), cfg), 3, start=Position(1, 1))
    assert all(torch.equal(a.source, b.source) for a, b in zip(whole[3:], rest, strict=True))


def test_workers_change_nothing(folder: Path):
    alone, shared = (open_data(str(folder), config(workers=n)) for n in (0, 2))
    shared.workers = 2
    for a, b in zip(first(alone, 3), first(shared, 3), strict=True):
        assert torch.equal(a.source, b.source) and torch.equal(a.ids, b.ids)


def test_full_crop_reproduces_the_picture():
    source = torch.rand(3, 4, 12, 20)
    size = torch.tensor([[12.0, 20.0]] * 3)
    same = enlarge_and_flip(source, size, torch.tensor([False, False, True]))
    torch.testing.assert_close(same[:2], source[:2], atol=2e-5, rtol=0)
    torch.testing.assert_close(same[2], source[2].flip(-1), atol=2e-5, rtol=0)


def test_enlarging_equals_interpolating_the_cut_alone():
    source = torch.rand(3, 2, 16, 16)
    sizes = [(5, 9), (16, 3), (1, 15)]
    for canvas, (h, w) in zip(source, sizes, strict=True):
        canvas[:, h:] = canvas[:, h - 1 : h]
        canvas[:, :, w:] = canvas[:, :, w - 1 : w]
    out = enlarge_and_flip(source, torch.tensor(sizes).float(), torch.tensor([False, True, False]))
    for i, (h, w) in enumerate(sizes):
        expected = F.interpolate(source[i : i + 1, :, :h, :w], (16, 16), mode="bicubic")[0]
        expected = expected.flip(-1) if i == 1 else expected
        torch.testing.assert_close(out[i], expected, atol=5e-5, rtol=0)


def test_crops_follow_torchvision():
    """Share of the area uniform in the scale, aspect ratio log-uniform and centred on 1."""
    boxes = np.array([crop_box(generator(0, 1, i), 100, 100, (0.2, 0.8)) for i in range(2000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = w * h / 1e4, w / h
    assert boxes.min() >= 0 and boxes.max() <= 100
    assert area.min() > 0.19 and area.max() < 0.82 and abs(area.mean() - 0.5) < 0.02
    assert ratio.min() > 0.72 and ratio.max() < 1.39 and abs(np.log(ratio).mean()) < 0.02
    centre = (boxes[:, 0] + boxes[:, 2]) / 2
    assert abs(centre.mean() - 50) < 1.5
    assert crop_box(generator(0, 1), 10, 100, (1.0, 1.0)) == (43, 0, 56, 10)  # falls back to the centre


def test_half_are_flipped(tmp_path: Path):
    """A picture that is dark on the left, whole as the only crop: flips show, and are even."""
    image = np.zeros((400, 16, 16), np.uint8)
    image[:, :, 8:] = 255
    np.savez(tmp_path / "d.npz", images=image)
    cfg = config(channels=1, batch=400, crop_scale=(1.0, 1.0))
    (batch,) = first(open_data(str(tmp_path / "d.npz"), cfg), micro=400)
    flipped = (batch.source[:, 0, :, 0].mean(1) > batch.source[:, 0, :, -1].mean(1)).float().mean()
    assert 0.42 < flipped < 0.58
    (batch,) = first(open_data(str(tmp_path / "d.npz"), config(channels=1, batch=400, flip=False)), micro=400)
    assert (batch.source[:, 0, :, 0] <= batch.source[:, 0, :, -1] + 1e-3).all()


def test_eval_box_is_resize_256_then_crop_224():
    assert eval_box(256, 256, 224, 224) == (16, 16, 240, 240)
    assert eval_box(224, 224, 224, 224) == (0, 0, 224, 224)
    assert eval_box(512, 1024, 224, 224) == (288, 32, 736, 480)


def test_eval_leaves_pictures_of_the_right_size_alone(tmp_path: Path):
    images = pixels(5, 16, 16, 3)
    np.savez(tmp_path / "d.npz", images=images)
    pipeline = open_data(str(tmp_path / "d.npz"), config())
    names, batch = next(pipeline.in_order(5))
    values = unnormalised(batch.source, pipeline.meta) * 255
    torch.testing.assert_close(
        values, torch.from_numpy(images).permute(0, 3, 1, 2).float(), atol=1e-3, rtol=0
    )
    assert names[4].endswith("d.npz:images[4]")


def test_large_jpegs_are_decoded_small_and_still_right(tmp_path: Path):
    """The draft mode of the JPEG decoder must not move the crop."""
    ramp = np.broadcast_to(np.linspace(0, 255, 512).astype(np.uint8)[:, None, None], (512, 512, 3))
    write(tmp_path / "a.jpg", encoded(np.ascontiguousarray(ramp), "JPEG", quality=95))
    write(tmp_path / "b.png", encoded(np.ascontiguousarray(ramp)))
    pipeline = open_data(str(tmp_path), config(batch=1))
    (_, batch), *_ = pipeline.in_order(2)
    a, b = unnormalised(batch.source, pipeline.meta)
    torch.testing.assert_close(a, b, atol=0.01, rtol=0)
    assert abs(a[0, 0].mean() - 46 / 512) < 0.01  # the first of 16 rows covers rows 32 to 60


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_channel_count_from_arrays(tmp_path: Path, channels: int):
    """Mean and deviation are then measured: what the model sees has mean 0 and deviation 1."""
    images = np.random.default_rng(0).normal(3, 2, (40, 20, 28, channels)).astype(np.float32)
    np.savez(tmp_path / "d.npz", images=images if channels > 1 else images[..., 0])
    pipeline = open_data(str(tmp_path / "d.npz"), config(20, 28, channels, batch=8))
    source = torch.cat([b.source for _, b in pipeline.in_order(9)])
    assert source.shape == (40, channels, 20, 28)
    assert source.mean().abs() < 1e-4 and (source.std() - 1).abs() < 1e-3
    assert first(pipeline)[0].source.shape == (4, channels, 20, 28)


def test_a_constant_channel_stays_finite(tmp_path: Path):
    np.savez(tmp_path / "d.npz", images=np.full((4, 16, 16), 7, np.uint8))
    assert torch.isfinite(first(open_data(str(tmp_path / "d.npz"), config(channels=1)))[0].source).all()


def test_given_mean_and_std(tmp_path: Path):
    np.savez(tmp_path / "d.npz", images=pixels(4, 16, 16))
    cfg = config(channels=1, mean=(0.5,), std=(0.25,))
    assert open_data(str(tmp_path / "d.npz"), cfg).meta == {"mean": [0.5], "std": [0.25]}
    with pytest.raises(ValueError, match=r"data.std must have 1 values \(front.channels\), got None"):
        open_data(str(tmp_path / "d.npz"), config(channels=1, mean=(0.5,)))


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_tar_shards_equal_the_same_files_in_a_folder(tmp_path: Path):
    files = {f"a/{i:03}.png": encoded(pixels(20 + i, 30, 3, seed=i)) for i in range(8)}
    for name, data in files.items():
        write(tmp_path / "files" / name, data)
    labels = {f"a/{i:03}.cls": str(i % 3).encode() for i in range(8)}
    both = dict(sorted((files | labels).items()))
    (tmp_path / "shards").mkdir()
    for number, half in enumerate((list(both)[:8], list(both)[8:])):
        tar_of(tmp_path / "shards" / f"s{number}.tar", {name: both[name] for name in half})
    cfg = config(workers=0)
    batches = [first(open_data(str(tmp_path / p), cfg), 2) for p in ("files", "shards")]
    assert all(torch.equal(a.source, b.source) for a, b in zip(*batches, strict=True))
    labelled = open_labelled(str(tmp_path / "shards"), cfg)
    assert list(labelled.classes) == ["0", "1", "2"]
    assert len(labelled.splits["train"]) == 5 and len(labelled.splits["test"]) == 3


def test_tar_without_labels_or_broken(tmp_path: Path):
    whole = tar_of(tmp_path / "d.tar", {"x.png": encoded(pixels(16, 16, 3))})
    with pytest.raises(DataError, match=r"labels missing: .*d.tar:x.png has no .cls beside it"):
        open_labelled(str(whole), config())
    write(tmp_path / "cut.tar", whole.read_bytes()[:700])
    with pytest.raises(DataError, match=r"cut.tar: not a whole, uncompressed tar file"):
        open_data(str(tmp_path / "cut.tar"), config())


def test_empty_folder_and_unknown_path(tmp_path: Path):
    with pytest.raises(DataError, match=rf"{tmp_path}: no pictures in it"):
        open_data(str(tmp_path), config())
    with pytest.raises(DataError, match="nowhere does not exist; embedded data sets: digits, speech, text"):
        open_data("nowhere", config())
    with pytest.raises(DataError, match="'text' is embedded text data, preset image_tiny reads image"):
        open_data("text", config())
    with pytest.raises(DataError, match="got '.txt'"):
        open_data(str(write(tmp_path / "a.txt", b"x")), config())


def test_truncated_jpeg_is_counted_skipped_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    good = encoded(pixels(40, 40, 3), "JPEG")
    for i in range(200):
        write(tmp_path / f"{i:03}.jpg", good)
    broken = write(tmp_path / "017.jpg", good[: len(good) // 2])
    pipeline = open_data(str(tmp_path), config(batch=20))
    batches = first(pipeline, 10, micro=20)
    assert all(len(b) == 20 and 17 not in b.ids for b in batches)
    assert list(pipeline.report.unreadable) == [str(broken)]
    assert "truncated" in pipeline.report.unreadable[str(broken)]
    report = check_data(str(tmp_path), config())
    assert report.total == 200 and report.unreadable.keys() == {str(broken)}
    assert report.facts["sizes (width x height)"] == {"40x40": 199}

    for i in (30, 31):
        write(tmp_path / f"{i:03}.jpg", b"\xff\xd8 nothing")
    first(open_data(str(tmp_path), config(batch=20)), 10)  # up to ten may be
    for max_unreadable, most in ((0.01, 2), (0.0, 0)):
        monkeypatch.setattr("d2v.data.types.FEW_UNREADABLE", most)
        strict = config(batch=20, max_unreadable=max_unreadable)
        with pytest.raises(DataError, match=rf"of 200 samples unreadable, more than {most} "):
            first(open_data(str(tmp_path), strict), 10)
        assert check_data(str(tmp_path), strict).refused.startswith(f"data: {tmp_path}: 3 of 200 samples")
        assert all(f"{i:03}.jpg" in check_data(str(tmp_path), strict).refused for i in (17, 30, 31))


def test_wrong_channel_count_names_file_and_both_numbers(tmp_path: Path):
    """What no conversion is obvious for: files for two channels, arrays of five or two."""
    path = write(tmp_path / "files" / "a.png", encoded(pixels(16, 16, 3)))
    with pytest.raises(DataError, match=rf"{path} has 3 channels, front.channels is 2"):
        open_data(str(tmp_path / "files"), config(channels=2))
    for given, wanted in ((5, 3), (4, 3), (2, 1), (3, 4)):
        np.savez(tmp_path / "d.npz", images=pixels(4, 16, 16, given))
        message = rf"d.npz:images\[0\] has {given} channels, front.channels is {wanted}"
        with pytest.raises(DataError, match=message):
            open_data(str(tmp_path / "d.npz"), config(channels=wanted))


def test_grey_palette_and_alpha_files_become_rgb(tmp_path: Path):
    write(tmp_path / "grey.png", encoded(pixels(16, 16)))
    write(tmp_path / "alpha.png", encoded(pixels(16, 16, 4)))
    palette = Image.fromarray(pixels(16, 16, 3)).convert("P")
    palette.save(tmp_path / "palette.png")
    Image.fromarray(pixels(16, 16).astype(np.uint16) << 8).save(tmp_path / "sixteen.png")
    (batch,) = first(open_data(str(tmp_path), config()))
    assert batch.source.shape == (4, 3, 16, 16)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"images": np.zeros((4, 16), np.uint8)},
            r"must be \[n,h,w\] or \[n,h,w,channels\], got shape \(4, 16\)",
        ),
        ({"images": np.zeros((4, 16, 16), np.int64)}, "must be uint8 or float, got int64"),
        (
            {"images": np.zeros((4, 16, 16), np.uint8), "labels": np.zeros(3)},
            r"must have shape \(4,\), got \(3,\)",
        ),
        ({"labels": np.zeros(3)}, "needs an array called images, has labels"),
    ],
)
def test_arrays_that_are_no_pictures(tmp_path: Path, arrays: dict, message: str):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_data(str(tmp_path / "d.npz"), config(channels=1))


def test_a_file_that_is_no_npz(tmp_path: Path):
    with pytest.raises(DataError, match="d.npz: not a readable .npz"):
        open_data(str(write(tmp_path / "d.npz", b"PK\x03\x04 half")), config())


def test_labelled_folder_is_split_the_same_way_every_time(folder: Path):
    parts = []
    for _ in range(2):
        labelled = open_labelled(str(folder), config())
        assert labelled.classes == ["class0", "class1"] and labelled.level == "sample"
        parts.append(
            {name: list(split.loader.source.store.indices) for name, split in labelled.splits.items()}
        )
    assert parts[0] == parts[1]
    assert len(parts[0]["test"]) == 2 and sorted(parts[0]["train"] + parts[0]["test"]) == list(range(9))
    train = labelled.splits["train"]
    batches = list(train.batches(5))
    assert [len(labels) for *_, labels in batches] == [5, 2]
    names = [train.loader.source.name(i) for i in range(7)]
    assert torch.cat([labels for *_, labels in batches]).tolist() == [int("class1" in name) for name in names]
    features, labels = train.raw()
    assert features.shape == (7, 3 * 16 * 16) and features.dtype == np.float32 and labels.shape == (7,)


def test_train_and_val_folders(tmp_path: Path):
    for part, classes in {"train": "abc", "val": "ac"}.items():
        for name in classes:
            write(tmp_path / part / name / "0.png", encoded(pixels(16, 16, 3)))
    labelled = open_labelled(str(tmp_path), config())
    assert labelled.classes == ["a", "b", "c"]
    assert next(labelled.splits["val"].batches(9))[2].tolist() == [0, 2]
    write(tmp_path / "val" / "z" / "0.png", encoded(pixels(16, 16, 3)))
    with pytest.raises(DataError, match="class 'z' of part val is not among the training classes"):
        open_labelled(str(tmp_path), config())


def test_labels_of_arrays(tmp_path: Path):
    path = tmp_path / "d.npz"
    labels = np.array([10, 2, 2, 10])
    np.savez(
        path, images=pixels(4, 16, 16), labels=labels, test_images=pixels(2, 16, 16), test_labels=[2, 10]
    )
    labelled = open_labelled(str(path), config(channels=1))
    assert labelled.classes == ["2", "10"]
    assert next(labelled.splits["train"].batches(9))[2].tolist() == [1, 0, 0, 1]
    assert next(labelled.splits["test"].batches(9))[2].tolist() == [0, 1]
    np.savez(path, images=pixels(4, 16, 16))
    with pytest.raises(DataError, match="labels missing: .*has no array called labels"):
        open_labelled(str(path), config(channels=1))


def test_labels_missing_in_a_flat_folder(tmp_path: Path):
    write(tmp_path / "a.png", encoded(pixels(16, 16, 3)))
    with pytest.raises(DataError, match=r"labels missing: .*a\.png lies in no folder of a class"):
        open_labelled(str(tmp_path), config())


def test_digits_hold_out_base_digits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(digits, "COUNTS", {"train": 2_500, "probe": 300, "test": 300})
    digits.scenes.cache_clear()
    try:
        cfg = preset("image_tiny")
        (batch,) = first(open_data("digits", cfg), micro=32)
        assert batch.source.shape == (cfg.data.batch, 1, 24, 24)
        again = first(open_data("digits", cfg), micro=32)[0]
        assert torch.equal(batch.source, again.source)
        labelled = open_labelled("digits", cfg)
        assert list(labelled.classes) == [str(i) for i in range(10)]
        features, labels = labelled.splits["test"].raw()
        assert features.shape == (300, 576) and set(labels) == set(range(10))
        assert np.bincount(labels).max() < 0.2 * 300
        images = [digits.scenes(split)[0] for split in ("train", "probe", "test")]
        digits.scenes.cache_clear()
        assert all(
            np.array_equal(a, digits.scenes(s)[0])
            for a, s in zip(images, ("train", "probe", "test"), strict=True)
        )
        report = check_data("digits", cfg)
        assert report.total == 2_500 and sum(report.facts["classes"].values()) == 2_500
    finally:
        digits.scenes.cache_clear()
