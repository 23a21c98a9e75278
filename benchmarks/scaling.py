"""How step time and memory grow with masks M, tokens T and model size: curves and fitted exponents.

    python -m benchmarks.scaling                              tiny models on a CPU, a minute or two
    python -m benchmarks.scaling --presets image_base audio_base text_base --device cuda
    python -m benchmarks.scaling --axes masks tokens --out benchmarks/results/scaling_cpu.json

One thing is varied at a time from the preset: M; T through image side, seconds of audio or tokens of text;
width at a constant head width; depth. Every point is a whole step (masks, forward with teacher, backward,
clip, optimizer, EMA), the points of an axis in turn, round after round; time is the median over the rounds,
memory the highest that tensors take during a step, weights and optimizer state included. The exponent p of
x^p is the slope of the least-squares line through the logarithms. Writes JSON and, beside it, a PNG.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.machine import provenance
from d2v.config.fronts import ImageFront, TextFront
from d2v.config.presets import PRESETS
from d2v.config.presets import preset as load_preset
from d2v.config.run import Config
from d2v.data.types import Batch
from d2v.tools.ceilings import synchronize
from d2v.train.pretrain_step import Trainer
from d2v.train.process import tune_allocator
from d2vkern.testing import peak_memory

Precision = Literal["fp32", "bf16"]
RESULTS = Path(__file__).parent / "results"
FACTORS = {"masks": (1, 2, 4, 8), "tokens": (1, 2, 4), "width": (0.5, 1, 2), "depth": (0.5, 1, 2, 4)}
"""axis -> what the preset's value is multiplied by; masks: the values themselves"""
BATCHES = {"cpu": {"image": 4, "audio": 2, "text": 4}, "cuda": {"image": 16, "audio": 4, "text": 8}}
SECONDS, BLOCK = {"cpu": 1.0, "cuda": 4.0}, {"cpu": 32, "cuda": 128}
"""at token factor 1; images start at the preset's own size"""


@dataclass(frozen=True)
class Point:
    """One model on one batch shape. x: the value that is varied, as the plot's axis has it."""

    x: float
    cfg: Config
    shape: tuple[int, ...]
    """[B,C,H,W], [B,samples] or [B,T]"""


def points(name: str, axis: str, factors: Sequence[float], device: str) -> list[Point]:
    """The points of one axis of a preset; x counts masks, tokens, width or blocks."""
    return [_point(load_preset(name), axis, factor, device) for factor in factors]


def _point(cfg: Config, axis: str, factor: float, device: str) -> Point:
    model = cfg.model
    if axis == "masks":
        model = dataclasses.replace(model, mask=dataclasses.replace(model.mask, clones=round(factor)))
    elif axis == "width":
        heads = max(1, round(model.heads * factor))
        model = dataclasses.replace(model, heads=heads, dim=model.dim // model.heads * heads)
    elif axis == "depth":
        depth = max(1, round(model.depth * factor))
        target = dataclasses.replace(model.target, top_k=min(model.target.top_k, depth))
        model = dataclasses.replace(model, depth=depth, target=target)
    longer = factor if axis == "tokens" else 1
    front, batch = model.front, BATCHES[device][model.modality]
    if isinstance(front, ImageFront):
        side = math.sqrt(longer)
        sizes = [max(1, round(patches * side)) * front.patch for patches in front.grid]
        front = dataclasses.replace(front, height=sizes[0], width=sizes[1])
        shape: tuple[int, ...] = (batch, front.channels, *sizes)
        tokens = front.grid[0] * front.grid[1]
    elif isinstance(front, TextFront):
        tokens = round(BLOCK[device] * longer)
        front = dataclasses.replace(front, max_positions=max(front.max_positions, tokens))
        shape = (batch, tokens)
    else:
        shape = (batch, round(SECONDS[device] * longer * front.sample_rate))
        tokens = front.frames(shape[1])
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(model, front=front))
    x = {"masks": model.mask.clones, "tokens": tokens, "width": model.dim, "depth": model.depth}[axis]
    return Point(x, cfg, shape)


def _batch(point: Point, device: torch.device) -> Batch:
    """Noise of the point's shape."""
    source: Tensor
    if isinstance(front := point.cfg.model.front, TextFront):
        source = torch.randint(4, front.vocab_size, point.shape, device=device)
    else:
        source = torch.randn(point.shape, device=device)
    return Batch(source=source, ids=torch.arange(point.shape[0], device=device), epoch=0)


def measure(
    curve: list[Point], device: torch.device, rounds: int, precision: Precision
) -> list[dict[str, float]]:
    """`{"x", "seconds", "peak_MiB"}` of every point."""
    steps = [_stepper(point, device, precision) for point in curve]
    times: list[list[float]] = [[] for _ in curve]
    for turn in range(rounds + 1):
        for step, seen in zip(steps, times, strict=True):
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if turn:  # the first round warms up: allocator, kernel choice, optimizer state
                seen.append(time.perf_counter() - start)
    del steps
    return [
        {
            "x": point.x,
            "seconds": statistics.median(seen),
            "peak_MiB": _peak(point, device, precision) / (1 << 20),
        }
        for point, seen in zip(curve, times, strict=True)
    ]


