"""Speech data: files good and bad, batching by seconds, class labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from d2v.config.presets import preset
from d2v.config.run import Config
from d2v.data.loader import ORDER, generator, windows
from d2v.data.open import check_data, open_data, open_labelled
from d2v.data.speech.reading import resample
from d2v.data.types import Batch, DataError, Pipeline, Position

RATE = 16_000
START = Position()


def config(name: str = "audio_tiny", seed: int = 1, **data) -> Config:
    cfg = preset(name)
    data = {"batch": 10, "max_seconds": 2.0, "min_seconds": 0.1, "workers": 0, **data}
    return replace(cfg, data=replace(cfg.data, **data), train=replace(cfg.train, seed=seed))


def tone(seconds: float, rate: int = RATE, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def write(path: Path, wave: np.ndarray, rate: int = RATE, **kwargs) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, **kwargs)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 files of 0.3 to 2.9 s of noise, in nested folders."""
    rng = np.random.default_rng(0)
    for i in range(24):
        wave = 0.1 * rng.standard_normal(round(rng.uniform(0.3, 2.9) * RATE))
        write(tmp_path / "set" / f"speaker{i % 3}" / f"{i:02d}.wav", wave)
    return tmp_path / "set"


def steps(pipeline: Pipeline, count: int, start: Position = START, micro: int = 4) -> list[list[Batch]]:
    return list(itertools.islice(pipeline.micro_batches(start, micro), count))


def epoch(pipeline: Pipeline, number: int = 0, micro: int = 4) -> list[list[Batch]]:
    found = []
    for step in pipeline.micro_batches(Position(number, 0), micro):
        found.append(step)
        if pipeline.position.epoch != number:
            return found
    raise AssertionError("an endless stream ended")


# batches


