"""What a run says while it runs: a live line on a terminal, plain lines elsewhere, and `metrics.jsonl`.

`metrics.jsonl` holds one JSON object per log step. Everything in it but `TIMING` is a function of the
config and the data, so a stopped and resumed run writes the file that an unbroken one writes.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from ..config.atomic import write_text

METRICS = "metrics.jsonl"
TIMING = ("samples_per_s", "seconds")
"""keys of a line that depend on the machine"""


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; a half-written last line (a killed run) is left out.

    Raises FileNotFoundError, and ValueError naming the line that is not JSON.
    """
    path = Path(run) / METRICS
    if not path.exists():
        raise FileNotFoundError(f"metrics: {path} does not exist")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"metrics: {path} line {number} is not JSON: {error}") from error
    return rows


def truncate_metrics(run: str | Path, step: int, *, scored: bool = True) -> None:
    """Drop the lines after `step`: a resumed run writes them again. Atomic; no file is no lines.

    scored: False to drop the scores of `step` itself, too, and keep its log line.
    """
    path = Path(run) / METRICS
    if not path.exists():
        return
    kept = [
        row for row in read_metrics(run)
        if row["step"] < step or (row["step"] == step and (scored or "lr" in row))
    ]  # fmt: skip
    write_text(path, "".join(_line(row) for row in kept))


def _line(row: dict[str, Any]) -> str:
    """One JSON line; NaN and inf, which JSON has no word for, become null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(plain) + "\n"


def duration(seconds: float) -> str:
    """`3h12m`, `4m05s`, `7s`; `?` when unknown."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"


def describe(row: dict[str, Any], steps: int, unit: str, eta: float) -> str:
    """The progress line of one row of metrics."""

    def number(key: str, form: str) -> str:
        value = row.get(key)
        return "-" if value is None else format(value, form)

    ranks = "/".join(number(f"{part}_rank", ".0f") for part in ("front", "pred", "target"))
    return " | ".join([
        f"step {row['step']:,}/{steps:,}",
        f"loss {number('loss', '.4f')}",
        f"target var {number('target_var', '.2f')}",
        f"pred var {number('pred_var', '.2f')}",
        f"rank front/pred/target {ranks}",
        f"lr {number('lr', '.2e')}",
        f"{number('samples_per_s', ',.0f')} {unit}/s",
        f"eta {duration(eta)}",
    ])  # fmt: skip


Row = dict[str, Any]
Rest = tuple[Row, list[str]]
"""the columns of a log line that take long, and warnings to show below it"""


class Progress:
    """Context manager around the loop: `tick` every step, `log` every log step, `say` for anything else.

    What of a line takes long is computed on a thread of its own beside the next steps; the line is written
    with the first step after that, and before anything else is written or said.
    """

    def __init__(
        self,
        run: Path,
        *,
        start: int,
        steps: int,
        unit: str,
        stream: TextIO | None = None,
        describe: Callable[[dict[str, Any], int, str, float], str] = describe,
    ) -> None:
        self.steps, self.unit, self._describe = steps, unit, describe
        self._start, self._began = start, time.perf_counter()
        self._marked, self._samples = self._began, 0.0
        self._file = (run / METRICS).open("a", encoding="utf-8")
        self._stream = stream or sys.stdout
        self._live: Any = None
        self._text = ""
        self._worker: ThreadPoolExecutor | None = None
        self._open: tuple[Row, Row, Future[Rest]] | None = None
        """the line that waits for its rest: the columns before it and those after it"""
        self.pinned = ""
        """shown at the end of the line"""

    def __enter__(self) -> Progress:
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self._stream), refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.settle()
        finally:
            if self._worker is not None:
                self._worker.shutdown()
            if self._live is not None:
                self._live.stop()
            self._file.close()

    def say(self, text: str) -> None:
        """Print a line (a warning, a saved checkpoint) without disturbing the live one."""
        self.settle()
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def tick(self, step: int, samples: float) -> None:
        """One step done, over `samples` samples (audio: seconds)."""
        self._samples += samples
        if self._open is not None and self._open[2].done():
            self.settle()
        if self._live is not None:
            last = self._text.partition(" | ")[2] or "..."
            self._live.update(_unstyled(f"step {step:,}/{self.steps:,} | {last}"))

    def note(self, row: dict[str, Any]) -> None:
        """Write one line of metrics as it is, and show nothing."""
        self.settle()
        self._file.write(_line(row))
        self._file.flush()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time of the block is left out of speed and remaining time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self._marked += spent
            self._began += spent

    def log(self, row: dict[str, Any], rest: Callable[[], Rest] | None = None) -> None:
        """Write one line of metrics, with speed added, and show it; with a rest when that is there."""
        self.settle()
        now = time.perf_counter()
        speed = {
            "samples_per_s": self._samples / max(now - self._marked, 1e-9),
            "seconds": now - self._began,
        }
        self._marked, self._samples = now, 0.0
        if rest is None:
            self._write({**row, **speed})
            return
        if self._worker is None:
            self._worker = _one_thread()
        self._open = (row, speed, self._worker.submit(rest))

    def settle(self) -> None:
        """Wait for the rest of the last line and write it: what must be so before a checkpoint is."""
        if self._open is None:
            return
        row, speed, future = self._open
        self._open = None
        columns, warnings = future.result()
        self._write({**row, **columns, **speed})
        for warning in warnings:
            self.say(warning)

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(_line(row))
        self._file.flush()
        done = row["step"] - self._start
        eta = row["seconds"] / done * (self.steps - row["step"]) if done else math.inf
        self._text = self._describe(row, self.steps, self.unit, eta) + self.pinned
        if self._live is None:
            print(self._text, file=self._stream, flush=True)
        else:
            self._live.update(_unstyled(self._text))


def _one_thread() -> ThreadPoolExecutor:
    """A thread whose torch uses no other threads: a step on a CPU has all the cores."""
    threads = torch.get_num_threads()
    worker = ThreadPoolExecutor(1, "log line", initializer=torch.set_num_threads, initargs=(1,))
    worker.submit(torch.get_num_threads).result()
    torch.set_num_threads(threads)  # for the threads to come, which take the number that was set last
    return worker


def _unstyled(text: str) -> Any:
    from rich.text import Text

    return Text(text)
