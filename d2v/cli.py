"""The command `d2v`. Nothing heavy is imported before the arguments are known to be good.

Exit codes: 0 done, or stopped on request; 1 failed while running; 2 wrong arguments, config or data;
130 interrupted twice. Users' errors are one message on stderr; `D2V_TRACEBACK=1` shows the traceback.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

from tyro.conf import Positional, arg

from .cli_convert import convert
from .cli_finetune import evaluate, finetune
from .cli_parse import Backends, DataPath, Model, UsageError, join_backends, parse, value_of
from .cli_race import race
from .config import (
    Config,
    DataConfig,
    EMAConfig,
    ModelConfig,
    Objective,
    OptimConfig,
    ProbeConfig,
    TrainConfig,
)
from .nsys import parse_steps
from .objectives import for_objective
from .presets import PRESETS, preset

if TYPE_CHECKING:
    from .data import Report


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Pretrain: `d2v train PRESET --data PATH --out RUN`, or `d2v train --resume RUN`.

    Every value of the preset can be overridden by its name. --backend NAME is short for --train.backend, and
    --backend.OP=NAME chooses for one op.
    """

    path: Annotated[str | None, arg(name="data", metavar="PATH")] = None
    """folder, file, tar or embedded data set (digits, speech, text)"""
    out: Annotated[str | None, arg(metavar="RUN")] = None
    """run directory to make"""
    resume: Annotated[str | None, arg(metavar="RUN")] = None
    """run directory to continue, exactly"""
    objective: Objective = "data2vec2"
    """also a rival that data2vec 2.0 is compared with, set up as its paper does; see d2v/objectives.py"""
    compile: bool = False
    """short for --train.compile"""
    cuda_graph: bool = False
    """short for --train.cuda-graph"""
    profile: Literal["nsys"] | None = None
    """nsys: capture --profile-steps for Nsight Systems; run it with benchmarks/nsys.sh"""
    profile_steps: Annotated[str, arg(metavar="START:STOP")] = "10:20"
    """captured from when START steps are done until STOP are"""
    model: ModelConfig
    optim: OptimConfig
    ema: EMAConfig
    data: DataConfig
    train: TrainConfig
    probe: ProbeConfig


def train(arguments: Sequence[str]) -> int:
    """See `TrainOptions`."""
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    command, rest = (f"train {name}", arguments[1:]) if name else ("train PRESET", arguments)
    base, source = preset(name or "image_tiny"), None
    resumed = value_of("--resume", rest)
    if resumed is not None:
        if name is not None:
            raise UsageError("d2v train: --resume RUN goes without a preset, which is in the run directory")
        from .checkpoint import read_config

        base, source = read_config(resumed)
    objective = value_of("--objective", rest)
    if resumed is None and objective in get_args(Objective):
        base = for_objective(base, cast(Objective, objective))
    sections = [f.name for f in dataclasses.fields(Config) if f.name != "preset"]
    defaults = TrainOptions(path=source, **{key: getattr(base, key) for key in sections})
    given = parse(TrainOptions, join_backends(rest, "--train.backend"), command, defaults)
    cfg = _with_modes(given, Config(preset=base.preset, **{key: getattr(given, key) for key in sections}))
    if name is None and given.resume is None:
        raise UsageError(f"d2v train: the preset is missing (or --resume RUN); presets: {', '.join(PRESETS)}")
    if given.resume is not None and objective is not None:
        raise UsageError("d2v train: --resume RUN goes without --objective: a run keeps its objective")
    if given.resume is not None and given.out is not None:
        raise UsageError("d2v train: --resume RUN goes without --out, it continues in RUN")
    out = given.resume or given.out
    if given.path is None or out is None:
        raise UsageError(f"d2v train: {'--data PATH' if given.path is None else '--out RUN'} is missing")
    captured = parse_steps(given.profile_steps) if given.profile else None

    from .train import run

    return run(cfg, given.path, out, resume=given.resume is not None, capture=captured).exit_code


def _with_modes(given: TrainOptions | ProfileOptions, cfg: Config) -> Config:
    """The config with --compile and --cuda-graph switched on where they are given."""
    train = dataclasses.replace(
        cfg.train,
        compile=cfg.train.compile or given.compile,
        cuda_graph=cfg.train.cuda_graph or given.cuda_graph,
    )
    return dataclasses.replace(cfg, train=train)


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Accuracy of frozen features on labelled data."""

    run: Model
    """run directory, checkpoint folder, original .pt, or hf:FOLDER of transformers"""
    data: DataPath
    """labelled folder or embedded data set"""
    layer: int | Literal["mean", "all"] = -1
    """index of a main block, negative from the last; mean: the average of all; all: side by side"""
    weights: Literal["student", "teacher"] = "student"
    """whose features"""
    kind: Literal["linear", "knn", "both"] = "both"
    """linear probe, k nearest neighbours, or both"""
    backend: Backends = None
    """as D2VKERN_BACKEND takes it (eager,attention=triton), or --backend.attention=triton; none: the run's"""