@pytest.mark.parametrize("pad", [False, True], ids=["crop", "pad"])
def test_buckets_leave_few_shapes(folder: Path, pad: bool) -> None:
    shapes: dict[float, set[tuple[int, ...]]] = {0.0: set(), 0.5: set()}
    for bucket, found in shapes.items():
        pipeline = open_data(str(folder), config(pad=pad, bucket_seconds=bucket, batch=4))
        for number in range(4):
            ids = []
            for step in epoch(pipeline, number, micro=4):
                for batch in step:
                    found.add(tuple(batch.source.shape))
                    ids += batch.ids.tolist()
                    mask = batch.padding_mask
                    padded = torch.zeros(batch.source.shape) if mask is None else mask
                    assert batch.lengths == (batch.source.shape[1] - padded.sum(1).int()).tolist()
                    assert sum(b.source.numel() for b in step) <= 4 * RATE
            assert sorted(ids) == list(range(24))
    lengths = {length for _, length in shapes[0.5]}
    # utterances shorter than a bucket are cropped to the shortest of them, as without buckets
    assert all(length % (RATE // 2) == 0 for length in lengths if length > RATE // 2)
    assert len(shapes[0.5]) <= 7 and len(shapes[0.5]) < len(shapes[0.0]), shapes


@pytest.mark.parametrize("pad", [False, True], ids=["crop", "pad"])
def test_every_utterance_once_and_no_batch_too_long(folder: Path, pad: bool) -> None:
    pipeline = open_data(str(folder), config(pad=pad))
    orders = []
    for number in (0, 1):
        ids = []
        for step in epoch(pipeline, number):
            seconds = sum(b.source.numel() for b in step) / RATE
            assert seconds <= 10
            assert len({b.source.shape[1] for b in step}) == 1, "one length for the whole step"
            assert all(b.source.numel() / RATE <= 4 or len(b) == 1 for b in step), "micro-batch too long"
            assert all(b.epoch == number for b in step)
            ids += [i for b in step for i in b.ids.tolist()]
        assert sorted(ids) == list(range(24))
        orders.append(ids)
    assert orders[0] != orders[1]
    assert len(epoch(pipeline)) <= 1.7 * 24 * 2 / 10


def test_a_window_of_utterances_is_read_before_the_next(folder: Path) -> None:
    """Steps hold utterances of one window alone, each once in an epoch, whatever their lengths."""
    cfg = config(batch=4, shuffle_window=8)
    pipeline = open_data(str(folder), cfg)
    orders = [[i for step in epoch(pipeline, n) for b in step for i in b.ids.tolist()] for n in (0, 1)]
    assert all(sorted(ids) == list(range(24)) for ids in orders) and orders[0] != orders[1]
    for number, ids in enumerate(orders):
        assert {*ids[:8]} == {*windows(generator(cfg.train.seed, ORDER, number), 24, 8)[0].tolist()}
    resumed = steps(open_data(str(folder), cfg), 2, Position(0, 3))
    for a, b in zip(resumed, steps(pipeline, 5)[3:], strict=True):
        assert all(torch.equal(x.source, y.source) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("pad", [False, True], ids=["crop", "pad"])
def test_crops_are_pieces_of_the_normalised_utterance(folder: Path, pad: bool) -> None:
    pipeline = open_data(str(folder), config(pad=pad))
    starts = set()
    for step in epoch(pipeline):
        lengths = []
        for batch in step:
            for row, index in enumerate(batch.ids.tolist()):
                wave, _ = soundfile.read(folder / pipeline.source.name(index))
                whole = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-5)
                got = batch.source[row]
                if batch.padding_mask is not None:
                    assert got[batch.padding_mask[row]].eq(0).all()
                    got = got[~batch.padding_mask[row]]
                windows = np.lib.stride_tricks.sliding_window_view(whole, 8)
                start = int(np.abs(windows - got[:8].numpy()).max(1).argmin())
                np.testing.assert_allclose(got.numpy(), whole[start : start + len(got)], atol=1e-4)
                starts.add(start)
                lengths.append(min(len(whole), 2 * RATE))
                if pad:
                    assert len(got) == lengths[-1]
        assert step[0].source.shape[1] == (max(lengths) if pad else min(lengths))
    assert len(starts) > 5, "offsets are drawn"


def test_resuming_and_micro_batches_and_workers_change_nothing(folder: Path) -> None:
    def flat(step: list[Batch]) -> torch.Tensor:
        return torch.cat([b.source for b in step])

    expected, positions = [], [START]
    pipeline = open_data(str(folder), config())
    for step in itertools.islice(pipeline.micro_batches(START, 4), 9):
        expected.append(flat(step))
        positions.append(pipeline.position)
    assert positions[-1].epoch >= 1
    for done in (0, 2, 5, 8):
        for micro in (1, 100):
            rest = steps(open_data(str(folder), config()), 9 - done, positions[done], micro)
            assert all(torch.equal(flat(a), b) for a, b in zip(rest, expected[done:], strict=True))
    shared = steps(open_data(str(folder), config(workers=2)), 9)
    assert all(torch.equal(flat(a), b) for a, b in zip(shared, expected, strict=True))
    other = steps(open_data(str(folder), config(seed=2)), 1)
    assert other[0][0].ids.tolist() != steps(open_data(str(folder), config()), 1)[0][0].ids.tolist()


def test_in_order_gives_whole_utterances(folder: Path) -> None:
    pipeline = open_data(str(folder), config(), purpose="eval")
    names, seconds = [], 0.0
    for some, batch in pipeline.in_order(5):
        names += some
        padded = 0 if batch.padding_mask is None else batch.padding_mask.sum().item()
        seconds += (batch.source.numel() - padded) / RATE
    assert names == sorted(str(p.relative_to(folder)) for p in folder.rglob("*.wav"))
    assert seconds == pytest.approx(sum(soundfile.info(p).duration for p in folder.rglob("*.wav")))


def test_batch_settings_that_cannot_work_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"less than one batch; data.batch is 100 s"):
        open_data(str(folder), config(batch=100))
    with pytest.raises(DataError, match=r"data.batch must hold the longest crop, 2 s .*, got 1 s"):
        open_data(str(folder), config(batch=1))
    with pytest.raises(DataError, match=r"data.max_seconds must hold the receptive field of 0.035 s"):
        open_data(str(folder), config(max_seconds=0.02, min_seconds=0.01))


# files


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("a.wav", {}),
        ("a.WAV", {"format": "WAV", "subtype": "FLOAT"}),
        ("a.flac", {}),
        ("a.ogg", {"subtype": "VORBIS"}),
        ("a.opus", {"format": "OGG", "subtype": "OPUS"}),
        ("a.mp3", {}),
        ("a.aiff", {}),
    ],
)
def test_formats(tmp_path: Path, name: str, kwargs: dict[str, str]) -> None:
    write(tmp_path / name, tone(1.5), **kwargs)
    ((names, batch),) = open_data(str(tmp_path), config(), purpose="eval").in_order(4)
    assert names == [name] and batch.source.shape == (1, 1.5 * RATE)
    spectrum = torch.fft.rfft(batch.source[0]).abs()
    assert spectrum.argmax().item() / 1.5 == pytest.approx(440, abs=1)
    assert batch.source.std(correction=0).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_the_frequency(tmp_path: Path, rate: int) -> None:
    path = write(tmp_path / "a.wav", tone(1.0, rate, 1_000.0), rate)
    pipeline = open_data(str(path), config(), purpose="eval")
    ((_, batch),) = pipeline.in_order(1)
    assert batch.source.shape == (1, RATE)
    assert torch.fft.rfft(batch.source[0]).abs().argmax().item() == 1_000
    assert pipeline.report.facts["resampled"] == 1
    assert pipeline.report.facts["sample_rates"] == {str(rate): 1}


