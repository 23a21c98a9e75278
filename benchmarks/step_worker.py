"""One case of the whole-step benchmark, in a process of its own: what the parent calls there.

`open_case`, then `turn` as often as wanted, then `close_case`, which reads the peak memory; only then what
would spoil it, `trajectory` and `hot_paths`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import resource
import tempfile
import time
from typing import Any

import torch

import d2vkern
from benchmarks.step_cases import Case, size_of
from d2v.config.fronts import TextFront
from d2v.config.run import Config
from d2v.data.types import Batch
from d2v.tools.ceilings import rates, synchronize
from d2v.tools.profile import run_profile
from d2v.train import cuda_graph
from d2v.train.learner import Outcome
from d2v.train.pretrain_step import Trainer
from d2v.train.process import tune_allocator
from d2vkern.testing import backend_spy

WARMUP = {"cpu": 2, "cuda": cuda_graph.WARMUP + 2}
"""steps before the first turn: compilation, kernel choice, allocator, optimizer state, recorded graph"""
TURN = {"cpu": 1, "cuda": 5}
"""steps under one reading of the clock; without a wait between them, as in training"""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Steps:
    """A trainer and its random batches: one source, other sample ids and so other masks at every step."""

    def __init__(self, case: Case, cfg: Config) -> None:
        self.case, self.device = case, torch.device(case.device)
        self.trainer = Trainer(cfg, self.device)
        generator = torch.Generator().manual_seed(cfg.train.seed)
        front = cfg.model.front
        if isinstance(front, TextFront):
            source = torch.randint(4, front.vocab_size, case.shape, generator=generator)
        else:
            source = torch.randn(case.shape, generator=generator)
        self.source = source.to(self.device)
        self.number = 0

    def step(self) -> Outcome:
        """The next step, not waited for."""
        first = self.number * self.case.batch
        ids = torch.arange(first, first + self.case.batch, device=self.device)
        self.number += 1
        backend = self.case.how.backend
        with d2vkern.use_backend(None if backend == "auto" else backend):
            return self.trainer.step(self.number, [Batch(self.source, ids, 0)])


@dataclasses.dataclass
class _Open:
    """What a process holds between calls of its parent."""

    steps: Steps
    measured: dict[str, Any]
    """what `close_case` returns"""


_held: dict[tuple[str, str, str], _Open] = {}


def open_case(case: Case) -> None:
    """Set up and warm up; where the GPU's memory does not suffice, with half the batch, and half of that."""
    _prepare(case)
    measured: dict[str, Any] = {"rates": [_rates(case)], "turns": [], "losses": []}
    _free(case)
    while True:
        try:
            steps = _warm(case, measured)
            break
        except torch.cuda.OutOfMemoryError:
            if case.batch == 1:
                raise
        # outside of the handler, whose exception holds the frames that hold the memory
        measured["out_of_memory_at"] = [*measured.get("out_of_memory_at", []), case.batch]
        case = dataclasses.replace(case, batch=case.batch // 2)
        _free(case)
    measured["batch"] = case.batch
    _held[case.key] = _Open(steps, measured)


def _warm(case: Case, measured: dict[str, Any]) -> Steps:
    steps = Steps(case, case.config())
    start = time.perf_counter()
    # compiled steps are not spied on: Dynamo guards on the list that grows and would compile at every call
    with contextlib.nullcontext([]) if case.how.compile else backend_spy() as calls:
        for _ in range(WARMUP[case.device]):
            steps.step()
    synchronize(steps.device)
    measured["warmup_seconds"] = time.perf_counter() - start
    measured["backends"] = dict(sorted(set(calls)))
    return steps


def turn(case: Case) -> None:
    """Some steps under one reading of the clock."""
    steps, measured = _held[case.key].steps, _held[case.key].measured
    count = TURN[steps.case.device]
    synchronize(steps.device)
    start = time.perf_counter()
    for _ in range(count):
        outcome = steps.step()
    synchronize(steps.device)
    measured["turns"].append((time.perf_counter() - start) / count)
    measured["losses"].append(_loss(outcome))


def close_case(case: Case) -> dict[str, Any]:
    """Everything measured: see `open_case` and `turn`; peak memory in bytes, rates before and after."""
    measured = _held.pop(case.key).measured
    if case.device == "cuda":
        measured["peak"] = torch.cuda.max_memory_allocated()
    else:
        measured["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    _free(case)
    measured["rates"].append(_rates(case))
    return measured


def trajectory(case: Case, count: int) -> dict[str, list[float]]:
    """Loss and gradient norm of the first `count` steps, of the config whose steps can be compared."""
    _prepare(case)
    steps = Steps(case, case.checkable_config())
    found: dict[str, list[float]] = {"loss": [], "gradient norm": []}
    for _ in range(count):
        outcome = steps.step()
        found["loss"].append(_loss(outcome))
        found["gradient norm"].append(float(outcome.grad_norm))
    return found


def hot_paths(case: Case, count: int) -> dict[str, Any]:
    """`d2v profile` of `count` steps: coverage, and time, share and share of the matmul rate of every row."""
    _prepare(case)
    cfg, size = case.config(), size_of(case.preset, case.device, case.smoke)
    seconds, tokens = size.seconds or cfg.data.max_seconds, size.tokens or cfg.data.block
    data = dataclasses.replace(
        cfg.data, max_seconds=seconds, min_seconds=min(seconds, cfg.data.min_seconds), block=tokens
    )
    whole = round(case.batch * size.seconds) if size.seconds else case.batch
    train = dataclasses.replace(cfg.train, micro_batch=max(1, whole))
    cfg = dataclasses.replace(cfg, data=data, train=train)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        profile = run_profile(
            cfg, folder, backend=case.how.backend, steps=count, batch=case.batch, quick=case.smoke
        )
    (report,) = profile.reports
    keep = ("name", "seconds", "share", "of_matmul")
    return {
        "steps": count,
        "coverage": report.coverage,
        "rows": [{name: getattr(row, name) for name in keep} for row in report.rows],
    }


def _prepare(case: Case) -> None:
    if case.threads is not None:
        torch.set_num_threads(case.threads)
    if case.device == "cpu":
        tune_allocator()


def _free(case: Case) -> None:
    """Give back what no tensor holds, and count the GPU's peak anew; compiled code goes too."""
    if case.how.compile:  # not otherwise: it imports all of Dynamo
        torch.compiler.reset()
    gc.collect()
    if case.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _rates(case: Case) -> dict[str, float]:
    """FLOP/s of a matrix product by precision."""
    found = rates(torch.device(case.device), DTYPES.values(), quick=case.smoke)
    return {name: found[str(dtype)] for name, dtype in DTYPES.items()}


def _loss(outcome: Outcome) -> float:
    return float(torch.stack(list(outcome.losses.values())).sum())
