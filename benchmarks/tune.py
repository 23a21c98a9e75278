"""Measure launch configurations on the GPU at hand and write them to kernels/tuned.json.

    python -m benchmarks.tune                              every choice that the ops make at presets' shapes
    python -m benchmarks.tune --ops gather loss --presets image_base
    python -m benchmarks.tune --dry-run                    list choices and candidates; needs no GPU

A kernel asks for a configuration by its name and a shape bucket (kernels/_tuning.py). For each such choice
the first case that makes it is run with every candidate forced. A candidate that fails the benchmarks' gate
is out; those left take turns like the variants of a benchmark (benchmarks/harness.py). The fastest is written
when it beats the default by more than THRESHOLD; otherwise the default stays, and no entry. Only this GPU's
entries of the kernels that were measured are replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.aot_record import DTYPES, META, as_on_a_gpu, cases_of, triton_stems
from benchmarks.cases import Call, Case, Settings, backward, gradients_like, make_inputs, named, require_grad
from benchmarks.gate import Gate
from benchmarks.harness import sets_needed, step_of, time_variants, with_gradients
from d2v.config.presets import PRESETS
from d2vkern.kernels import _tuning
from d2vkern.kernels._launch import record_launches
from d2vkern.kernels._tuning import Config, forced, record_choices

BASE = ["image_base", "audio_base", "text_base"]
THRESHOLD = 0.02
"""share of the default's time that another candidate must save"""


@dataclass(frozen=True)
class Choice:
    """A configuration that a kernel asks for, and where it first asks."""

    kernel: str
    bucket: str
    candidates: tuple[Config, ...]
    case: Case
    direction: str
    """"forward" or "forward+backward\""""


def choices_of(stems: Iterable[str], presets: Iterable[str], dtypes: Iterable[str]) -> list[Choice]:
    """Every choice with more than one candidate, on meta tensors."""
    found: dict[tuple[str, str], Choice] = {}
    for _, case in cases_of(stems, presets, dtypes):
        inputs = require_grad(case, case.make(META))
        with as_on_a_gpu(), record_launches():
            with record_choices() as forward:
                outputs = named(case.call(inputs, "triton"))
            with record_choices() as both:
                if case.leaves:
                    gradients = gradients_like(outputs, Settings(device=META), case.dtype)
                    backward(case, inputs, outputs, gradients)
        for direction, asked in (("forward", forward), ("forward+backward", both)):
            for (kernel, bucket), candidates in asked.items():
                choice = Choice(kernel, bucket, tuple(candidates), case, direction)
                if len(candidates) > 1:
                    found.setdefault((kernel, bucket), choice)
    return list(found.values())


def measure(choice: Choice, settings: Settings) -> list[dict[str, Any]]:
    """A row per candidate, the default first: "us", or "failed" with the reason."""
    case = choice.case

    def with_candidate(config: Config, run: Callable[[], object]) -> Callable[[], object]:
        def call() -> object:
            with forced(choice.kernel, choice.bucket, config):
                return run()

        return call

    def on_triton(inputs: Any) -> Any:
        return case.call(inputs, "triton")

    rows = _gated(choice, Gate(case, settings), on_triton)
    count = sets_needed(make_inputs(case, settings, 0), settings)
    sets = [with_gradients(case, make_inputs(case, settings, i), settings) for i in range(count)]
    steps = [step_of(case, on_triton, some, choice.direction) for some in sets]
    sound = {str(i): row for i, row in enumerate(rows) if "failed" not in row}
    runs = {name: [with_candidate(row["config"], step) for step in steps] for name, row in sound.items()}
    timed = time_variants(runs, settings)
    for name, row in sound.items():
        row["us"] = timed[name]["us"]
    return rows


def _gated(choice: Choice, gate: Gate, run: Call) -> list[dict[str, Any]]:
    """A row per candidate, with what is wrong with its results."""
    rows = []
    for config in choice.candidates:
        row: dict[str, Any] = {"config": config}
        try:
            with forced(choice.kernel, choice.bucket, config):
                gate.check(run)
        except Exception as error:  # a candidate may be wrong or too large; the others are measured
            row["failed"] = f"{type(error).__name__}: {error}"
        rows.append(row)
    return rows


def best(rows: Sequence[dict[str, Any]]) -> Config | None:
    """The configuration to write; None when the default is as good."""
    sound = [row for row in rows if "us" in row]
    if not sound:
        return None
    fastest, default = min(sound, key=lambda row: row["us"]), rows[0]
    if fastest is default or ("us" in default and fastest["us"] > default["us"] * (1 - THRESHOLD)):
        return None
    return fastest["config"]


def write(path: Path, gpu: str, kernels: Iterable[str], chosen: dict[tuple[str, str], Config]) -> None:
    """Replace the entries of one GPU for `kernels`, leave all others."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    mine = {name: buckets for name, buckets in table.get(gpu, {}).items() if name not in set(kernels)}
    for (kernel, bucket), config in chosen.items():
        mine.setdefault(kernel, {})[bucket] = config
    table[gpu] = mine
    table = {name: kernels for name, kernels in table.items() if kernels}
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def tune(choices: list[Choice], settings: Settings, gpu: str, path: Path) -> None:
    """Measure every choice and write what was found after each, so that an interruption loses little."""
    chosen: dict[tuple[str, str], Config] = {}
    for i, choice in enumerate(choices, start=1):
        rows = measure(choice, settings)
        config = best(rows)
        if config is not None:
            chosen[choice.kernel, choice.bucket] = config
        print(f"[{i}/{len(choices)}] {_title(choice)}")
        for row in rows:
            mark = "->" if row["config"] == (config or choice.candidates[0]) else "  "
            result = row["failed"] if "failed" in row else f"{row['us']:.2f} us"
            print(f" {mark} {_words(row['config'])}: {result}", flush=True)
        write(path, gpu, {choice.kernel for choice in choices[:i]}, chosen)
        torch.cuda.empty_cache()
    _tuning.read_table.cache_clear()


def _title(choice: Choice) -> str:
    case = choice.case
    return f"{choice.kernel} ({choice.bucket}): {case.op} ({case.name}), {case.preset}, {choice.direction}"


def _words(config: Config) -> str:
    return ", ".join(f"{name}={value}" for name, value in config.items())


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stems = triton_stems()
    parser.add_argument("--ops", nargs="+", choices=stems, default=stems, help="all ops when absent")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=BASE)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16"])
    parser.add_argument("--dry-run", action="store_true", help="list choices and candidates, measure nothing")
    parser.add_argument("--table", type=Path, default=_tuning.TABLE, help="default: kernels/tuned.json")
    args = parser.parse_args(arguments)
    choices = choices_of(args.ops, args.presets, args.dtypes)
    if args.dry_run:
        for choice in choices:
            print(_title(choice))
            for config in choice.candidates:
                print(f"    {_words(config)}")
        print(f"{len(choices)} choices, {sum(len(choice.candidates) for choice in choices)} candidates")
        return 0
    if not torch.cuda.is_available():
        parser.error("measuring needs a GPU; --dry-run lists what would be measured")
    settings = Settings(device=torch.device("cuda"), compile=False)
    tune(choices, settings, torch.cuda.get_device_name(), args.table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
