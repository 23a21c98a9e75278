"""`d2v profile`: where a training step spends its time, hot path by hot path, held against this machine.

The trainer's own step runs on data, or on random input of the preset's shapes: first without a profiler for
the wall time, then traced (hotpaths.py) for the shares, then once more with allocations recorded, which would
slow the traced steps down. Bytes and FLOPs are counted by formula (d2vkern/_costs.py, flops.py), so a row's
GB/s say how near an implementation is to what the op must move, not how busy it keeps the memory.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from d2vkern._nvtx import Tally, force_ranges, phase, tally_costs

from ..config.atomic import write_json
from ..config.fronts import TextFront
from ..config.run import Config
from ..data.open import open_data
from ..data.types import Batch, Position
from ..model.blocks import PRECISIONS
from ..train import cuda_graph
from ..train.backends import AUTO, check_backends
from ..train.environment import write_environment
from ..train.micro_batch import UNITS, micro_batch
from ..train.pretrain_step import Trainer
from ..train.process import pick_device, tune_allocator
from .ceilings import rates, synchronize
from .flops import step_flops
from .hotpaths import Trace, fold, read_events
from .profile_report import Profile, Report, Row

CPU_FLOPS = 1e12
"""work of a step on a CPU when no batch is asked for: as many samples as fit, at least 1"""
WARMUP = 2
"""plain steps before anything is measured"""


def run_profile(
    cfg: Config,
    out: str | Path,
    *,
    steps: int,
    data: str | None = None,
    backend: str | None = None,
    against: str | None = None,
    batch: int | None = None,
    quick: bool = False,
) -> Profile:
    """Profile `steps` steps, print the table and write everything into the folder `out`.

    data: folder, file, tar or embedded data set; None: random input of the preset's shapes.
    backend: as in D2VKERN_BACKEND ("eager,attention=triton"), in place of train.backend; None: train.backend.
        against: another one, beside it.
    batch: samples of a step; None: `data.batch` as far as it fits (on a CPU: `CPU_FLOPS`).
    quick: ceilings measured on small sizes, for tests and dry runs.
    Raises ValueError for settings, data or backends that cannot be.
    """
    if steps < 1 or (batch is not None and batch < 1):
        raise ValueError(f"profile: steps and batch must be positive, got {steps} and {batch}")
    names = [backend or cfg.train.backend or AUTO, *([against] if against else [])]
    for name in names:
        check_backends(name)
    device = pick_device(cfg.train.device)
    if device.type == "cpu":
        tune_allocator()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    cfg, source = _inputs(cfg, device, data, batch, out)
    dtypes = {torch.float32, PRECISIONS[cfg.train.precision]}
    before = rates(device, dtypes, quick=quick)
    runners = [_Runner(cfg, device, source, name) for name in names]
    for _ in range(WARMUP + (cuda_graph.WARMUP if cfg.train.cuda_graph else 0)):
        for runner in runners:
            runner.step()
    for _ in range(steps):  # the backends take turns: what disturbs the machine disturbs both
        for runner in runners:
            runner.timed_step()
    for number in range(steps):
        for runner in runners:
            last = out / f"trace_{_slug(runner.backend)}.json" if number == steps - 1 else None
            runner.traced_step(last)
    for runner in runners:
        runner.memory_step()
    after = rates(device, dtypes, quick=quick)
    ceilings = {name: max(rate, after[name]) for name, rate in before.items()}
    result = Profile(
        preset=cfg.preset,
        shape=runners[0].shape,
        unit=UNITS[cfg.model.modality],
        precision=cfg.train.precision,
        compile=cfg.train.compile,
        cuda_graph=cfg.train.cuda_graph,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        steps=steps,
        model_flops=runners[0].model_flops // steps,
        rates=ceilings,
        reports=[runner.report(ceilings) for runner in runners],
        environment=write_environment(out),
    )
    from .roofline import plot_profile

    write_json(out / "profile.json", dataclasses.asdict(result), indent=1)
    plot_profile(result, out)
    print("\n".join(table(result)))
    print(f"written: {', '.join(sorted(path.name for path in out.iterdir() if path.is_file()))} in {out}")
    return result


def _inputs(
    cfg: Config, device: torch.device, data: str | None, batch: int | None, out: Path
) -> tuple[Config, Any]:
    """The config of a step of the wanted size, and something that yields its micro-batches forever."""
    front, sample, units = cfg.model.front, cfg.sample_shape, cfg.sample_units
    count = batch
    if count is None:
        count = max(1, int(cfg.data.batch / units))
        if device.type == "cpu":
            count = min(count, max(1, int(CPU_FLOPS / step_flops(cfg.model, (1, *sample)))))
    section = dataclasses.replace(cfg.data, batch=max(1, round(count * units)))
    cfg = dataclasses.replace(cfg, data=section)
    if data is not None:
        return cfg, open_data(data, cfg, device=device, run_dir=out)
    micro = max(1, int(micro_batch(cfg, device, parameters=0) / units))
    generator = torch.Generator().manual_seed(cfg.train.seed)
    batches = []
    for start in range(0, count, micro):
        shape = (min(micro, count - start), *sample)
        if isinstance(front, TextFront):
            source = torch.randint(4, front.vocab_size, shape, generator=generator)
        else:
            source = torch.randn(shape, generator=generator)
        batches.append(Batch(source, torch.arange(start, start + shape[0]), 0).to(device))
    return cfg, batches


def _forever(source: Any, cfg: Config, device: torch.device) -> Iterator[list[Batch]]:
    if not isinstance(source, list):
        yield from source.micro_batches(Position(), micro_batch(cfg, device, parameters=0))
    while True:
        yield source


class _Runner:
    """One backend's trainer, its steps, and what was seen of them."""

    def __init__(self, cfg: Config, device: torch.device, source: Any, backend: str) -> None:
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, backend=backend))
        self.cfg, self.device, self.backend = cfg, device, backend
        self.trainer = Trainer(cfg, device)
        self.stream = _forever(source, cfg, device)
        self.number = 0
        self.walls: list[float] = []
        self.trace, self.memory = Trace(), Trace()
        self.work: defaultdict[str, Tally] = defaultdict(Tally)
        """of the traced steps, by row"""
        self.shape: tuple[int, ...] = ()
        """of the source of the last traced step"""
        self.model_flops = 0
        """of all traced steps"""

    def step(self) -> list[Batch]:
        """One step; returns its micro-batches."""
        self.number += 1
        with phase("step"):
            with phase("data"):
                batches = next(self.stream)
            self.trainer.step(self.number, batches)
            synchronize(self.device)
        return batches

    def timed_step(self) -> None:
        """Without a profiler and without ranges."""
        with force_ranges(False):
            start = time.perf_counter()
            self.step()
            self.walls.append(time.perf_counter() - start)

    def traced_step(self, chrome: Path | None = None) -> None:
        """With both, not as a replay; chrome: file for this step's trace."""
        self.trainer.graphs = None
        with (
            force_ranges(True),
            tally_costs() as tallies,
            torch.profiler.profile(activities=self._activities) as profiler,
        ):
            batches = self.step()
        self.trace.add(fold(read_events(profiler)))
        if chrome is not None:
            profiler.export_chrome_trace(str(chrome))
        for name, tally in tallies.items():
            self.work[name].add(tally.bytes, tally.flops)
        first = batches[0].source.shape
        self.shape = (sum(map(len, batches)), *first[1:])
        self.model_flops += sum(step_flops(self.cfg.model, tuple(batch.source.shape)) for batch in batches)

    def memory_step(self) -> None:
        """Traced with every allocation, which takes time."""
        recorder = torch.profiler.profile(activities=self._activities, profile_memory=True)
        with force_ranges(True), recorder:
            self.step()
        self.memory.add(fold(read_events(recorder)))

    @property
    def _activities(self) -> list[ProfilerActivity]:
        return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]

    def report(self, ceilings: dict[str, float]) -> Report:
        """The rows, held against the measured ceilings."""
        trace, matmul = self.trace, ceilings[str(PRECISIONS[self.cfg.train.precision])]
        return Report(
            backend=self.backend,
            rows=_rows(trace, self.memory, self.work, ceilings["copy"], matmul),
            wall=statistics.median(self.walls),
            coverage=trace.coverage,
            unnamed={name: ns / trace.steps / 1e9 for name, ns in trace.unnamed.most_common()},
            peak=self.memory.peak,
            resident=_resident(self.trainer),
        )


