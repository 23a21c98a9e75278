"""The whole training step as CUDA graphs: masks, forward, backward, optimizer, teacher and schedules.

A step starts thousands of kernels, and between the kernels of small batches a GPU waits for the host. A graph
replays them all with one call. It is recorded once per shape of the micro-batches, after a few plain steps of
that shape, which create the optimizer's state, compile kernels and choose algorithms. What changes from step
to step lies in tensors that the graph reads: the batches, the epoch and the step number, which picks learning
rate and teacher decay from tables on the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config.run import Config
from ..data.types import Batch
from .learner import Outcome
from .optim import learning_rate, teacher_decay

WARMUP = 3
"""plain steps of a shape before it is recorded"""
MOST = 64
"""graphs kept; further shapes run as plain steps"""

Replay = Callable[[], None]
Capture = Callable[[Callable[[], Outcome]], tuple[Replay, Outcome]]
Shape = tuple[Any, ...]


class Recordable(Protocol):
    """What is asked of a `Trainer`."""

    cfg: Config
    device: torch.device

    def work(
        self,
        batches: list[Batch],
        epochs: Sequence[int | Tensor],
        lr: float | Tensor,
        decay: float | Tensor,
    ) -> Outcome: ...


class CudaCapture:
    """Records work as CUDA graphs of one memory pool: the results of a step are read before the next."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Outcome]) -> tuple[Replay, Outcome]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            outcome = work()
        return graph.replay, outcome

    @contextmanager
    def warmup(self) -> Iterator[None]:
        """Plain steps run on the stream that will record: autograd remembers the stream of each parameter."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)


@dataclass
class _Recorded:
    """One shape's graph."""

    batches: list[Batch]
    """what it reads"""
    epochs: list[Tensor]
    replay: Replay
    outcome: Outcome
    """what it writes"""

    def fill(self, given: list[Batch]) -> None:
        for ours, epoch, batch in zip(self.batches, self.epochs, given, strict=True):
            ours.source.copy_(batch.source, non_blocking=True)
            ours.ids.copy_(batch.ids, non_blocking=True)
            if ours.padding_mask is not None:
                assert batch.padding_mask is not None
                ours.padding_mask.copy_(batch.padding_mask, non_blocking=True)
            epoch.fill_(batch.epoch)


class StepGraphs:
    """Steps of a trainer, replayed where their shape has been recorded.

    capture: how work is recorded and run in plain steps before; tests give another one.
    """

    def __init__(self, trainer: Recordable, capture: CudaCapture) -> None:
        self.trainer, self.capture = trainer, capture
        cfg, device = trainer.cfg, trainer.device
        numbers = range(1, cfg.train.steps + 1)
        rates = [learning_rate(cfg.optim, number - 1, cfg.train.steps) for number in numbers]
        decays = [teacher_decay(cfg.ema, number) for number in numbers]
        self._schedule = torch.tensor([rates, decays], dtype=torch.float64).to(device)
        self._number = torch.ones((), dtype=torch.int64, device=device)
        self._graphs: dict[Shape, _Recorded] = {}
        self._seen: Counter[Shape] = Counter()

    def step(self, number: int, batches: list[Batch]) -> Outcome:
        """Global step `number` on these micro-batches."""
        self._number.fill_(number)
        shape = _shape(batches)
        if shape not in self._graphs:
            self._seen[shape] += 1
            if self._seen[shape] <= WARMUP or len(self._graphs) >= MOST:
                with self.capture.warmup():
                    return self._work(batches, [batch.epoch for batch in batches])
            self._graphs[shape] = self._record(batches)
        recorded = self._graphs[shape]
        recorded.fill(batches)
        recorded.replay()
        return recorded.outcome

    def forget(self) -> None:
        """Drop all graphs: the tensors that they were recorded with are no longer the trainer's."""
        self._graphs.clear()
        self._seen.clear()

    def _record(self, batches: list[Batch]) -> _Recorded:
        ours = [batch.clone() for batch in batches]
        epochs = [torch.zeros((), dtype=torch.int64, device=self.trainer.device) for _ in batches]
        replay, outcome = self.capture(lambda: self._work(ours, epochs))
        return _Recorded(ours, epochs, replay, outcome)

    def _work(self, batches: list[Batch], epochs: list[int] | list[Tensor]) -> Outcome:
        # not by indexing with the 0-dim tensor, which would read it
        lr, decay = self._schedule.index_select(1, self._number.view(1) - 1).squeeze(1).unbind()
        return self.trainer.work(batches, epochs, lr, decay)


def _shape(batches: list[Batch]) -> Shape:
    return tuple((batch.source.shape, batch.padding_mask is None) for batch in batches)
