"""What pretraining is worth downstream at toy size: fine-tuned from it against from scratch, several seeds.

    python -m benchmarks.downstream --spoken spoken/ --glosses glosses/ --work runs/ --out downstream_cpu.json

`spoken/` is made by benchmarks.spoken_digits and `glosses/` by benchmarks.glosses; a task whose folder is not
given is left out. Each task pretrains once and then fine-tunes with and without it under each seed, through
the commands that the result names; what `--work` holds already is not done again. Scores are those after the
last step, on parts that training never saw.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import provenance
from d2v.cli.main import main as d2v
from d2v.tools.race_report import spread
from d2v.train.checkpoint import latest_checkpoint
from d2v.train.progress import read_metrics

SCHEMA = 1


@dataclass(frozen=True)
class Task:
    """One line of the table."""

    name: str
    says: str
    """what is learned from how many labels"""
    preset: str
    pretraining: tuple[str, ...]
    """options of `d2v train`; {data} is the task's folder"""
    tuning: tuple[str, ...]
    """options of `d2v finetune`"""
    steps: tuple[int, int]
    """of pretraining and of fine-tuning"""
    scores: dict[str, str]
    """key of the result -> what people call it"""


TASKS = (
    Task(
        "digits", "which of 10 digits, 100 labelled pictures", "image_tiny",
        ("--data", "digits"),
        ("--task", "classify", "--data", "digits", "--data-limit", "100"), (2000, 600),
        {"test/top1": "top-1, %"},
    ),
    Task(
        "spoken", "transcripts of spoken digits, 200 labelled utterances", "audio_tiny",
        ("--data", "speech"),
        ("--task", "ctc", "--data", "{data}", "--data-limit", "200"), (600, 600),
        {"test/wer": "WER, %", "test_unseen/wer": "WER of an unseen voice, %"},
    ),
    Task(
        "glosses", "which of 25 supersenses, 5,000 labelled glosses", "text_tiny",
        ("--data", "{data}/train.jsonl", "--data.block", "64"),
        ("--task", "sentence", "--data", "{data}", "--data-limit", "5000"), (2000, 600),
        {"test/accuracy": "accuracy, %"},
    ),
)  # fmt: skip


def run(task: Task, data: str, work: Path, seeds: int) -> dict[str, Any]:
    """Pretrain, fine-tune, and what came of it."""
    pretrained = work / task.name / "pretrained"
    options = [option.format(data=data) for option in task.pretraining]
    steps = ["--train.steps", str(task.steps[0]), "--train.save-every", str(task.steps[0])]
    command = ["train", task.preset, *options, *steps, "--out", str(pretrained)]
    runs = []
    _once(command, pretrained, task.steps[0])
    for seed in range(1, seeds + 1):
        for start in ("pretrained", "scratch"):
            out = work / task.name / f"{start}{seed}"
            options = [option.format(data=data) for option in task.tuning]
            settings = ["--train.seed", str(seed), "--train.steps", str(task.steps[1])]
            settings += ["--train.evaluate-every", str(task.steps[1])]
            tune = ["finetune", str(pretrained), *options, *settings, "--out", str(out)]
            tune += ["--scratch"] if start == "scratch" else []
            _once(tune, out, task.steps[1])
            last = [row for row in read_metrics(out) if set(task.scores) <= set(row)][-1]
            scores = {key: last[key] for key in task.scores}
            runs.append({
                "start": start, "seed": seed, "scores": scores, "seconds": _seconds(out),
                "command": f"d2v {shlex.join(tune)}",
            })  # fmt: skip
            print(task.name, start, seed, scores, flush=True)
    return {
        "task": task.name, "says": task.says, "names": task.scores, "preset": task.preset,
        "pretraining": {"command": f"d2v {shlex.join(command)}", "seconds": _seconds(pretrained)},
        "runs": runs,
    }  # fmt: skip


def _once(command: list[str], out: Path, steps: int) -> None:
    newest = latest_checkpoint(out) if out.is_dir() else None
    if newest is not None and newest.name == f"step_{steps}":
        return
    if d2v(command) != 0:
        raise RuntimeError(f"d2v {shlex.join(command)} failed")


def _seconds(out: Path) -> float:
    """Of training, evaluation left out."""
    return round(float([row["seconds"] for row in read_metrics(out) if "seconds" in row][-1]), 1)


def downstream_rows(data: dict[str, Any]) -> list[list[str]]:
    """Cells of README's table, the head first."""
    rows = [["task", "score", "pretrained", "from scratch", "pretraining s", "fine-tuning s"]]
    for task in data["tasks"]:
        for key, name in task["names"].items():
            cells = [
                spread([100 * one["scores"][key] for one in task["runs"] if one["start"] == start])
                for start in ("pretrained", "scratch")
            ]
            tuning = statistics.median(one["seconds"] for one in task["runs"])
            seconds = [f"{task['pretraining']['seconds']:.0f}", f"{tuning:.0f}"]
            rows.append([task["says"], name, *cells, *seconds])
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.downstream",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--spoken", metavar="FOLDER", help="made by benchmarks.spoken_digits")
    parser.add_argument("--glosses", metavar="FOLDER", help="made by benchmarks.glosses")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    given = parser.parse_args(arguments)
    folders = {"digits": "digits", "spoken": given.spoken, "glosses": given.glosses}
    found = [run(task, data, given.work, given.seeds) for task in TASKS if (data := folders[task.name])]
    result = {"schema": SCHEMA, "machine": provenance(torch.device("cpu")), "tasks": found}
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(" | ".join(row) for row in downstream_rows(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
