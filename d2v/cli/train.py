"""The commands `d2v train` and `d2v profile`, which take every value of a preset."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, cast, get_args

from tyro.conf import arg

from ..config.model import ModelConfig, Objective
from ..config.objectives import for_objective
from ..config.run import Config, DataConfig, EMAConfig, OptimConfig, ProbeConfig, TrainConfig
from ..config.unread import refuse_unread, unread_in_pretraining, unread_in_profile
from ..train.capture import parse_steps
from .parse import (
    Backends,
    UsageError,
    join_backends,
    leading,
    leading_preset,
    parse,
    refuse_idle,
    shared,
    value_of,
)


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
    """also a rival that data2vec 2.0 is compared with, set up as its paper does; see
    d2v/config/objectives.py"""
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
    source, resumed, objective = None, value_of("--resume", arguments), value_of("--objective", arguments)
    if resumed is None:
        command, base, rest = leading_preset("train", arguments, " (or --resume RUN)")
        if objective in get_args(Objective):
            base = for_objective(base, cast(Objective, objective))
    else:
        if leading(arguments)[0] is not None:
            raise UsageError("d2v train: --resume RUN goes without a preset, which is in the run directory")
        from ..config.toml import read_config

        command, (base, source), rest = "train", read_config(resumed), arguments
    defaults = TrainOptions(path=source, **shared(base, TrainOptions))
    given = parse(TrainOptions, join_backends(rest, "--train.backend"), command, defaults)
    cfg = _with_modes(given, dataclasses.replace(base, **shared(given, base)))
    if given.resume is not None and objective is not None:
        raise UsageError("d2v train: --resume RUN goes without --objective: a run keeps its objective")
    if given.resume is not None and given.out is not None:
        raise UsageError("d2v train: --resume RUN goes without --out, it continues in RUN")
    out = given.resume or given.out
    if given.path is None or out is None:
        raise UsageError(f"d2v train: {'--data PATH' if given.path is None else '--out RUN'} is missing")
    refuse_unread("train", cfg, base, unread_in_pretraining(cfg))
    if given.profile is None:
        refuse_idle("train", given, {"profile_steps": "without --profile"})
    captured = parse_steps(given.profile_steps) if given.profile else None

    from ..evaluate.online_probe import OnlineProbe
    from ..train.pretrain import run

    result = run(cfg, given.path, out, resume=given.resume is not None, capture=captured, probe=OnlineProbe)
    return result.exit_code


def _with_modes(given: TrainOptions | ProfileOptions, cfg: Config) -> Config:
    """The config with --compile and --cuda-graph switched on where they are given."""
    train = dataclasses.replace(
        cfg.train,
        compile=cfg.train.compile or given.compile,
        cuda_graph=cfg.train.cuda_graph or given.cuda_graph,
    )
    return dataclasses.replace(cfg, train=train)


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
    command, base, rest = leading_preset("profile", arguments)
    defaults = ProfileOptions(**shared(base, ProfileOptions))
    given = parse(ProfileOptions, join_backends(rest, "--backend"), command, defaults)
    cfg = dataclasses.replace(base, **shared(given, base))
    asked = {"data.batch": given.batch, "train.precision": given.precision, "train.backend": given.backend}
    short = tuple(name for name, value in asked.items() if value is not None)
    unread = unread_in_profile(cfg, on_data=given.path is not None, short=short)
    refuse_unread("profile", cfg, base, unread)
    cfg = _with_modes(given, cfg)
    if given.precision is not None:
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, precision=given.precision))

    from ..tools.profile import run_profile

    run_profile(
        cfg,
        given.out or f"runs/profile_{base.preset}",
        data=given.path,
        backend=given.backend,
        against=given.against,
        steps=given.steps,
        batch=given.batch,
    )
    return 0
