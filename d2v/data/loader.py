"""Order, workers, resuming and bad files: what no modality should solve again.

A modality implements `Source`; `Loader` turns it into a `Pipeline`. Every batch is a function of
(seed, epoch, step) alone: the order of an epoch comes from a counter-based generator keyed by
(seed, epoch), a sample's augmentation from one keyed by (seed, epoch, sample id), never from the state
of a worker. So a run resumes at any position, and any number of workers gives the same bits.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..config.run import DataConfig
from .normalisation import Normalisation
from .types import Batch, DataError, Pipeline, Position, Report, Unreadable

ORDER, AUGMENT, SUBSTITUTE, LIMIT, TIME_MASK, CHANNEL_MASK, NOISE, PIXELS, MIX = range(9)
"""what a generator is for, the second part of its key"""

ENDED = (BrokenPipeError, ConnectionResetError, EOFError)
"""what a process meets that starts one which ends at once"""
PIECES = 16
"""of neighbouring samples in a window that is shuffled"""
ATTEMPTS = 100
"""samples tried in place of an unreadable one before giving up"""


def generator(seed: int, use: int, *key: int) -> np.random.Generator:
    """An independent stream for each (seed, use, *key); key: epoch and sample id, at least 0."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(use, *key))))


def number_classes(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Class names in order (whole numbers as numbers) and the number [n] int64 of each name's class."""
    numbers = all(name.isdecimal() for name in names)
    classes = sorted(set(names), key=lambda name: (int(name) if numbers else 0, name))
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.array([number[name] for name in names], dtype=np.int64)


def windows(rng: np.random.Generator, count: int, window: int) -> list[np.ndarray]:
    """The numbers of `count` samples, each once, in windows of `window` (the last one: what is left).

    A window is PIECES pieces of neighbours, chosen at random and cut at other places each time, so that
    samples which lie in order of their classes come mixed. One that holds all, or 0, draws nothing.
    """
    if not 0 < window < count:
        return [np.arange(count)]
    size = -(-window // PIECES)
    cuts = np.arange(rng.integers(size), count, size)
    pieces = [piece for piece in np.split(np.arange(count), cuts) if len(piece)]
    order = np.concatenate([pieces[i] for i in rng.permutation(len(pieces))])
    return np.split(order, range(window, count, window))


class Source(ABC):
    """A data set with random access. Picklable: each worker holds a copy."""

    def __init__(self, path: str, seed: int, batch: int, window: int = 0) -> None:
        """window: see `data.shuffle_window`"""
        self.path = path
        self.window = window
        self.seed = seed
        self.batch = batch
        """samples of a global step, or seconds for audio"""
        self.meta: dict[str, Any] = {}
        self.normalisation: Normalisation | None = None
        """of pictures"""
        self.heard: dict[str, str] = {}
        """what `read` did to samples that a user should hear of -> the first such sample's name"""

    @abstractmethod
    def __len__(self) -> int:
        """Samples."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call sample `index` to a user: a path, or a path and a place in it."""

    @abstractmethod
    def read(self, index: int, epoch: int | None) -> Any:
        """One sample, in a worker; `epoch` None means without augmentation. Raises Unreadable."""

    @abstractmethod
    def collate(self, items: list[Any], ids: np.ndarray, epoch: int | None) -> Batch:
        """Samples from `read` to one CPU batch, in a worker."""

    def finish(self, batch: Batch) -> Batch:
        """What is done batched on the training device, after the copy."""
        return batch

    def finish_step(self, batches: list[Batch]) -> list[Batch]:
        """`finish` for the micro-batches of a training step; what comes out must not depend on the split."""
        return [self.finish(batch) for batch in batches]

    def steps(self, epoch: int) -> list[np.ndarray]:
        """Sample ids of each global step of an epoch; the incomplete last one is dropped."""
        count = len(self) // self.batch
        rng = generator(self.seed, ORDER, epoch)
        order = np.concatenate([rng.permutation(some) for some in windows(rng, len(self), self.window)])
        return list(order[: count * self.batch].reshape(count, self.batch))

    def split(self, ids: np.ndarray, micro: int) -> list[np.ndarray]:
        """The ids of one step as micro-batches of at most `micro` (in the unit of `batch`)."""
        return [ids[i : i + micro] for i in range(0, len(ids), micro)]

    def substitute(self, index: int, epoch: int, attempt: int) -> int:
        """The sample to try in place of unreadable `index`: the same one in every run."""
        return int(generator(self.seed, SUBSTITUTE, epoch, index, attempt).integers(len(self)))


class _Job(NamedTuple):
    """One micro-batch to load."""

    ids: np.ndarray
    epoch: int | None
    last: bool = True
    """whether it ends its global step"""


class _Loaded(NamedTuple):
    job: _Job
    batch: Batch | None
    """None when no sample could be read"""
    unreadable: list[tuple[str, str]]
    """(name, reason)"""
    heard: dict[str, str]
    """see `Source`"""
    error: DataError | None = None
    """carried to the main process, where it is raised without a worker's traceback"""


class _Reader(Dataset):
    """Runs jobs, in a worker or in the main process."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, job: _Job) -> _Loaded:
        try:
            return self._load(job)
        except DataError as error:
            return _Loaded(job, None, [], {}, error)

    def _load(self, job: _Job) -> _Loaded:
        source, items, ids, unreadable = self.source, [], [], []
        for index in job.ids.tolist():
            candidate = index
            for attempt in range(ATTEMPTS if job.epoch is not None else 1):
                try:
                    items.append(source.read(candidate, job.epoch))
                    ids.append(candidate)
                    break
                except Unreadable as error:
                    unreadable.append((source.name(candidate), str(error)))
                if job.epoch is not None:
                    candidate = source.substitute(index, job.epoch, attempt)
        batch = source.collate(items, np.array(ids, dtype=np.int64), job.epoch) if items else None
        return _Loaded(job, batch, unreadable, dict(source.heard))


class _Jobs:
    """The sampler handed to DataLoader: anything iterable, also endless."""

    def __init__(self, jobs: Iterable[_Job]) -> None:
        self.jobs = jobs

    def __iter__(self) -> Iterator[_Job]:
        return iter(self.jobs)


def _as_is(loaded: Any) -> Any:
    return loaded


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches workers too; the main process decides when they stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def leave_import() -> None:
    """End this process if it is a worker that is being started and imports the script that starts it."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(1)  # what is wrong is said by the process that waits for it


class Loader(Pipeline):
    """A `Source` as an endless, resumable stream of global steps."""

    def __init__(
        self, source: Source, cfg: DataConfig, device: torch.device, report: Report | None = None
    ) -> None:
        """report: continued from opening the data set, where there was already something to count."""
        leave_import()
        self.source = source
        self.device = device
        self.workers = min(cfg.workers, os.cpu_count() or 1)
        self.prefetch = cfg.prefetch
        self.report = report or Report(source.path, len(source), max_unreadable=cfg.max_unreadable)
        self._note(source.heard)
        self.meta = source.meta
        self.normalisation = source.normalisation
        self.position = Position()

    def micro_batches(self, start: Position, micro: int) -> Iterator[list[Batch]]:
        """See `Pipeline.micro_batches`. DataError: too few samples, too many unreadable."""
        if micro < 1:
            raise ValueError(f"data: micro must be at least 1, got {micro}")
        step: list[Batch] = []
        position = self.position = self._normalised(Position(*start))
        for loaded in self._load(self._train_jobs(position, micro)):
            if loaded.batch is not None:
                step.append(loaded.batch.to(self.device))
            if not loaded.job.last:
                continue
            if not step:
                raise DataError(f"data: {self.source.path}: no readable sample among {ATTEMPTS} tried")
            position = self._normalised(Position(position.epoch, position.step_in_epoch + 1))
            self.position = position
            yield self.source.finish_step(step)
            step = []

    def in_order(self, size: int) -> Iterator[tuple[list[str], Batch]]:
        """See `Pipeline.in_order`; unreadable samples are left out and counted."""
        ids = np.arange(len(self.source))
        return self.chosen(ids[i : i + size] for i in range(0, len(ids), size))

    def chosen(self, choices: Iterable[np.ndarray]) -> Iterator[tuple[list[str], Batch]]:
        """As `in_order`, a batch for each array of sample numbers [k]; there may be no end of them."""
        for loaded in self._load(_Job(ids, None) for ids in choices):
            if loaded.batch is not None:
                names = [self.source.name(i) for i in loaded.batch.ids.tolist()]
                yield names, self.source.finish(loaded.batch.to(self.device))

    def check_batch(self) -> None:
        """DataError when there are less samples than one step takes."""
        self._steps(0)

    def _steps(self, epoch: int) -> list[np.ndarray]:
        if getattr(self, "_epoch", None) != epoch:
            steps = self.source.steps(epoch)
            if not steps:
                raise DataError(
                    f"data: {self.source.path}: {len(self.source)} samples are less than one batch; "
                    f"data.batch is {self.source.batch}"
                )
            self._epoch, self._epoch_steps = epoch, steps
        return self._epoch_steps

    def _normalised(self, position: Position) -> Position:
        """The end of an epoch is the start of the next, so that equal places compare equal."""
        if min(position) < 0:
            raise ValueError(f"data: position must not be negative, got {position}")
        if position.step_in_epoch >= len(self._steps(position.epoch)):
            return Position(position.epoch + 1, 0)
        return position

    def _train_jobs(self, start: Position, micro: int) -> Iterator[_Job]:
        epoch, first = start
        while True:
            for ids in self.source.steps(epoch)[first:]:
                parts = self.source.split(ids, micro)
                for i, part in enumerate(parts):
                    yield _Job(part, epoch, last=i == len(parts) - 1)
            epoch, first = epoch + 1, 0

    def _load(self, jobs: Iterable[_Job]) -> Iterator[_Loaded]:
        """Jobs in, results out in the same order; bad samples go to the report."""
        workers: dict[str, Any] = {}
        if self.workers:
            # forkserver: forking a process that has threads (OpenMP, CUDA) may deadlock
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            workers = {"prefetch_factor": self.prefetch, "multiprocessing_context": context}
        loader = DataLoader(
            _Reader(self.source),
            sampler=_Jobs(jobs),
            batch_size=None,
            collate_fn=_as_is,
            worker_init_fn=_ignore_interrupts,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or DataLoader would draw from the global one
            **workers,
        )
        for loaded in _started(loader):
            if loaded.error is not None:
                raise loaded.error
            for name, reason in loaded.unreadable:
                self.report.add_unreadable(name, reason)
            self._note(loaded.heard)
            yield loaded

    def _note(self, heard: dict[str, str]) -> None:
        for what, name in heard.items():
            self.report.add_note(what, name)


def _started(loader: DataLoader) -> Iterator[_Loaded]:
    """The results of a loader. DataError where its workers end before they have begun."""
    begun = False
    try:
        for loaded in loader:
            begun = True
            yield loaded
    except (OSError, EOFError, RuntimeError) as error:
        ended = isinstance(error, ENDED) or "exited unexpectedly" in str(error)
        if begun or not loader.num_workers or not ended:
            raise
        raise DataError(
            f"data: a worker process ended as it began ({error}). A script that reads data in worker "
            'processes must do so under `if __name__ == "__main__":`, since each of them imports it; or set '
            "data.workers to 0"
        ) from error


@contextmanager
def keyed(seed: int, device: torch.device) -> Iterator[None]:
    """What the block draws from torch, on the CPU and on `device`, depends on `seed` alone; the states
    afterwards are those before it."""
    gpu = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpu):
        torch.default_generator.manual_seed(seed)
        if gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
