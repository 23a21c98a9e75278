"""From a path to a task's batches: an endless training stream with labels, and held-out parts in order."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..config.fronts import LogMelFront, TextFront, WaveformFront
from ..config.run import Config, TrainConfig
from ..config.tune import FineTuneConfig
from .images.augment import AugmentedImages
from .images.pipeline import ImageSplit
from .loader import LIMIT, Loader, Source, generator
from .open import open_labelled
from .remote import at_hand
from .speech.pipeline import AudioSplit
from .speech.source import AudioSource
from .speech.transcripts import SpokenPart, Vocabulary, read_spoken
from .splits import to_score
from .text.labelled import Sentence, read_labelled
from .text.sentences import SentencePart, SentenceSource, Specials, Targets, encode, targets_of
from .text.tokenizer import check_block, check_tokenizer, check_vocabulary, load_tokenizer
from .types import DataError, Labelled, Split


class Part(Protocol):
    """A held-out part, always in the same order."""

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor | None, Any]]:
        """source, padding_mask, and labels: [B] classes or numbers, or B texts."""
        ...


@dataclass
class TuneData:
    """What a run reads."""

    loader: Loader
    labels: Callable[[Tensor], Any]
    """of training samples, by their numbers [B]: [B] classes or numbers, or a list of letters each"""
    parts: dict[str, Part]
    outputs: int
    """of the head"""
    names: list[str]
    """class names or letters; empty for regression"""


def open_tune_data(
    path: str, cfg: FineTuneConfig, *, device: torch.device, encoder_dir: Path | None, run_dir: Path
) -> TuneData:
    """The data of a task.

    encoder_dir: folder of the encoder's tokenizer.json, where there is one; it, and a vocabulary counted on
    the data, are kept in run_dir and found there again. Raises DataError and ValueError.
    """
    open_task = {"classify": _classes, "sentence": _sentences, "ctc": _spoken}[cfg.head.task]
    path = at_hand(path)
    data = open_task(path, cfg, device, encoder_dir, run_dir)
    for name, part in data.parts.items():
        if not len(part):
            raise DataError(f"data: {path}: part {name} is empty")
    return data


def open_to_score(path: str, cfg: FineTuneConfig, names: Sequence[str], *, run_dir: Path) -> dict[str, Part]:
    """The parts of a data set that a run of `cfg` in run_dir is scored on: what is held out, or all of it.

    names: the run's classes or letters. Raises DataError.
    """
    path = at_hand(path)
    if cfg.head.task == "classify":
        labelled = open_labelled(path, as_pretraining(cfg), run_dir=run_dir, classes=names)
        return dict(_by_sample(labelled, path))
    if cfg.head.task == "sentence":
        found, report = read_labelled(path, cfg.glue, numbers=cfg.head.regression, score=True, data=cfg.data)
        encoded, pad = _encoded(path, cfg, found, Targets(list(names)), run_dir / "tokenizer.json")
        return {name: SentencePart(*some, pad, report) for name, some in to_score(encoded).items()}
    base, rate = _padded(cfg)
    spoken = to_score(read_spoken(path, base, rate, score=True))
    vocabulary = Vocabulary(tuple(names))
    return {name: SpokenPart(part, path, base, vocabulary) for name, part in spoken.items()}


def as_pretraining(cfg: FineTuneConfig) -> Config:
    """What the readers of `d2v.data.types` take."""
    return Config(preset=cfg.recipe, model=cfg.model, data=cfg.data, train=TrainConfig(seed=cfg.train.seed))


def _classes(
    path: str, cfg: FineTuneConfig, device: torch.device, encoder_dir: Path | None, run_dir: Path
) -> TuneData:
    labelled = open_labelled(path, as_pretraining(cfg), run_dir=run_dir)
    held = _by_sample(labelled, path)
    train = labelled.splits["train"]
    assert isinstance(train, (ImageSplit, AudioSplit))
    labels = np.array([int(label) for label in train.labels])
    keep = choose(labels, cfg.data_limit, cfg.train.seed)
    chosen = train.select(keep)
    source: Source = chosen.source
    report = train.loader.report
    if isinstance(chosen, ImageSplit):
        source = AugmentedImages(chosen.source, cfg.augment)
        report = replace(report, total=len(chosen))
    kept = torch.from_numpy(labels[keep])
    return TuneData(
        Loader(source, cfg.data, device, report),
        lambda ids: kept[ids].to(device, non_blocking=True),
        dict(held),
        len(labelled.classes),
        list(labelled.classes),
    )


def _by_sample(labelled: Labelled, path: str) -> dict[str, Split]:
    """The parts to score. DataError where labels are of tokens."""
    if labelled.level == "token":
        raise DataError(f"data: {path} labels tokens, not samples: use --task ctc, or `d2v probe`")
    return to_score(labelled.splits)


def choose(labels: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """The numbers of `limit` samples, ascending, as many of each class as there are; all without a limit.

    ValueError for less than one of each class.
    """
    if limit is None or limit >= len(labels):
        return np.arange(len(labels))
    classes = np.unique(labels)
    if limit < len(classes):
        raise ValueError(
            f"finetune: data_limit must be at least one of each of {len(classes)} classes, got {limit}"
        )
    order = generator(seed, LIMIT).permutation(len(labels))
    # the first of every class, then the second of every class, ...
    rank = np.empty(len(labels), dtype=np.int64)
    for name in classes:
        members = order[labels[order] == name]
        rank[members] = np.arange(len(members))
    return np.sort(order[np.argsort(rank[order], kind="stable")][:limit])


def _sentences(
    path: str, cfg: FineTuneConfig, device: torch.device, encoder_dir: Path | None, run_dir: Path
) -> TuneData:
    found, report = read_labelled(path, cfg.glue, numbers=cfg.head.regression, data=cfg.data)
    targets = targets_of(found["train"], cfg.head.regression)
    encoded, pad = _encoded(path, cfg, found, targets, _tokenizer(encoder_dir, run_dir))
    tokens, labels = encoded["train"]
    keep = np.arange(len(labels))
    if cfg.data_limit is not None:
        strata = np.zeros_like(keep) if cfg.head.regression else labels
        keep = choose(strata, cfg.data_limit, cfg.train.seed)
    source = SentenceSource(
        path, [tokens[i] for i in keep], cfg.train.seed, cfg.data.batch, pad, cfg.data.shuffle_window
    )
    kept = torch.from_numpy(labels[keep])
    parts: dict[str, Part] = {
        name: SentencePart(*some, pad, report) for name, some in encoded.items() if name != "train"
    }
    return TuneData(
        Loader(source, cfg.data, device, report),
        lambda ids: kept[ids].to(device, non_blocking=True),
        parts,
        1 if cfg.head.regression else len(targets.classes),
        targets.classes,
    )


def _encoded(
    path: str, cfg: FineTuneConfig, found: dict[str, list[Sentence]], targets: Targets, tokenizer_file: Path
) -> tuple[dict[str, tuple[list[np.ndarray], np.ndarray]], int]:
    """Of each part the tokens of its samples and their labels; and the token of padding."""
    front = cfg.model.front
    assert isinstance(front, TextFront)
    tokenizer = load_tokenizer(tokenizer_file)
    specials = Specials.of(tokenizer, front.pad_id) if cfg.transformers else None
    if specials is None:
        check_tokenizer(tokenizer, str(tokenizer_file), front)
        specials = Specials()
    else:
        check_vocabulary(tokenizer, str(tokenizer_file), front)
    block = min(cfg.data.block, front.max_positions)
    check_block(block, front)
    encoded = {
        name: (encode(some, tokenizer, block, specials), targets.encode(some, f"{path}, {name}"))
        for name, some in found.items()
    }
    return encoded, specials.pad


def _tokenizer(encoder_dir: Path | None, run_dir: Path) -> Path:
    """The encoder's tokenizer, copied into the run."""
    kept = run_dir / "tokenizer.json"
    if kept.is_file():
        return kept
    if encoder_dir is None or not (encoder_dir / "tokenizer.json").is_file():
        raise DataError(f"data: the encoder's tokenizer.json is missing from {encoder_dir}")
    shutil.copyfile(encoder_dir / "tokenizer.json", kept)
    return kept