def test_resampling_does_not_alias() -> None:
    high = resample(tone(1.0, 48_000, 12_000.0).astype(np.float32), 48_000, RATE)
    assert high.dtype == np.float32 and len(high) == RATE
    assert np.abs(high[500:-500]).max() < 0.01, "12 kHz does not fit into 16 kHz"


def test_manifest_of_the_original(folder: Path, tmp_path: Path) -> None:
    files = sorted(folder.rglob("*.wav"))[:7]
    lines = [f"{p.relative_to(folder)}\t{soundfile.info(p).frames}" for p in files]
    manifest = tmp_path / "train.tsv"
    manifest.write_text("\n".join([str(folder), *lines]) + "\n")
    pipeline = open_data(str(manifest), config(batch=4))
    assert {i for step in epoch(pipeline) for b in step for i in b.ids.tolist()} == set(range(7))
    manifest.write_text("\n".join(["set", lines[0]]) + "\n")
    assert len(open_data(str(manifest), config(), purpose="eval").source) == 1, (
        "root relative to the manifest"
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "line 1: must be the folder of the audio files, got ''"),
        ("/nowhere\na.wav\t100\n", "line 1: must be the folder of the audio files, got '/nowhere'"),
        (".\na.wav 100\n", "line 2: must be path<TAB>frames, got 'a.wav 100'"),
        (".\n", "no audio files"),
        (".\nmissing.wav\t16000\n", "missing.wav: does not exist"),
    ],
    ids=["empty", "root", "separator", "no files", "missing file"],
)
def test_bad_manifests(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.tsv").write_text(text)
    with pytest.raises(DataError) as error:
        open_data(str(tmp_path / "m.tsv"), config())
    assert message in str(error.value)


def test_manifest_that_disagrees_with_a_file(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", tone(1.0))
    write(tmp_path / "b.wav", tone(1.0))
    (tmp_path / "m.tsv").write_text(".\na.wav\t16000\nb.wav\t20000\n")
    report = check_data(str(tmp_path / "m.tsv"), config())
    reason = "has 16000 frames at 16000 Hz, but the index says 20000 at 16000 Hz"
    assert report.unreadable == {"b.wav": reason}


# bad input


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated wav": (
        "x.wav",
        lambda p: (write(p, tone(1)), cut_in_half(p)),
        "truncated: 32000 bytes of sound",
    ),
    "truncated flac": ("x.flac", lambda p: (write(p, tone(1)), cut_in_half(p)), "lost sync"),
    "truncated vorbis": (
        "x.ogg",
        lambda p: (write(p, tone(60)), cut_in_half(p)),
        "truncated: the Ogg stream",
    ),
    "truncated opus": (
        "x.opus",
        lambda p: (write(p, tone(20), format="OGG", subtype="OPUS"), cut_in_half(p)),
        "truncated: the Ogg stream",
    ),
    "truncated mp3": (
        "x.mp3",
        lambda p: (write(p, tone(3)), cut_in_half(p)),
        "truncated: 4392 bytes of sound announced, 2196 there",
    ),
    "absurd rate": ("x.wav", lambda p: write(p, tone(1), 2_000), "has a sample rate of 2000 Hz"),
    "not audio": ("x.wav", lambda p: p.write_text("hello"), "Format not recognised"),
    "empty file": ("x.flac", lambda p: p.write_bytes(b""), "is empty"),
    "NaN": ("x.wav", lambda p: write(p, np.full(9000, np.nan), subtype="FLOAT"), "holds NaN or inf"),
}