def probe(arguments: Sequence[str]) -> int:
    """See `ProbeOptions`."""
    given = parse(ProbeOptions, join_backends(arguments, "--backend"), "probe")
    kinds: list[Literal["linear", "knn"]] = ["linear", "knn"] if given.kind == "both" else [given.kind]

    from .probe import run_probe

    run_probe(
        given.run, given.data, layer=given.layer, weights=given.weights, kinds=kinds, backend=given.backend
    )
    return 0


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """Features of every sample, as an .npz file."""

    run: Model
    """run directory, checkpoint folder, original .pt, or hf:FOLDER of transformers"""
    data: DataPath
    """folder, file, tar or embedded data set"""
    out: Annotated[str, arg(metavar="F.npz")]
    """file to write"""
    layer: int | Literal["mean", "all"] = -1
    """index of a main block, negative from the last; mean: the average of all; all: side by side"""
    pool: Literal["mean", "cls", "none"] = "mean"
    """mean over tokens, the CLS token, or none: one row per token"""
    weights: Literal["student", "teacher"] = "student"
    """whose features"""
    backend: Backends = None
    """as D2VKERN_BACKEND takes it (eager,attention=triton), or --backend.attention=triton; none: the run's"""


def extract(arguments: Sequence[str]) -> int:
    """See `ExtractOptions`."""
    given = parse(ExtractOptions, join_backends(arguments, "--backend"), "extract")

    from .extract import run_extract

    run_extract(
        given.run, given.data, given.out,
        layer=given.layer, pool=given.pool, weights=given.weights, backend=given.backend,
    )  # fmt: skip
    return 0


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Read a data set once: counts, sizes, histograms, every unreadable file.

    Exits with 1 when training would refuse it.
    """

    data: DataPath
    """folder, file, tar or embedded data set"""
    preset: Annotated[str | None, arg(metavar="NAME")] = None
    """whose front end reads the data (channels, sample rate, tokenizer)"""
    modality: Literal["image", "audio", "text"] | None = None
    """in place of a preset: the published base preset of this modality; none: what most files are"""


def check(arguments: Sequence[str]) -> int:
    """See `CheckOptions`."""
    given = parse(CheckOptions, arguments, "check")
    embedded = {"digits": "image_tiny", "speech": "audio_tiny", "text": "text_tiny"}
    from .data import check_data, guess_modality

    name = given.preset or (None if given.modality else embedded.get(given.data))
    cfg = preset(name or f"{given.modality or guess_modality(given.data)}_base")
    return _print_report(check_data(given.data, cfg))


def _print_report(report: Report) -> int:
    from .data import MAX_UNREADABLE

    print(f"{report.path}: {report.total:,} samples, {len(report.unreadable):,} unreadable")
    for reason, count in report.skipped.items():
        print(f"  skipped {count:,}: {reason}")
    for name, value in report.facts.items():
        print(f"  {name}: {value}")
    for name, reason in report.unreadable.items():
        print(f"  unreadable {name}: {reason}")
    return int(report.total == 0 or len(report.unreadable) > MAX_UNREADABLE * report.total)


@dataclass(frozen=True, kw_only=True)
class PresetsOptions:
    """List the presets, or print every value of one with its source."""

    name: Annotated[Positional[str | None], arg(metavar="NAME")] = None
    """a preset"""


def presets(arguments: Sequence[str]) -> int:
    """See `PresetsOptions`."""
    name = parse(PresetsOptions, arguments, "presets").name
    if name is None:
        width = max(map(len, PRESETS))
        for key, make in PRESETS.items():
            print(f"{key:<{width}}  {(inspect.getdoc(make) or '').splitlines()[0]}")
        return 0
    cfg = preset(name)
    print(f"{name}: {inspect.getdoc(PRESETS[name])}\n")
    print("* set by the preset, from the source named above; the others are the defaults of d2v/config.py:")
    print("  for model, optim and ema fairseq's (examples/data2vec/models/data2vec2.py, modalities/*.py)\n")
    for key, value, changed in _values(cfg):
        print(f"{'*' if changed else ' '} {key} = {value!r}")
    return 0


def _values(section: Any, prefix: str = "") -> list[tuple[str, Any, bool]]:
    """(dotted key, value, whether it differs from the dataclass default) of every leaf."""
    rows: list[tuple[str, Any, bool]] = []
    for f in dataclasses.fields(section):
        value, key = getattr(section, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            if key == "model.front":
                rows.append((key, type(value).__name__, True))
            rows += _values(value, f"{key}.")
        elif key != "preset":
            rows.append((key, value, value != f.default))
    return rows


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Draw RUN/plots/*.png from RUN/metrics.jsonl."""

    run: Model
    """run directory"""