def _stepper(point: Point, device: torch.device, precision: Precision) -> Callable[[], object]:
    train = dataclasses.replace(point.cfg.train, precision=precision)
    trainer = Trainer(dataclasses.replace(point.cfg, train=train), device)
    batch = _batch(point, device)
    number = iter(range(1, train.steps + 1))
    return lambda: trainer.step(next(number), [batch])


def _peak(point: Point, device: torch.device, precision: Precision) -> int:
    """Bytes of a step in a model made for it, so that weights and optimizer state are in the count."""

    def whole() -> None:
        step = _stepper(point, device, precision)
        for _ in range(2):  # the first one makes the optimizer state
            step()

    gc.collect()
    if device.type != "cuda":
        return peak_memory(whole)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    whole()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def fit(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The exponent p of the x^p nearest to y, by least squares on the logarithms."""
    if len(set(xs)) < 2 or min(*xs, *ys) <= 0:
        raise ValueError(f"fit: xs must be two or more different positive values, got {list(xs)}, {list(ys)}")
    a, b = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_a, mean_b = statistics.fmean(a), statistics.fmean(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return covariance / sum((x - mean_a) ** 2 for x in a)


def curve(
    name: str, axis: str, device: torch.device, rounds: int, precision: Precision, factors: Sequence[float]
) -> dict[str, Any]:
    """One entry of the results: points and the two exponents."""
    found = measure(points(name, axis, factors, device.type), device, rounds, precision)
    xs = [point["x"] for point in found]
    return {
        "preset": name,
        "axis": axis,
        "precision": precision,
        "points": found,
        "time_exponent": fit(xs, [point["seconds"] for point in found]),
        "memory_exponent": fit(xs, [point["peak_MiB"] for point in found]),
    }


def plot(results: dict[str, Any], path: Path) -> None:
    """Time above memory, a column per axis, a line per preset; both scales logarithmic."""
    from matplotlib.figure import Figure

    axes_names = [axis for axis in FACTORS if any(found["axis"] == axis for found in results["curves"])]
    figure = Figure(figsize=(3.2 * len(axes_names), 5.6), layout="constrained")
    panels = figure.subplots(2, len(axes_names), squeeze=False, sharex="col")
    for column, axis in enumerate(axes_names):
        for found in (one for one in results["curves"] if one["axis"] == axis):
            xs = [point["x"] for point in found["points"]]
            for row, (key, exponent, factor) in enumerate(
                (("seconds", "time_exponent", 1e3), ("peak_MiB", "memory_exponent", 1))
            ):
                ys = [factor * point[key] for point in found["points"]]
                label = f"{found['preset']}: x^{found[exponent]:.2f}"
                panels[row][column].plot(xs, ys, marker="o", linewidth=1.2, label=label)
        for panel in (panels[0][column], panels[1][column]):
            panel.set(xscale="log", yscale="log")
            panel.grid(alpha=0.3, which="both")
            panel.legend(frameon=False, fontsize=7)
        panels[1][column].set(xlabel=axis)
    panels[0][0].set(ylabel="ms a step")
    panels[1][0].set(ylabel="peak MiB")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a line per curve, write JSON and PNG."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), help="tiny on a CPU, base on a GPU")
    parser.add_argument("--axes", nargs="+", choices=list(FACTORS), default=list(FACTORS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default=here)
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="two points and one round; means nothing")
    parser.add_argument("--out", type=Path, help="JSON (default results/scaling_DEVICE.json), plot beside it")
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error(f"--rounds must be positive, got {given.rounds}")
    device = torch.device(given.device)
    size = "base" if device.type == "cuda" else "tiny"
    presets = given.presets or [f"{modality}_{size}" for modality in ("image", "audio", "text")]
    precision: Precision = given.precision or ("bf16" if device.type == "cuda" else "fp32")
    rounds = 1 if given.smoke else given.rounds
    tune_allocator()
    curves = []
    for name in presets:
        for axis in given.axes:
            factors = FACTORS[axis][:2] if given.smoke else FACTORS[axis]
            curves.append(curve(name, axis, device, rounds, precision, factors))
            print(_line(curves[-1]), flush=True)
    results = {"provenance": provenance(device) | {"rounds": rounds}, "curves": curves}
    out = given.out or RESULTS / f"scaling_{device.type}.json"
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(results, out.with_suffix(".png"))
    return 0


def _line(found: dict[str, Any]) -> str:
    ends = found["points"][0], found["points"][-1]
    xs, times, sizes = ([point[key] for point in ends] for key in ("x", "seconds", "peak_MiB"))
    return (
        f"{found['preset']}, {found['axis']} {xs[0]:g} to {xs[1]:g}: "
        f"{1e3 * times[0]:.3g} to {1e3 * times[1]:.3g} ms (x^{found['time_exponent']:.2f}), "
        f"{sizes[0]:.3g} to {sizes[1]:.3g} MiB (x^{found['memory_exponent']:.2f})"
    )


if __name__ == "__main__":
    sys.exit(main())
