"""Labelled sentences and pairs of them: JSON lines, GLUE's own files, or the embedded paragraphs.

A sample is `<s> a </s>`, a pair `<s> a </s> </s> b </s>` (RoBERTa's, and the original's GLUE configs); for a
model of transformers it is what its tokenizer says, BERT's `[CLS] a [SEP] b [SEP]`. It is cut to data.block
tokens from the end of the longer text, as the tokenizers library does (longest_first). Labels are class
names, or numbers for regression.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..loader import Source, number_classes
from ..types import Batch, DataError, LabelledBatch, Report
from .labelled import Sentence
from .tokenizer import BOS, EOS, PAD, encode_beginnings


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
    ids = encode_beginnings(texts, tokenizer, block)
    return [_join([next(ids) for _ in sentence.texts], block, specials) for sentence in sentences]


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

    def __init__(
        self, path: str, tokens: list[np.ndarray], seed: int, batch: int, pad_id: int = PAD, window: int = 0
    ) -> None:
        super().__init__(path, seed, batch, window)
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

    def __init__(
        self, tokens: list[np.ndarray], labels: np.ndarray, pad_id: int = PAD, report: Report | None = None
    ) -> None:
        """report: on the data set that it is a part of."""
        self.tokens, self.labels, self.pad_id, self.report = tokens, labels, pad_id, report

    def __len__(self) -> int:
        return len(self.tokens)

    def batches(self, size: int) -> Iterator[LabelledBatch]:
        """Tokens [B,T], padding [B,T], labels [B] int64 or float32."""
        for i in range(0, len(self), size):
            source, padding = pad(self.tokens[i : i + size], self.pad_id)
            yield source, padding, torch.from_numpy(self.labels[i : i + size])