@pytest.mark.parametrize("name, make, reason", BAD.values(), ids=BAD)
def test_bad_files_are_listed_with_their_reason(
    tmp_path: Path, name: str, make: Callable[[Path], object], reason: str
) -> None:
    for i in range(4):
        write(tmp_path / f"good{i}.wav", tone(3.0))
    make(tmp_path / name)
    report = check_data(str(tmp_path), config(batch=4))
    assert report.total == 5 and list(report.unreadable) == [name]
    assert reason in report.unreadable[name] and not report.refused
    strict = config(batch=4, max_unreadable=0.0)
    with pytest.raises(DataError, match=r"1 of 5 samples unreadable, more than 0 \(data.max_") as error:
        epoch(open_data(str(tmp_path), strict))
    assert f"{name}: " in str(error.value) and reason in str(error.value)
    assert check_data(str(tmp_path), strict).refused == str(error.value)


@pytest.mark.parametrize("broken", ["header", "body"])
def test_up_to_one_percent_bad_files_are_skipped_and_counted(tmp_path: Path, broken: str) -> None:
    wave = np.random.default_rng(0).standard_normal(RATE // 5) * 0.1
    for i in range(100):
        write(tmp_path / f"{i:03d}.flac", wave)
    path = tmp_path / "050.flac"
    path.write_bytes(b"" if broken == "header" else path.read_bytes()[: path.stat().st_size // 2])
    pipeline = open_data(str(tmp_path), config(batch=3))
    ids = [i for step in epoch(pipeline) for b in step for i in b.ids.tolist()]
    names = [pipeline.source.name(i) for i in ids]
    assert "050.flac" not in names and len(set(names)) == 99
    assert list(pipeline.report.unreadable) == ["050.flac"]
    if broken == "body":
        assert len(names) == 100, "another utterance of the step takes its place"


def test_short_utterances_are_skipped_and_counted(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"good{i}.wav", tone(3.0))
    write(tmp_path / "short.wav", tone(0.2))
    pipeline = open_data(str(tmp_path), config(batch=4, min_seconds=0.5))
    assert pipeline.report.skipped == {"shorter than data.min_seconds (0.5 s)": ["short.wav"]}
    assert len(pipeline.source) == 3
    with pytest.raises(DataError, match=r"none of 1 utterances .* longest, short.wav, lasts 0.2 s"):
        open_data(str(tmp_path / "short.wav"), config(min_seconds=0.5))


@pytest.mark.parametrize("name, field", [("audio_tiny", 560), ("audio_base", 400)])
def test_shorter_than_the_receptive_field_is_named(tmp_path: Path, name: str, field: int) -> None:
    write(tmp_path / "click.wav", tone(1)[: field - 1])
    with pytest.raises(DataError) as error:
        open_data(str(tmp_path), config(name, min_seconds=0.001))
    assert f"click.wav: {field - 1} samples are shorter than the receptive field of {field}" in str(
        error.value
    )
    write(tmp_path / "click.wav", tone(1)[:field])
    assert len(open_data(str(tmp_path), config(name, min_seconds=0.001), purpose="eval").source) == 1


def test_folders_without_audio(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no audio files \(wav, flac"):
        open_data(str(tmp_path / "empty"), config())
    (tmp_path / "train.tsv").write_text(".\n")
    with pytest.raises(DataError, match=r"train.tsv: no audio files"):
        open_data(str(tmp_path), config())
    (tmp_path / "lists").mkdir()
    for part, name in (("train", "a"), ("valid", "b")):
        write(tmp_path / f"{name}.wav", tone(2))
        (tmp_path / "lists" / f"{part}.tsv").write_text(f"..\n{name}.wav\t32000\n")
    pipeline = open_data(str(tmp_path / "lists"), config(batch=2))
    assert [Path(pipeline.source.name(i)).name for i in range(len(pipeline.source))] == ["a.wav"]
    assert any("the part train is read, valid left out" in note for note in pipeline.report.notes)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_channels_are_averaged(suffix: str, tmp_path: Path) -> None:
    left, right = tone(1.0), 0.5 * np.sin(np.arange(16_000) / 3)
    write(tmp_path / f"a.{suffix}", np.stack([left, right], axis=1))
    write(tmp_path / "b.wav", (left + right) / 2, subtype="FLOAT")
    waves = {}
    for _, batch in open_data(str(tmp_path), config(batch=2, wave_norm="none")).in_order(1):
        waves[int(batch.ids[0])] = batch.source[0]
    assert (waves[0] - waves[1]).abs().max() < (0.05 if suffix == "ogg" else 1e-4)


def test_check_reports_what_is_there(tmp_path: Path) -> None:
    for i, (rate, seconds) in enumerate([(16_000, 0.3), (8_000, 1.5), (8_000, 3.0), (44_100, 70.0)]):
        write(tmp_path / f"{i}.wav", tone(seconds, rate), rate)
    write(tmp_path / "stereo.wav", np.zeros((16_000, 2)))
    report = check_data(str(tmp_path), config(min_seconds=0.5))
    assert report.total == 5
    assert report.facts["sample_rates"] == {"8000": 2, "16000": 2, "44100": 1}
    assert report.facts["channels"] == {"1": 4, "2": 1}
    assert report.facts["formats"] == {"WAV PCM_16": 5}
    assert report.facts["hours"] == pytest.approx(75.8 / 3600, abs=1e-4)
    assert report.facts["length_histogram"] == {"1-2 s": 2, "2-4 s": 1, "over 60 s": 1}
    assert report.skipped == {"shorter than data.min_seconds (0.5 s)": ["0.wav"]}
    assert report.facts["usable"] == 4
    assert report.unreadable == {} and report.notes == [
        "1 files have several channels, which are averaged (data.channels)"
    ]


# labels


def labelled_folder(root: Path, classes: dict[str, int], seconds: float = 0.5) -> Path:
    for number, (name, count) in enumerate(classes.items()):
        for i in range(count):
            write(root / name / f"{i}.wav", tone(seconds, hertz=300.0 * (number + 1)))
    return root


def test_class_folders(tmp_path: Path) -> None:
    labelled = open_labelled(str(labelled_folder(tmp_path, {"low": 10, "high": 5})), config())
    assert labelled.level == "sample" and labelled.classes == ["high", "low"]
    train, test = labelled.splits["train"], labelled.splits["test"]
    assert (len(train), len(test)) == (12, 3), "every fifth file of a class"
    labels = torch.cat([labels for _, _, labels in train.batches(4)])
    assert labels.tolist() == [0] * 4 + [1] * 8
    features, target = test.raw()
    assert features.shape == (3, 160) and target.tolist() == [0, 1, 1]
    assert np.abs(features[0] - features[1]).max() > 1 > np.abs(features[1] - features[2]).max()


def test_train_and_test_folders(tmp_path: Path) -> None:
    labelled_folder(tmp_path / "train", {"a": 3, "b": 2})
    labelled_folder(tmp_path / "test", {"b": 2})
    labelled = open_labelled(str(tmp_path), config("audio_base"))
    assert [len(s) for s in labelled.splits.values()] == [5, 2]
    assert labelled.splits["test"].raw()[1].tolist() == [1, 1]
    labelled_folder(tmp_path / "test", {"c": 1})
    with pytest.raises(DataError, match="class 'c' of part test is not among the training classes"):
        open_labelled(str(tmp_path), config())


def test_labels_missing(tmp_path: Path) -> None:
    for i in range(6):
        write(tmp_path / "flat" / f"{i}.wav", tone(0.5))
    with pytest.raises(DataError, match=r"labels missing: .*0.wav lies in none"):
        open_labelled(str(tmp_path / "flat"), config())
    with pytest.raises(DataError, match=r"labels missing: .*got a file"):
        open_labelled(str(tmp_path / "flat" / "0.wav"), config())
    labelled_folder(tmp_path / "one", {"only": 6})
    with pytest.raises(DataError, match=r"labels missing: .*at least 2 classes are needed, got \['only'\]"):
        open_labelled(str(tmp_path / "one"), config())
    labelled_folder(tmp_path / "few", {"a": 1, "b": 1})
    with pytest.raises(DataError, match="every class has one sample alone, so none is left for testing"):
        open_labelled(str(tmp_path / "few"), config())