def _slug(backend: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in backend)


def _resident(trainer: Trainer) -> int:
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    for state in trainer.optimizer.state.values():
        tensors += state.values()
    return sum(t.numel() * t.element_size() for t in tensors)


def _rows(trace: Trace, memory: Trace, work: Mapping[str, Tally], copy: float, matmul: float) -> list[Row]:
    """The slowest first. work: bytes and FLOPs of all traced steps, by row."""
    times = {name: trace.seconds(name) for name in trace.rows}
    total = sum(times.values()) + trace.unnamed.total() / trace.steps / 1e9
    rows = []
    for name, seconds in sorted(times.items(), key=lambda item: -item[1]):
        tally = work.get(name, Tally())
        moved, flops = tally.bytes / trace.steps, tally.flops / trace.steps
        rows.append(
            Row(
                name=name,
                seconds=seconds,
                share=seconds / total if total else 0.0,
                calls=trace.rows[name].calls / trace.steps,
                bytes=moved,
                flops=flops,
                peak=memory.rows[name].peak if name in memory.rows else 0,
                of_copy=moved / seconds / copy if seconds else 0.0,
                of_matmul=flops / seconds / matmul if seconds else 0.0,
            )
        )
    return rows


def _blank(value: float, form: str) -> str:
    return format(value, form) if value else "-"


