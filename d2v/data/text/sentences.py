"""Labelled sentences and pairs of them: JSON lines, GLUE's own files, or the embedded paragraphs.

A sample is `<s> a </s>`, a pair `<s> a </s> </s> b </s>` (RoBERTa's, and the original's GLUE configs); for a
model of transformers it is what its tokenizer says, BERT's `[CLS] a [SEP] b [SEP]`. It is cut to data.block
tokens from the end of the longer text, as the tokenizers library does (longest_first). Labels are class
names, or numbers for regression.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..loader import Source, number_classes
from ..types import Batch, DataError, LabelledBatch, Report
from .corpus import json_lines, labelled_texts
from .tokenizer import BOS, EOS, PAD

HELD_OUT = ("dev", "valid", "val", "test")
"""stems of files for evaluation, in order of preference"""


class Sentence(NamedTuple):
    """One sample."""

    texts: tuple[str, ...]
    """one or two"""
    label: str


class GlueTask(NamedTuple):
    """How a task's .tsv files are read: columns by the name in the header, or by number without one."""

    texts: tuple[str, ...]
    label: str
    evaluated: tuple[str, ...] = ("dev",)
    """stems of the files that are evaluated"""
    header: bool = True
    largest: float | None = None
    """of numbers as labels, which fairseq's preprocess_GLUE_tasks.sh divides by it"""


GLUE = {
    "cola": GlueTask(("3",), "1", header=False),
    "sst2": GlueTask(("sentence",), "label"),
    "mrpc": GlueTask(("#1 String", "#2 String"), "Quality"),
    "stsb": GlueTask(("sentence1", "sentence2"), "score", largest=5.0),
    "qqp": GlueTask(("question1", "question2"), "is_duplicate"),
    "mnli": GlueTask(("sentence1", "sentence2"), "gold_label", ("dev_matched", "dev_mismatched")),
    "qnli": GlueTask(("question", "sentence"), "label"),
    "rte": GlueTask(("sentence1", "sentence2"), "label"),
}


