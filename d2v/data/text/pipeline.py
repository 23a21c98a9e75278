"""Text to blocks of tokens: documents are tokenised once into one long stream in a memory-mapped file.

The stream is all documents one after the other, each ended by </s>; a block of T tokens is <s> and the
next T - 1 of the stream (fairseq's TokenBlockDataset without break mode under a PrependTokenDataset). So
the stream does not depend on T. It lies in a cache folder whose name is a hash of the files (path, size,
time) and of the tokenizer: changing either makes a new one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from ...config.atomic import write_text
from ...config.fronts import TextFront
from ...config.run import Config, DataConfig
from ..cache import default_cache
from ..loader import Loader, Source, number_classes
from ..splits import training_classes
from ..types import Batch, DataError, Labelled, LabelledBatch, Report, Split
from .corpus import Corpus, open_corpus
from .labelled import read_labelled
from .tokenizer import (
    BOS,
    DOCUMENT,
    EOS,
    PAD,
    TOGETHER,
    check_block,
    check_tokenizer,
    encode_beginnings,
    load_tokenizer,
    train_tokenizer,
)

SAMPLE = 1 << 26
"""bytes that a tokenizer is trained on: of larger corpora evenly spaced documents, or pieces. Training
keeps every different word: about a gigabyte for prose, seven for random letters"""
ENOUGH = 100
"""characters for each token of a step, with which a corpus is large enough whatever the tokenizer"""
READING = "2"
"""changes when the same files give other tokens"""
RAW_TOKENS = 4_096
"""most frequent tokens that the baseline counts"""


class TextSource(Source):
    """Blocks of a token stream on disk."""

    def __init__(self, path: str, stream: Path, dtype: str, cfg: Config) -> None:
        super().__init__(path, cfg.train.seed, cfg.data.batch, cfg.data.shuffle_window)
        self.block = cfg.data.block
        self.stream, self.dtype = stream, dtype
        self.tokens = stream.stat().st_size // np.dtype(dtype).itemsize
        self._map: np.ndarray | None = None
        if len(self) == 0:
            raise DataError(
                f"data: {path}: {self.tokens} tokens are less than one block; data.block is {self.block}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}  # a worker maps the file itself

    def __len__(self) -> int:
        return self.tokens // (self.block - 1)

    def name(self, index: int) -> str:
        return f"{self.path}, tokens from {index * (self.block - 1)}"

    def read(self, index: int, epoch: int | None) -> np.ndarray:
        """One block [T] int64."""
        if self._map is None:
            self._map = np.memmap(self.stream, dtype=self.dtype, mode="r")
        size = self.block - 1
        return np.concatenate(([BOS], self._map[index * size : (index + 1) * size]), dtype=np.int64)

    def collate(self, items: list[np.ndarray], ids: np.ndarray, epoch: int | None) -> Batch:
        """source [B,T] int64; no padding mask, for every block is full."""
        return Batch(torch.from_numpy(np.stack(items)), torch.from_numpy(ids), epoch or 0)


def _tokenizer(corpus: Corpus, cfg: Config, run_dir: Path | None, cache: Path) -> tuple[Tokenizer, Path]:
    """The run's own tokenizer, else the one of data.tokenizer, else one trained on the data; and its file."""
    front = _front(cfg)
    given = cfg.data.tokenizer
    key = _hash(corpus.fingerprint(), str(front.vocab_size), given or "")
    kept = (run_dir or cache / "tokenizers" / key) / "tokenizer.json"
    if kept.is_file() and (run_dir or not given):
        return check_tokenizer(load_tokenizer(kept), str(kept), front), kept
    if given:
        if not Path(given).exists():
            raise DataError(f"data: data.tokenizer {given} does not exist")
        tokenizer = check_tokenizer(load_tokenizer(Path(given)), given, front)
    else:
        report = Report.of(corpus.path, cfg.data)
        pieces = chain.from_iterable(corpus.documents(report))
        every = max(1, -(-corpus.size() // SAMPLE))
        trained = train_tokenizer(islice(pieces, 0, None, every), front.vocab_size)
        report.stop_if_too_many()
        tokenizer = check_tokenizer(trained, "trained on the data", front)
    write_text(kept, tokenizer.to_str(pretty=True))
    return tokenizer, kept


def _front(cfg: Config) -> TextFront:
    front = cfg.model.front
    assert isinstance(front, TextFront)
    check_block(cfg.data.block, front)
    return front


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _encode(corpus: Corpus, tokenizer: Tokenizer, report: Report) -> Iterator[list[int]]:
    """Token ids of all documents, in order, each document ended by </s>."""

    def flush() -> Iterator[list[int]]:
        encoded = tokenizer.encode_batch([text for text, _ in waiting], add_special_tokens=False)
        for (_, last), encoding in zip(waiting, encoded, strict=True):
            yield [*encoding.ids, EOS] if last else encoding.ids
        waiting.clear()

    waiting: list[tuple[str, bool]] = []
    """texts, and whether they end a document"""
    characters = 0
    for document in corpus.documents(report):
        text = next(document, "")
        for following in chain(document, [None]):
            waiting.append((text, following is None))
            characters += len(text) + DOCUMENT
            if characters > TOGETHER:
                yield from flush()
                characters = 0
            text = following or ""
    yield from flush()


def _stream(corpus: Corpus, tokenizer: Tokenizer, dtype: str, cache: Path, report: Report) -> Path:
    """The file of all tokens, made now or found in the cache; what was counted then is reported."""
    folder = cache / "text" / _hash(READING, corpus.fingerprint(), tokenizer.to_str(), dtype)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            tokens = 0
            with open(making / "tokens.bin", "wb") as file:
                for ids in _encode(corpus, tokenizer, report):
                    np.array(ids, dtype=dtype).tofile(file)
                    tokens += len(ids)
            report.stop_if_too_many()
            report.facts["tokens"] = tokens
            found = {name: getattr(report, name) for name in ("total", "unreadable", "skipped", "facts")}
            (making / "report.json").write_text(json.dumps(found))
            if not folder.is_dir():  # another process may have been faster
                making.rename(folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    for name, value in json.loads((folder / "report.json").read_text()).items():
        setattr(report, name, value)
    return folder / "tokens.bin"


def open_data(
    path: str,
    cfg: Config,
    *,
    device: torch.device,
    purpose: str,
    run_dir: Path | None,
) -> Loader:
    """See `d2v.data.open.open_data`; meta["tokenizer"] is the path of the tokenizer's .json, in `run_dir` if
    there is one."""
    report, cache = Report.of(path, cfg.data), default_cache()
    corpus = open_corpus(path, report, purpose, cfg.data.text_column)
    tokenizer, file = _tokenizer(corpus, cfg, run_dir, cache)
    dtype = "<u2" if _front(cfg).vocab_size <= 1 << 16 else "<u4"
    stream = _stream(corpus, tokenizer, dtype, cache, report)
    source = TextSource(path, stream, dtype, cfg)
    source.meta = {"tokenizer": str(file)}
    return Loader(source, cfg.data, device, report)


class TextSplit(Split):
    """Labelled texts as <s> tokens </s>, cut to data.block tokens."""

    def __init__(
        self,
        texts: Sequence[str],
        labels: np.ndarray,
        tokenizer: Tokenizer,
        block: int,
        specials: tuple[int, int, int] = (BOS, PAD, EOS),
    ) -> None:
        begin, self.pad, end = specials
        encoded = encode_beginnings(texts, tokenizer, block)
        self.tokens = [np.array([begin, *ids[: block - 2], end]) for ids in encoded]
        self.labels = labels
        self.report: Report | None = None
        """on the data set that it is a part of"""
        self.counted = np.empty(0, dtype=np.int64)
        """tokens that `raw` counts: the same for all splits"""

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, keep: np.ndarray) -> TextSplit:
        chosen = copy.copy(self)
        chosen.tokens, chosen.labels = [self.tokens[i] for i in keep.tolist()], self.labels[keep]
        return chosen

    def batches(self, size: int) -> Iterator[LabelledBatch]:
        """Tokens [B,T] int64 padded to the longest, padding_mask [B,T], labels [B]."""
        for i in range(0, len(self), size):
            rows = [torch.from_numpy(t) for t in self.tokens[i : i + size]]
            source = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)
            yield source, source == self.pad, torch.from_numpy(self.labels[i : i + size])

    def raw(self) -> tuple[np.ndarray, np.ndarray]:
        """How often each of the most frequent tokens occurs, and the labels."""
        size = int(self.counted.max(initial=0)) + 1
        rows = [np.bincount(t[t < size], minlength=size)[self.counted] for t in self.tokens]
        return np.array(rows, dtype=np.float32), self.labels


def open_labelled(
    path: str, cfg: Config, *, run_dir: Path | None, classes: Sequence[str] | None = None
) -> Labelled:
    """See `d2v.data.open.open_labelled`. Labels: see `read_labelled`; of the embedded text, the areas of
    the library."""
    _front(cfg)
    parts, classes, report = _labelled_parts(path, cfg.data)
    corpus = open_corpus(path, Report.of(path, cfg.data), column=cfg.data.text_column)
    tokenizer, file = _tokenizer(corpus, cfg, run_dir, default_cache())
    splits = _splits(parts, classes, tokenizer, cfg.data.block, (BOS, PAD, EOS), report)
    return Labelled(splits, classes, "sample", {"tokenizer": str(file)})


def open_tokenized(
    path: str, tokenizer: Tokenizer, data: DataConfig, specials: tuple[int, int, int]
) -> Labelled:
    """As `open_labelled`, in the tokens of any tokenizer. specials: its ids of begin, padding and end."""
    parts, classes, report = _labelled_parts(path, data)
    return Labelled(_splits(parts, classes, tokenizer, data.block, specials, report), classes, "sample")


def _labelled_parts(
    path: str, data: DataConfig
) -> tuple[dict[str, tuple[list[str], list[str]]], list[str], Report]:
    """Texts and labels of each part, the classes, and the report."""
    found, report = read_labelled(path, data=data)
    parts = {part: ([s.texts[0] for s in some], [s.label for s in some]) for part, some in found.items()}
    classes = {part: number_classes(names)[0] for part, (_, names) in parts.items()}
    return parts, training_classes(classes, path), report


def _splits(
    parts: dict[str, tuple[list[str], list[str]]],
    classes: list[str],
    tokenizer: Tokenizer,
    block: int,
    specials: tuple[int, int, int],
    report: Report,
) -> dict[str, TextSplit]:
    number = {name: i for i, name in enumerate(classes)}
    splits = {
        part: TextSplit(texts, np.array([number[n] for n in names]), tokenizer, block, specials)
        for part, (texts, names) in parts.items()
    }
    seen, counts = np.unique(np.concatenate(splits["train"].tokens), return_counts=True)
    for split in splits.values():
        split.report = report
        split.counted = np.sort(seen[np.argsort(-counts, kind="stable")[:RAW_TOKENS]])
    return splits


def check_data(path: str, cfg: Config, report: Report, any_batch: bool) -> None:
    """See `d2v.data.open.check_data`: a histogram of the documents' lengths."""
    _front(cfg)
    corpus = open_corpus(path, report, column=cfg.data.text_column)
    lengths: Counter[int] = Counter()
    characters = 0
    for document in corpus.documents(report):
        length = sum(map(len, document))
        characters += length
        lengths[length.bit_length()] += 1
    report.facts["documents by characters"] = {
        f"below {1 << bits}": lengths[bits] for bits in sorted(lengths)
    }
    report.stop_if_too_many()
    if characters < ENOUGH * cfg.data.batch * cfg.data.block:  # else a token would have as many characters
        loader = open_data(path, cfg, device=torch.device("cpu"), purpose="train", run_dir=None)
        if not any_batch:
            loader.check_batch()
