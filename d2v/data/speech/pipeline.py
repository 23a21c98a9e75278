"""Speech from a folder, file, manifest or the embedded set: training batches, labelled splits, a check.

The model gets waveforms for either front end; log-mel spectra are its own business. Batching is in
`source`, files in `files`.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ...config.fronts import LogMelFront, WaveformFront
from ...config.run import Channels, Config, DataConfig
from ...model.logmel import log_mel
from ..arrow import SUFFIXES as ROWS
from ..embedded import speech
from ..loader import Loader, number_classes
from ..splits import divide, for_training, labelled, to_divide, to_score, training_classes
from ..tables import IN_NO_TABLE
from ..types import Batch, DataError, Labelled, LabelledBatch, Pipeline, Report, Split, Unreadable
from ..walk import suffix_of
from .files import FileUtterances, Listing, Utterances, in_threads, list_audio, told_of
from .reading import Header
from .source import AudioSource, SpeechUtterances, normalise_wave

BINS = (0.0, 0.5, 1, 2, 4, 8, 12, 16, 20, 30, 60, math.inf)
"""seconds: edges of the length histogram of `check_data`"""


def find_usable(utterances: Utterances, cfg: Config, report: Report) -> np.ndarray:
    """[k] int64: the utterances that are long enough; the others are counted in `report`."""
    front = _front(cfg)
    long_enough = utterances.lengths >= cfg.data.min_seconds * front.sample_rate
    short = [utterances.names[i] for i in np.flatnonzero(~long_enough)]
    report.skip(f"shorter than data.min_seconds ({cfg.data.min_seconds} s)", short)
    for i in np.flatnonzero(long_enough & (utterances.lengths < front.receptive_field)):
        report.unreadable[utterances.names[i]] = (
            f"{utterances.lengths[i]} samples are shorter than the receptive field of {front.receptive_field}"
        )
        long_enough[i] = False
    return np.flatnonzero(long_enough)


def _front(cfg: Config) -> WaveformFront | LogMelFront:
    front = cfg.model.front
    assert isinstance(front, (WaveformFront, LogMelFront))
    shortest, rate = front.receptive_field, front.sample_rate
    if int(cfg.data.max_seconds * rate) < shortest:
        raise DataError(
            f"data: data.max_seconds must hold the receptive field of {shortest / rate:g} s, "
            f"got {cfg.data.max_seconds}"
        )
    return front


def read_index(listing: Listing, rate: int, channels: Channels, report: Report) -> FileUtterances:
    """What can be told without decoding: the utterances with good headers, the others in the report."""
    found = listing.read_headers()
    report.total += len(found)
    good: list[tuple[str, Header]] = []
    for name, header in zip(listing.names, found, strict=True):
        if reason := header if isinstance(header, str) else header.problem(channels):
            report.unreadable[name] = reason
        elif isinstance(header, Header):
            good.append((name, header))
    headers = [header for header in found if isinstance(header, Header)]
    for fact, field in (("sample_rates", "rate"), ("channels", "channels"), ("formats", "format")):
        counts = Counter(getattr(header, field) for header in headers)
        report.facts[fact] = {str(value): count for value, count in sorted(counts.items())}
    report.notes += told_of(headers, channels)
    report.facts["resampled"] = sum(header.rate != rate for _, header in good)
    names, headers = [name for name, _ in good], [header for _, header in good]
    return listing.utterances(names, headers, rate)


def _embedded(cfg: Config, split: speech.SplitName, report: Report) -> SpeechUtterances:
    numbers = [i for i, u in enumerate(speech.utterances()) if u.split == split]
    report.total = len(numbers)
    return SpeechUtterances(np.array(numbers, dtype=np.int64), _front(cfg).sample_rate)


def _usable(utterances: Utterances, cfg: Config, report: Report) -> Utterances:
    """Those that are long enough; the rest in the report. DataError when there are none."""
    rate = _front(cfg).sample_rate
    usable = find_usable(utterances, cfg, report)
    report.stop_if_too_many()
    if not len(usable):
        raise DataError(_none_usable(utterances, rate, report))
    utterances = utterances.select(usable)
    report.facts["usable"] = len(utterances)
    report.facts["hours"] = round(float(utterances.lengths.sum()) / rate / 3600, 4)
    return utterances


def _none_usable(utterances: Utterances, rate: int, report: Report) -> str:
    said = f"data: {report.path}: none of {report.total} utterances can be used: {'; '.join(report.lines())}"
    if not len(utterances):
        return said
    longest = int(utterances.lengths.argmax())
    return f"{said}; the longest, {utterances.names[longest]}, lasts {utterances.lengths[longest] / rate:g} s"


def _open(path: str, cfg: Config, purpose: str, report: Report) -> Utterances:
    """The usable utterances for training, or all of them (of the embedded set the test split)."""
    if path == "speech":
        return _usable(_embedded(cfg, "train" if purpose == "train" else "test", report), cfg, report)
    listing = list_audio(Path(path), report, cfg.data)
    if purpose == "train":
        listing = listing.select(for_training(listing.parts, report))
    return _usable(read_index(listing, _front(cfg).sample_rate, cfg.data.channels, report), cfg, report)


def open_data(
    path: str,
    cfg: Config,
    *,
    device: torch.device,
    purpose: str,
    run_dir: Path | None,
) -> Pipeline:
    """See `d2v.data.open.open_data`; nothing is kept in `run_dir`.

    Of the embedded set, training gets the train split, evaluation the test split of the same voices.
    """
    report = Report.of(path, cfg.data)
    source = AudioSource(path, _open(path, cfg, purpose, report), cfg)
    if purpose == "train":
        _check_batch(source, cfg.data)
    return Loader(source, cfg.data, device, report)


def _check_batch(source: AudioSource, cfg: DataConfig) -> None:
    longest, total = source.capped.max() / source.rate, source.capped.sum() / source.rate
    if longest > cfg.batch:
        raise DataError(
            f"data: {source.path}: data.batch must hold the longest crop, {longest:g} s "
            f"(data.max_seconds is {cfg.max_seconds:g}), got {cfg.batch} s"
        )
    if total < cfg.batch:
        raise DataError(
            f"data: {source.path}: {total:.1f} s in {len(source)} utterances (crops of at most "
            f"{cfg.max_seconds:g} s) are less than one batch; data.batch is {cfg.batch} s"
        )


class AudioSplit(Split):
    """Labelled utterances, whole; unreadable ones are left out of both iterators and counted."""

    def __init__(self, source: AudioSource, labels: list[np.ndarray], cfg: Config, report: Report) -> None:
        """labels: one int64 array per utterance, [] for the utterance or [tokens]"""
        self.source, self.labels, self.cfg = source, labels, cfg
        self.front = _front(cfg)
        self.loader = Loader(source, cfg.data, torch.device("cpu"), report)

    def __len__(self) -> int:
        return len(self.source)

    def select(self, keep: np.ndarray) -> AudioSplit:
        source = AudioSource(self.source.path, self.source.utterances.select(keep), self.cfg)
        return AudioSplit(source, [self.labels[i] for i in keep.tolist()], self.cfg, self.loader.report)

    def batches(self, size: int) -> Iterator[LabelledBatch]:
        """Waveforms [B,samples], padding or None, labels [B] or [B,T] with -1 on padding."""
        return self._labelled(self.loader.in_order(size))

    def drawn(self, choices: Iterable[np.ndarray]) -> Iterator[LabelledBatch]:
        """See `Split.drawn`; one loader reads them all."""
        return self._labelled(self.loader.chosen(choices))

    def _labelled(self, loaded: Iterable[tuple[list[str], Batch]]) -> Iterator[LabelledBatch]:
        for _, batch in loaded:
            labels = [torch.from_numpy(self.labels[i]) for i in batch.ids.tolist()]
            if labels[0].ndim:
                tokens = self.front.frames(batch.source.shape[1])
                labels = [F.pad(one, (0, tokens - len(one)), value=-1) for one in labels]
            yield batch.source, batch.padding_mask, torch.stack(labels)

    def raw(self) -> tuple[np.ndarray, np.ndarray]:
        """Log-mel features: per token as `LogMelFront` has them; per utterance their mean and deviation.

        For the waveform front end one spectrum per token, over the samples the token sees.
        """
        front = _spectral(self.front)
        features, labels = [], []
        for _, batch in self.loader.in_order(1):
            label = self.labels[int(batch.ids)]
            wave = batch.source
            if self.cfg.data.wave_norm == "none":  # the baseline is the same for every encoder
                wave = normalise_wave(wave[0], "fairseq")[None]
            mel = log_mel(wave, front, normalise=bool(label.ndim))[0]
            if not label.ndim:
                mel = torch.cat([mel.mean(0), mel.std(0, correction=0)])[None]
            features.append(mel.numpy())
            labels.append(np.atleast_1d(label))
        return np.concatenate(features), np.concatenate(labels)


def _hop(front: WaveformFront | LogMelFront) -> int:
    """Samples from one token to the next."""
    if isinstance(front, LogMelFront):
        return front.hop * front.stack
    return math.prod(stride for _, _, stride in front.conv_layers)


def _spectral(front: WaveformFront | LogMelFront) -> LogMelFront:
    """A log-mel front end with the tokens of `front`."""
    if isinstance(front, LogMelFront):
        return front
    return LogMelFront(sample_rate=front.sample_rate, window=front.receptive_field, hop=_hop(front), stack=1)


def _phone_labels(utterances: SpeechUtterances, front: WaveformFront | LogMelFront) -> list[np.ndarray]:
    """The phone at the centre of what each token sees, [tokens] int64 per utterance."""
    labels = []
    for number, length in zip(utterances.numbers, utterances.lengths.tolist(), strict=True):
        centre = np.arange(front.frames(length)) * _hop(front) + front.receptive_field / 2
        labels.append(speech.utterances()[number].phones_at(centre * speech.SAMPLE_RATE / front.sample_rate))
    return labels


def open_labelled(
    path: str, cfg: Config, *, run_dir: Path | None, classes: Sequence[str] | None = None
) -> Labelled:
    """See `d2v.data.open.open_labelled`. The embedded set has the phone of every token and a third split
    `unseen_voice`. In a folder every subfolder is a class of utterances; parts are known by the names of
    folders above them, or else made by `divide`."""
    splits: dict[str, Split] = {}
    if path == "speech":
        for part in speech.SPLITS:
            report = Report.of(path, cfg.data)
            utterances = _usable(_embedded(cfg, part, report), cfg, report)
            assert isinstance(utterances, SpeechUtterances)
            source = AudioSource(path, utterances, cfg)
            splits[part] = AudioSplit(source, _phone_labels(utterances, _front(cfg)), cfg, report)
        return Labelled(splits, speech.phone_names(), "token")
    if not Path(path).is_dir() and suffix_of(path) not in (*ROWS, ".tar"):
        raise DataError(f"labels missing: {path}: one folder per class is needed, got a file")
    parts = _classed(path, cfg, score=classes is not None)
    by_part = {name: number_classes(named)[0] for name, (_, named, _) in parts.items()}
    known = training_classes(by_part, path, classes)
    number = {name: np.array(i, dtype=np.int64) for i, name in enumerate(known)}
    for name, (utterances, named, report) in parts.items():
        labels = [number[one] for one in named]
        splits[name] = AudioSplit(AudioSource(path, utterances, cfg), labels, cfg, report)
    return Labelled(splits, list(number), "sample")


def _classed(path: str, cfg: Config, score: bool) -> dict[str, tuple[Utterances, list[str], Report]]:
    """The usable utterances of each part (or of those to score), the class of each, a report of each part."""
    opened = Report.of(path, cfg.data)
    listing = list_audio(Path(path), opened, cfg.data, "classes")
    level = listing.level
    known, why = (listing.described, "") if listing.rows is None else listing.rows.classes()
    if known is not None and listing.rows is None:
        opened.leave_out(IN_NO_TABLE, [name for name in listing.names if name not in known])
        has = np.array([name in known for name in listing.names])
        listing.parts = {part: some[has[some]] for part, some in listing.parts.items()}

    def lacks(numbers: np.ndarray) -> str:
        names = (listing.names[i] for i in numbers.tolist())
        if known is not None:
            return why if any(name not in known for name in names) else ""
        return next((f"{name} lies in no folder" for name in names if len(Path(name).parts) < level + 2), "")

    chosen = labelled(listing.parts, lacks, opened)
    if known is not None and (bare := next(filter(None, map(lacks, chosen.values())), "")):
        raise DataError(f"labels missing: {bare}")
    parts: dict[str, tuple[Utterances, list[str], Report]] = {}
    for part, numbers in chosen.items():
        report = dataclasses.replace(opened, unreadable={}, skipped={}, facts={}, notes=[])
        utterances = _usable(
            read_index(listing.select(numbers), _front(cfg).sample_rate, cfg.data.channels, report),
            cfg,
            report,
        )
        classes = _classes(path, utterances, level) if known is None else [known[n] for n in utterances.names]
        parts[part] = (utterances, classes, report)
    if score:
        return to_score(parts)
    whole = to_divide(parts, path)
    if whole is None:
        return parts
    utterances, classes, report = whole
    return {
        part: (utterances.select(some), [classes[i] for i in some.tolist()], report)
        for part, some in divide(classes).items() if len(some)
    }  # fmt: skip


def _classes(path: str, utterances: Utterances, level: int) -> list[str]:
    """The class folder of each utterance, the first below those of parts."""
    for name in utterances.names:
        if len(Path(name).parts) < level + 2:
            raise DataError(f"labels missing: {path}: one folder per class is needed, {name} lies in none")
    return [Path(name).parts[level] for name in utterances.names]


def check_data(path: str, cfg: Config, report: Report, any_batch: bool) -> None:
    """See `d2v.data.open.check_data`: rates, channels, formats and lengths of the sounds."""
    rate = _front(cfg).sample_rate
    utterances = _open(path, cfg, "train", report)

    def reason(index: int) -> str:
        try:
            utterances.wave(index, cfg.data.channels)
        except Unreadable as error:
            return str(error)
        return ""

    for name, text in zip(utterances.names, in_threads(reason, range(len(utterances))), strict=True):
        if text:
            report.unreadable[name] = text
    histogram, _ = np.histogram(utterances.lengths / rate, BINS)
    report.facts["length_histogram"] = {
        f"{low:g}-{high:g} s" if high < math.inf else f"over {low:g} s": int(n)
        for low, high, n in zip(BINS, BINS[1:], histogram, strict=False)
        if n
    }
    report.stop_if_too_many()
    if not any_batch:
        _check_batch(AudioSource(path, utterances, cfg), cfg.data)