def table(profile: Profile) -> list[str]:
    """Lines of text: a hot path each, the slowest first; then the step as a whole."""
    ours, *others = profile.reports
    base = {row.path: row.seconds for other in others for row in other.rows}
    width = max(len(row.name) for row in ours.rows)
    modes = "".join(f", {name}" for name in ("compile", "cuda_graph") if getattr(profile, name))
    head = (
        f"{'hot path':<{width}} {'ms':>9} {'share':>6} {'calls':>6} {'MB':>8} {'GFLOP':>8} {'GB/s':>7} "
        f"{'GFLOP/s':>8} {'%copy':>6} {'%matmul':>7} {'peak MiB':>8}"
    )
    lines = [
        f"{profile.preset}, {profile.precision}{modes}, source {tuple(profile.shape)}, on {profile.device}: "
        f"backend {ours.backend}, {profile.steps} steps; copy {profile.rates['copy'] / 1e9:,.1f} GB/s, "
        f"matmul {profile.matmul / 1e9:,.0f} GFLOP/s",
        head + "".join(f" {other.backend + ' ms':>10} {'times':>6}" for other in others),
    ]
    for row in ours.rows:
        line = (
            f"{row.name:<{width}} {row.seconds * 1e3:>9.3f} {row.share:>6.1%} {_blank(row.calls, 'g'):>6} "
            f"{_blank(row.bytes / 1e6, '.2f'):>8} {_blank(row.flops / 1e9, '.3f'):>8} "
            f"{_blank(row.bytes / row.seconds / 1e9 if row.seconds else 0, '.1f'):>7} "
            f"{_blank(row.flops / row.seconds / 1e9 if row.seconds else 0, '.1f'):>8} "
            f"{_blank(row.of_copy, '.0%'):>6} {_blank(row.of_matmul, '.0%'):>7} {row.peak / 2**20:>8.1f}"
        )
        if others:
            slower = base.get(row.path)
            line += (
                f" {slower * 1e3:>10.3f} {slower / row.seconds:>6.2f}"
                if slower and row.seconds
                else f" {'-':>10} {'-':>6}"
            )
        lines.append(line)
    for report in profile.reports:
        lines += _whole(report, profile)
    return lines


def _whole(report: Report, profile: Profile) -> list[str]:
    flops = profile.model_flops / report.wall
    samples = profile.shape[0] / report.wall
    counted = sum(row.flops for row in report.rows)
    busy = sum(row.seconds for row in report.rows)
    spared = ", which spare kept places of the decoder" if counted < profile.model_flops else ""
    lines = [
        f"{report.backend}: step {report.wall * 1e3:,.1f} ms, {samples:,.1f} samples/s; traced, operators or "
        f"kernels take {busy * 1e3:,.1f} ms, {report.coverage:.2%} of it in named ranges",
        f"  model FLOPs {profile.model_flops / 1e9:,.2f} G a step ({counted / 1e9:,.2f} G in the rows above"
        f"{spared}), {flops / 1e9:,.1f} GFLOP/s = {flops / profile.matmul:.0%} of the matmul rate",
        f"  memory: {report.resident / 2**20:,.1f} MiB stay, {report.peak / 2**20:,.1f} MiB more at the peak",
    ]
    for name, seconds in list(report.unnamed.items())[:5]:
        lines.append(f"  outside named ranges: {seconds * 1e3:.3f} ms {name[:80]}")
    return lines