def read_sentences(path: str, glue: str | None) -> dict[str, list[Sentence]]:
    """ "train" and one or more held-out parts.

    From GLUE's train.tsv beside dev.tsv (glue names the task); from .jsonl lines with "text", maybe "text2",
    and "label" (train.jsonl beside dev, valid, val or test; one file is divided 80/20); or "text".
    Raises DataError.
    """
    if glue is not None:
        return _read_glue(Path(path), glue)
    if path == "text":
        return {part: [Sentence((t,), n) for t, n in zip(*found, strict=True)]
                for part, found in labelled_texts(path).items()}  # fmt: skip
    root = Path(path)
    files = {file.stem: file for file in sorted(root.glob("*.jsonl"))} if root.is_dir() else {}
    if root.suffix == ".jsonl" and root.is_file():
        whole = _read_lines(root)
        order = np.random.Generator(np.random.PCG64(0)).permutation(len(whole))
        cut = max(1, len(whole) // 5)
        chosen = {"train": np.sort(order[cut:]), "test": np.sort(order[:cut])}
        return {part: [whole[i] for i in numbers] for part, numbers in chosen.items()}
    held = [stem for stem in HELD_OUT if stem in files]
    if "train" not in files or not held:
        raise DataError(
            f"labels missing: {path}: a .jsonl file, or train.jsonl beside one of "
            f"{', '.join(f'{stem}.jsonl' for stem in HELD_OUT)} is needed, got {sorted(files) or 'none'}"
        )
    return {part: _read_lines(files[stem]) for part, stem in (("train", "train"), ("test", held[0]))}


def _read_lines(file: Path) -> list[Sentence]:
    report, found = Report(str(file), 0), []
    for name, entry in json_lines(file, report):
        label, second = entry.get("label"), entry.get("text2")
        if isinstance(label, bool) or not isinstance(label, (str, int, float)):
            raise DataError(f'labels missing: {name} has no "label" that is a string or a number')
        if second is not None and not isinstance(second, str):
            raise DataError(f'data: {name}: "text2" must be a string, got {second!r}')
        found.append(Sentence((entry["text"],) if second is None else (entry["text"], second), str(label)))
    report.stop_if_too_many()
    if not found:
        raise DataError(f"data: {file} holds no sample")
    return found


def _read_glue(root: Path, name: str) -> dict[str, list[Sentence]]:
    if name not in GLUE:
        raise ValueError(f"finetune: glue must be one of {', '.join(GLUE)}, got {name!r}")
    task = GLUE[name]
    parts = {"train": root / "train.tsv", **{stem: root / f"{stem}.tsv" for stem in task.evaluated}}
    for file in parts.values():
        if not file.is_file():
            raise DataError(f"data: {file} does not exist: GLUE's {name} folder holds it")
    return {part: _read_tsv(file, task) for part, file in parts.items()}


def _read_tsv(file: Path, task: GlueTask) -> list[Sentence]:
    """GLUE's files: tabs between columns, quotes that mean nothing."""
    found = []
    with file.open(encoding="utf-8", newline="") as opened:
        rows = csv.reader(opened, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = next(rows, []) if task.header else None
        wanted = (*task.texts, task.label)
        if header is not None and (absent := [name for name in wanted if name not in header]):
            raise DataError(f"data: {file} has no column {absent[0]!r}, its columns: {', '.join(header)}")
        places = [int(name) if header is None else header.index(name) for name in wanted]
        for number, row in enumerate(rows, 2 if task.header else 1):
            if len(row) <= max(places):
                raise DataError(
                    f"data: {file}, line {number}: {len(row)} columns, {max(places) + 1} are needed"
                )
            *texts, label = (row[place] for place in places)
            if task.largest is not None:
                label = _share(label, task.largest, f"{file}, line {number}")
            if label != "-":  # of MNLI: annotators did not agree
                found.append(Sentence(tuple(texts), label))
    return found


def _share(label: str, largest: float, where: str) -> str:
    try:
        return str(float(label) / largest)
    except ValueError:
        raise DataError(f"data: {where}: the label must be a number, got {label!r}") from None


@dataclass(frozen=True)
class Targets:
    """What labels are made of."""

    classes: list[str]
    """empty for regression"""

    def encode(self, sentences: Sequence[Sentence], where: str) -> np.ndarray:
        """[n] int64 classes, or float32 numbers."""
        if not self.classes:
            try:
                return np.array([float(s.label) for s in sentences], dtype=np.float32)
            except ValueError as error:
                raise DataError(f"data: {where}: regression needs numbers as labels: {error}") from None
        number = {name: i for i, name in enumerate(self.classes)}
        if unknown := sorted({s.label for s in sentences} - number.keys()):
            raise DataError(f"data: {where}: class {unknown[0]!r} is not among the training classes")
        return np.array([number[s.label] for s in sentences], dtype=np.int64)


def targets_of(train: Sequence[Sentence], regression: bool) -> Targets:
    """The classes of the training part, in order."""
    return Targets([] if regression else number_classes([s.label for s in train])[0])


@dataclass(frozen=True)
class Specials:
    """The ids around texts, and of padding."""

    begin: int = BOS
    between: tuple[int, ...] = (EOS, EOS)
    """of the two texts of a pair"""
    end: int = EOS
    pad: int = PAD

    @staticmethod
    def of(tokenizer: Tokenizer, pad: int) -> Specials | None:
        """What a tokenizer's post-processor puts around a pair; None without one."""
        ids = tokenizer.encode("", "").ids
        if len(ids) < 3:
            return None
        begin, *between, end = ids
        return Specials(begin, tuple(between), end, pad)


def encode(
    sentences: Sequence[Sentence], tokenizer: Tokenizer, block: int, specials: Specials
) -> list[np.ndarray]:
    """Token ids [t <= block] int64 of each sample."""
    texts = [text for sentence in sentences for text in sentence.texts]
    ids = iter([e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)])
    return [_join([list(next(ids)) for _ in sentence.texts], block, specials) for sentence in sentences]


def _join(texts: list[list[int]], block: int, specials: Specials) -> np.ndarray:
    begin, between, end = specials.begin, specials.between, specials.end
    if len(texts) == 1:
        return np.array([begin, *texts[0][: block - 2], end], dtype=np.int64)
    a, b = texts
    room = block - 2 - len(between)
    if len(a) + len(b) > room:
        shorter = min(len(a), len(b), room // 2)
        kept = shorter if len(a) <= len(b) else room - shorter
        a, b = a[:kept], b[: room - kept]
    return np.array([begin, *a, *between, *b, end], dtype=np.int64)


def pad(rows: Sequence[np.ndarray], value: int) -> tuple[Tensor, Tensor]:
    """Tokens [B,T] int64 padded to the longest, and the padding [B,T]."""
    tensors = [torch.from_numpy(row) for row in rows]
    source = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
    return source, source == value


class SentenceSource(Source):
    """Tokenised samples for training."""

    def __init__(self, path: str, tokens: list[np.ndarray], seed: int, batch: int, pad_id: int = PAD) -> None:
        super().__init__(path, seed, batch)
        self.tokens, self.pad_id = tokens, pad_id

    def __len__(self) -> int:
        return len(self.tokens)

    def name(self, index: int) -> str:
        return f"{self.path}, sample {index}"

    def read(self, index: int, epoch: int | None) -> np.ndarray:
        return self.tokens[index]

    def collate(self, items: list[np.ndarray], ids: np.ndarray, epoch: int | None) -> Batch:
        source, padding = pad(items, self.pad_id)
        return Batch(source, torch.from_numpy(ids), epoch or 0, padding)


class SentencePart:
    """A held-out part, in order."""

    def __init__(self, tokens: list[np.ndarray], labels: np.ndarray, pad_id: int = PAD) -> None:
        self.tokens, self.labels, self.pad_id = tokens, labels, pad_id

    def __len__(self) -> int:
        return len(self.tokens)

    def batches(self, size: int) -> Iterator[LabelledBatch]:
        """Tokens [B,T], padding [B,T], labels [B] int64 or float32."""
        for i in range(0, len(self), size):
            source, padding = pad(self.tokens[i : i + size], self.pad_id)
            yield source, padding, torch.from_numpy(self.labels[i : i + size])