def plot(arguments: Sequence[str]) -> int:
    """See `PlotOptions`."""
    run = parse(PlotOptions, arguments, "plot").run

    from .plot import plot_run

    for path in plot_run(run):
        print(path)
    return 0


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Pretrain and probe the three tiny presets on embedded data: about 10 minutes on two CPU cores."""

    out: Annotated[str, arg(metavar="FOLDER")] = "runs/demo"
    """folder for the three runs, summary.json and plots"""
    minutes_scale: float = 1.0
    """factor on the length of each run"""


def demo(arguments: Sequence[str]) -> int:
    """See `DemoOptions`."""
    given = parse(DemoOptions, arguments, "demo")
    if not given.minutes_scale > 0:
        raise UsageError(f"d2v demo: --minutes-scale must be positive, got {given.minutes_scale}")

    from .demo import run_demo

    run_demo(given.out, given.minutes_scale)
    return 0


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """Time, bytes and FLOPs of every hot path of a training step: `d2v profile PRESET`.

    Prints a table and writes profile.json, a Chrome trace, roofline.png and hotpaths.png into --out.
    Every value of the preset can be overridden by its name.
    """

    path: Annotated[str | None, arg(name="data", metavar="PATH")] = None
    """folder, file, tar or embedded data set; none: random input of the preset's shapes"""
    out: Annotated[str | None, arg(metavar="FOLDER")] = None
    """folder to write into; none: runs/profile_PRESET"""
    backend: Backends = None
    """as D2VKERN_BACKEND takes it (eager,attention=triton), or --backend.attention=triton; none: train's"""
    against: Annotated[str | None, arg(metavar="NAME")] = None
    """a second backend, such as eager, shown beside the first"""
    steps: int = 5
    """steps that are timed, and steps that are traced"""
    batch: int | None = None
    """samples of a step; none: data.batch, on a CPU as many as 1 TFLOP of work allows"""
    precision: Literal["fp32", "bf16"] | None = None
    """in place of train.precision"""
    compile: bool = False
    """short for --train.compile"""
    cuda_graph: bool = False
    """short for --train.cuda-graph: the step's time is that of the graph, the rows those of plain steps"""
    model: ModelConfig
    optim: OptimConfig
    ema: EMAConfig
    data: DataConfig
    train: TrainConfig


def profile(arguments: Sequence[str]) -> int:
    """See `ProfileOptions`."""
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    base = preset(name or "image_tiny")
    sections = [f.name for f in dataclasses.fields(Config) if f.name not in ("preset", "probe")]
    defaults = ProfileOptions(**{key: getattr(base, key) for key in sections})
    rest = arguments if name is None else arguments[1:]
    given = parse(ProfileOptions, join_backends(rest, "--backend"), f"profile {name or 'PRESET'}", defaults)
    if name is None:
        raise UsageError(f"d2v profile: the preset is missing; presets: {', '.join(PRESETS)}")
    cfg = _with_modes(given, Config(preset=base.preset, **{key: getattr(given, key) for key in sections}))
    if given.precision is not None:
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, precision=given.precision))

    from .profile import run_profile

    run_profile(
        cfg,
        given.out or f"runs/profile_{name}",
        data=given.path,
        backend=given.backend,
        against=given.against,
        steps=given.steps,
        batch=given.batch,
    )
    return 0


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (train, "pretrain a preset on a folder of data, or continue a run exactly"),
    "probe": (probe, "accuracy of frozen features: linear probe and kNN"),
    "extract": (extract, "features of every sample to an .npz file"),
    "finetune": (finetune, "fine-tune on labels: pictures, sounds, CTC transcripts, sentences"),
    "eval": (evaluate, "scores of a fine-tuned run: top-1, WER, GLUE's metrics"),
    "convert": (convert, "a pretrained model as safetensors, or as a file of the original"),
    "race": (race, "accuracy against training time: data2vec 2.0, data2vec 1, MAE, MLM"),
    "presets": (presets, "list the presets, or print one with the source of its values"),
    "check": (check, "counts, sizes, sample rates and unreadable files of a data set"),
    "profile": (profile, "time, bytes and FLOPs of every hot path of a training step"),
    "plot": (plot, "PNG plots of a run"),
    "demo": (demo, "pretrain and probe images, speech and text on embedded data"),
}


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: d2v COMMAND ...; `d2v COMMAND --help` explains each", "", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        print(f"d2v: no command {name!r}; nearest: {near}\n\n{_overview()}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[name][0](rest)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        code = _code(error)
        if code is None or os.environ.get("D2V_TRACEBACK") == "1":
            raise
        print(error, file=sys.stderr)
        return code


def _code(error: Exception) -> int | None:
    """2 for what the user gave, 1 for what went wrong later, None for a bug, which shows its traceback."""
    if isinstance(error, (ValueError, FileNotFoundError)):
        return 2
    if isinstance(error, OSError):
        return 1
    from .checkpoint import CheckpointError
    from .train import RunError

    return 2 if isinstance(error, CheckpointError) else 1 if isinstance(error, RunError) else None