def _padded(cfg: FineTuneConfig) -> tuple[Config, int]:
    """What the readers of speech take for CTC, and the sample rate."""
    base, front = as_pretraining(cfg), cfg.model.front
    assert isinstance(front, (WaveformFront, LogMelFront))
    return replace(base, data=replace(base.data, pad=True)), front.sample_rate


def _spoken(
    path: str, cfg: FineTuneConfig, device: torch.device, encoder_dir: Path | None, run_dir: Path
) -> TuneData:
    base, rate = _padded(cfg)
    found = read_spoken(path, base, rate)
    given = None if cfg.vocabulary is None else Vocabulary.read(Path(cfg.vocabulary))
    front = cfg.model.front
    assert isinstance(front, (WaveformFront, LogMelFront))
    train = found.pop("train").that_fits(path, front, given)
    if cfg.data_limit is not None and cfg.data_limit < len(train.texts):
        train = train.select(choose(np.zeros(len(train.texts), int), cfg.data_limit, cfg.train.seed))
    file = run_dir / "vocabulary.json"
    if file.is_file():
        vocabulary = Vocabulary.read(file)
    else:
        vocabulary = given or Vocabulary.of(train.texts)
        vocabulary.write(file)
    letters = [vocabulary.encode(text) for text in train.texts]
    source = AudioSource(path, train.utterances, base)
    if source.capped.max() > base.data.batch * rate:
        raise DataError(
            f"data: {path}: data.batch must hold the longest utterance, {source.capped.max() / rate:g} s, "
            f"got {base.data.batch} s"
        )
    parts: dict[str, Part] = {name: SpokenPart(part, path, base, vocabulary) for name, part in found.items()}
    return TuneData(
        Loader(source, base.data, device, train.report),
        lambda ids: [letters[i] for i in ids.tolist()],
        parts,
        len(vocabulary.letters),
        list(vocabulary.letters),
    )


def span_mask(
    lengths: np.ndarray, size: int, prob: float, length: int, rngs: list[np.random.Generator], least: int = 1
) -> np.ndarray:
    """[B,size] bool: spans of `length`, their number and places drawn per row, rows masked equally often.

    lengths: [B] places of a row that may be masked. least: spans of a row at least.
    Source: fairseq/data/data_utils.py, compute_mask_indices with its "static" spans and require_same_masks.
    """
    rows = []
    for count, rng in zip(lengths.tolist(), rngs, strict=True):
        spans = max(least, int(prob * count / length + rng.random()))
        shortest = length
        if count - shortest <= spans:
            shortest = count - spans - 1
        if spans == 0 or count - shortest <= 0:
            rows.append(np.empty(0, dtype=np.int64))
            continue
        starts = rng.choice(count - shortest, min(spans, count - shortest), replace=False)
        places = np.unique((starts[:, None] + np.arange(length)).ravel())
        rows.append(places[places < count])
    fewest = min(len(row) for row in rows)
    mask = np.zeros((len(rows), size), dtype=bool)
    for i, (row, rng) in enumerate(zip(rows, rngs, strict=True)):
        mask[i, rng.choice(row, fewest, replace=False) if len(row) > fewest else row] = True
    return mask
