"""The commands `d2v finetune` and `d2v eval`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from ..config.run import DataConfig, OptimConfig
from ..config.tune import AugmentConfig, DropConfig, HeadConfig, SpanConfig, TuneConfig
from ..config.unread import refuse_unread, unread_in_finetuning
from ..evaluate.language_model import BONUS, WEIGHT
from .parse import Backends, Model, UsageError, join_backends, leading, parse, refuse_idle, shared, value_of


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions:
    """Fine-tune: `d2v finetune RUN --task TASK --data PATH --out OUT`, or `d2v finetune --resume OUT`.

    RUN: run directory, checkpoint folder or original .pt of pretraining, or hf:FOLDER, a model of
    transformers. A recipe (see --recipe) gives every value; each can be overridden by its name. --backend X
    is short for --train.backend X, and --backend.OP=X chooses for one op.
    """

    task: Literal["classify", "ctc", "sentence"] | None = None
    """classify pictures or utterances; ctc: letters of speech; sentence: classify or score texts"""
    path: Annotated[str | None, arg(name="data", metavar="PATH")] = None
    """labelled folder or file, or embedded data set (digits, speech, text)"""
    out: Annotated[str | None, arg(metavar="OUT")] = None
    """run directory to make"""
    resume: Annotated[str | None, arg(metavar="OUT")] = None
    """run directory to continue, exactly"""
    recipe: Annotated[str | None, arg(metavar="NAME")] = None
    """imagenet_base|large|huge, librispeech_{10m,1h,10h,100h,960h}_{base,large}, glue_TASK, image_tiny,
    speech_tiny, sound_tiny, text_tiny; none: by task and size of the encoder"""
    scratch: bool = False
    """the encoder's architecture with fresh weights, to see what pretraining is worth"""
    data_limit: int | None = None
    """training samples used, as many of each class as there are; none: all"""
    vocabulary: str | None = None
    """ctc: a vocabulary.json or a fairseq dictionary; none: counted on the training transcripts"""
    glue: str | None = None
    """GLUE task whose .tsv files PATH holds; a glue_TASK recipe sets it"""
    head: HeadConfig
    optim: OptimConfig
    drop: DropConfig
    augment: AugmentConfig
    span: SpanConfig
    data: DataConfig
    train: TuneConfig


def finetune(arguments: Sequence[str]) -> int:
    """See `FineTuneOptions`."""
    from ..config.recipes import default_recipe, recipe

    source, rest = leading(arguments)
    if (resumed := value_of("--resume", rest)) is not None:
        if source is not None or len(rest) > (1 if rest[0].startswith("--resume=") else 2):
            raise UsageError("d2v finetune: --resume OUT goes alone: a run keeps its settings")
        from ..evaluate.scores import evaluate as score
        from ..train.finetune import resume_finetune

        return resume_finetune(resumed, evaluate=score).exit_code
    opened = None
    if source is not None and {"-h", "--help"}.isdisjoint(rest):
        from ..formats.open import open_encoder

        opened = open_encoder(source)
    name, task = value_of("--recipe", rest), value_of("--task", rest)
    if name is None and opened is not None and task in ("classify", "ctc", "sentence"):
        name = default_recipe(task, opened[1].model)  # type: ignore[arg-type]
    base = recipe(name or "image_tiny")
    defaults = FineTuneOptions(**shared(base, FineTuneOptions))
    given = parse(
        FineTuneOptions, join_backends(rest, "--train.backend"), f"finetune {source or 'RUN'}", defaults
    )
    if source is None or opened is None:
        raise UsageError("d2v finetune: RUN is missing (or --resume OUT)")
    for option, value in (("--task TASK", given.task), ("--data PATH", given.path), ("--out OUT", given.out)):
        if value is None:
            raise UsageError(f"d2v finetune: {option} is missing")
    assert given.task is not None and given.path is not None and given.out is not None and name is not None
    if given.head.task != given.task:
        raise UsageError(
            f"d2v finetune: recipe {name} is for task {given.head.task}, got --task {given.task}"
        )
    chosen = dataclasses.replace(base, **shared(given, base))
    base_cfg = base.on(name, opened[1].model)
    cfg = dataclasses.replace(
        chosen.on(name, opened[1].model), data_limit=given.data_limit, vocabulary=given.vocabulary
    )
    from ..evaluate.scores import evaluate as score
    from ..model import Pretraining

    unread = unread_in_finetuning(cfg, ours=isinstance(opened[0], Pretraining))
    refuse_unread("finetune", cfg, base_cfg, unread)

    from ..train.finetune import run_finetune

    result = run_finetune(
        cfg, source, given.path, given.out, opened=opened, evaluate=score, scratch=given.scratch
    )
    return result.exit_code


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Scores of a fine-tuned run on its held-out data: top-1 and top-5, WER and CER, GLUE's metrics."""

    run: Model
    """run directory of `d2v finetune`, or a checkpoint folder in it"""
    data: Annotated[str | None, arg(metavar="PATH")] = None
    """other data of the same classes or letters; none: the run's own"""
    step: int | None = None
    """of a checkpoint; none: the best one"""
    beam: int = 0
    """ctc: width of the beam search; 0: the best path"""
    lm: Annotated[str | None, arg(metavar="FILE")] = None
    """ctc: n-gram model of words for the beam search, ARPA or kenlm's binary; needs the package kenlm"""
    lm_weight: float = WEIGHT
    """factor on its log10 probability, as in fairseq"""
    word_bonus: float = BONUS
    """added for every word"""
    backend: Backends = None
    """as D2VKERN_BACKEND takes it (eager,attention=triton), or --backend.attention=triton; none: the run's"""


def evaluate(arguments: Sequence[str]) -> int:
    """See `EvalOptions`."""
    given = parse(EvalOptions, join_backends(arguments, "--backend"), "eval")
    if given.lm is None:
        refuse_idle("eval", given, dict.fromkeys(("lm_weight", "word_bonus"), "without --lm"))

    from ..evaluate.scores import run_eval

    run_eval(
        given.run,
        given.data,
        step=given.step,
        beam=given.beam,
        lm=given.lm,
        lm_weight=given.lm_weight,
        word_bonus=given.word_bonus,
        backend=given.backend,
    )
    return 0
