"""`d2v demo`: images, speech and text in about ten minutes on two CPU cores, before and after.

Each tiny preset is pretrained without labels on its embedded data set, then a linear classifier and nearest
neighbours read phones, digits and topics from the frozen features of the encoder, untrained and trained,
and from the raw input. The same machine gives the same numbers every time.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..config.atomic import write_json
from ..config.presets import preset
from ..config.run import Config
from ..data.open import open_labelled
from ..evaluate.features import Layer
from ..evaluate.probe import probe_model, probe_raw
from ..formats.open import open_model
from ..model import build_model
from ..model.pretraining import Weights
from ..train import process
from ..train.backends import use_backends
from ..train.loop import RunError
from ..train.pretrain import RunResult, run
from ..train.process import pick_device


@dataclasses.dataclass(frozen=True)
class Task:
    """One line of the demo."""

    preset: str
    data: str
    label: str
    """what the probe reads from the features"""
    minutes: float
    """of training that two idle cores need at most"""
    layer: Layer = "all"
    weights: Weights = "student"
    over_untrained: float = 0.0
    """points that the linear probe should gain on every test split"""
    over_raw: float | None = None


TASKS = {
    "image": Task("image_tiny", "digits", "which digit", 5, over_untrained=15, over_raw=20),
    "audio": Task("audio_tiny", "speech", "phone of each frame", 2),
    "text": Task("text_tiny", "text", "area of the library", 2),
}
MARKER = ".d2v-demo"
"""file that says a folder was made here, so that starting anew may empty it"""
TEXT_NOTE = "At this size a masked language model learns more from text than data2vec 2.0 does."


def run_demo(out: str | Path, scale: float, configs: Mapping[str, Config] | None = None) -> dict[str, Any]:
    """Train, probe, print one table, write `summary.json` and `plots/`; returns what the summary holds.

    out: folder, begun anew when an earlier demo made it; one that holds anything else is refused.
    scale: factor on the steps of every run, and on warm-up and EMA annealing with them.
    configs: modality -> config in place of its tiny preset.
    Raises ValueError for the folder and RunError when a run stops early.
    """
    out, began = Path(out), time.perf_counter()
    _claim(out)
    results: dict[str, dict[str, Any]] = {}
    for modality, task in TASKS.items():
        cfg = scaled((configs or {}).get(modality) or preset(task.preset), scale)
        print(f"\n{modality}: {cfg.train.steps:,} steps of {task.preset} on {task.data}", flush=True)
        results[modality] = _one(task, cfg, out / task.preset)
    seconds = round(time.perf_counter() - began, 1)
    summary = {
        **results,
        "seconds": seconds,
        "scale": scale,
        "machine": {
            "device": str(pick_device("auto")),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }
    write_json(out / "summary.json", summary, indent=1)
    plots = [_plot_losses(results, out / "plots"), _plot_probes(results, out / "plots")]
    print("\n" + "\n".join([*table(results), "", *remarks(results, scale)]))
    print(f"{seconds / 60:.1f} minutes in all; {out / 'summary.json'}, {plots[0]}, {plots[1]}")
    return summary


def scaled(cfg: Config, scale: float) -> Config:
    """The same run, `scale` times as long: steps, warm-up and EMA annealing; saved once, at its end."""

    def times(count: int) -> int:
        return max(1, round(count * scale))

    steps = times(cfg.train.steps)
    return dataclasses.replace(
        cfg,
        optim=dataclasses.replace(cfg.optim, warmup=times(cfg.optim.warmup)),
        ema=dataclasses.replace(cfg.ema, anneal=times(cfg.ema.anneal)),
        train=dataclasses.replace(cfg.train, steps=steps, save_every=steps, log_every=max(1, steps // 40)),
    )


def _claim(out: Path) -> None:
    """An empty folder with the marker in it; only a marked one is emptied."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"demo: --out must be a folder, {out} is a file")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).exists():
            raise ValueError(f"demo: {out} holds something else than a demo; choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()


def _one(task: Task, cfg: Config, folder: Path) -> dict[str, Any]:
    """Train, then probe the encoder as it was at the start, as it is now, and the raw input."""
    result = run(cfg, task.data, folder)
    if not result.finished:
        raise RunError(
            f"demo: {task.preset} stopped at step {result.step}; the demo starts anew when repeated"
        )
    trained, cfg_run, run_dir = open_model(folder)
    labelled = open_labelled(task.data, cfg_run, run_dir=run_dir)
    process.seed_all(cfg.train.seed)  # as the run did before it made its model
    untrained = build_model(cfg.model).to(next(trained.parameters()).device)
    with use_backends(cfg.train.backend):
        probe = {
            "raw": probe_raw(labelled),
            "untrained": probe_model(untrained, labelled, layer=task.layer, weights=task.weights),
            "trained": probe_model(trained, labelled, layer=task.layer, weights=task.weights),
        }
    return {
        "preset": task.preset,
        "data": task.data,
        "label": task.label,
        **_training(result),
        "probe": probe,
    }


def _training(result: RunResult) -> dict[str, Any]:
    first, last = result.metrics[0], result.metrics[-1]
    return {
        "steps": result.step,
        "seconds": round(result.seconds, 1),
        "loss_first": first["loss"],
        "loss_last": last["loss"],
        "target_variance": last["target_var"],
        "alarms": sorted({alarm for row in result.metrics for alarm in row["alarms"]}),
        "losses": [[row["step"], row["loss"]] for row in result.metrics],
    }


def table(results: Mapping[str, dict[str, Any]]) -> list[str]:
    """One line per test split: linear probes in percent, kNN beside the trained one, and the training."""
    lines = [
        "Accuracy on held-out data, % (linear probe of frozen features; in brackets 20 nearest neighbours)",
        f"{'':<7}{'label':<21}{'test split':<14}{'raw input':>14}{'untrained':>14}{'trained':>14}{'gain':>7}"
        f"{'steps':>7}{'s':>6}{'loss':>14}{'target dev.':>13}",
    ]
    for modality, found in results.items():
        training = (
            f"{found['steps']:>7,}{found['seconds']:>6.0f}"
            f"{found['loss_first']:>7.2f}>{found['loss_last']:<6.2f}{found['target_variance']:>13.2f}"
        )
        head = f"{modality:<7}{found['label']:<21}"
        for split in found["probe"]["trained"]["linear"]:
            cells = "".join(
                f"{100 * source['linear'][split]:>7.1f} ({100 * source['knn'][split]:>4.1f})"
                for source in (found["probe"][name] for name in ("raw", "untrained", "trained"))
            )
            lines.append(f"{head}{split:<14}{cells}{_gain(found, 'untrained', split):>+7.1f}{training}")
            head, training = " " * 28, ""
    return lines


def _gain(found: Mapping[str, Any], over: str, split: str) -> float:
    """Points that the trained encoder's linear probe is ahead of `over`."""
    return 100 * (found["probe"]["trained"]["linear"][split] - found["probe"][over]["linear"][split])


def remarks(results: Mapping[str, dict[str, Any]], scale: float) -> list[str]:
    """What a reader should know: gains that fell short, slow runs, alarms, and where a rival leads."""
    lines = []
    for modality, found in results.items():
        task = TASKS[modality]
        for split in found["probe"]["trained"]["linear"]:
            for over, points in {"untrained": task.over_untrained, "raw": task.over_raw}.items():
                gain = _gain(found, over, split)
                if points is not None and (gain < points or gain <= 0):
                    lines.append(
                        f"short of the mark: {modality}, {split}: {gain:+.1f} points over {over}, "
                        f"{f'{points:g} wanted' if points else 'more than 0 wanted'}"
                    )
        if found["alarms"]:
            lines.append(f"warning: {modality}: alarms during training: {', '.join(found['alarms'])}")
        if found["seconds"] > 60 * task.minutes * scale:
            lines.append(
                f"warning: {modality} took {found['seconds'] / 60:.1f} minutes; "
                f"two idle cores need less than {task.minutes * scale:g}"
            )
    return [*lines, TEXT_NOTE]


def _plot_losses(results: Mapping[str, dict[str, Any]], folder: Path) -> Path:
    """A panel per modality."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (modality, found) in zip(panels, results.items(), strict=True):
        steps, losses = zip(*found["losses"], strict=True)
        axes.plot(steps, losses, linewidth=1.2, marker="o" if len(steps) == 1 else None)
        axes.set(title=f"{modality}: {found['preset']}", xlabel="step")
        axes.grid(alpha=0.3)
    figure.supylabel("loss per masked token")
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "loss.png", dpi=110)
    return folder / "loss.png"


def _plot_probes(results: Mapping[str, dict[str, Any]], folder: Path) -> Path:
    """Three bars per test split: raw input, untrained, trained."""
    from matplotlib.figure import Figure

    splits = [
        (name, split) for name, found in results.items() for split in found["probe"]["trained"]["linear"]
    ]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for i, source in enumerate(("raw", "untrained", "trained")):
        heights = [100 * results[name]["probe"][source]["linear"][split] for name, split in splits]
        bars = axes.bar([place + 0.27 * (i - 1) for place in range(len(splits))], heights, 0.25, label=source)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(splits)), [f"{name}\n{split}" for name, split in splits])
    axes.set(ylabel="linear probe, % right")
    axes.legend(frameon=False)
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "probe.png", dpi=110)
    return folder / "probe.png"
