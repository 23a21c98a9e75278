"""The command `d2v convert`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from .parse import Model, parse


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """A model in another format: equal weights in fp32, without the optimizer.

    hf is for transformers: AutoModel.from_pretrained(OUT, trust_remote_code=True), and of what was fine-tuned
    AutoModelForImageClassification, ForAudioClassification, ForCTC or ForSequenceClassification. The original
    has no place for model.cls_rows and model.init_std: they are left out of its files. There is no timm
    format: stock timm has no post-norm block.
    """

    run: Model
    """run directory, checkpoint folder, converted folder or original .pt"""
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """folder (safetensors, hf) or file (original) to make"""
    to: Literal["safetensors", "original", "hf"]
    """safetensors: model.safetensors and config.json for d2v.load; original: a .pt file of the original; hf:
    the encoder or the fine-tuned model, its code and its preprocessor"""
    step: int | None = None
    """of a run's checkpoint; none: the newest, or a fine-tuned run's best"""
    weights: Literal["student", "teacher"] | None = None
    """hf: whose encoder transformers reads of a pretrained model; none: the student's"""
    encoder_only: bool = False
    """hf: leave out pretraining.safetensors, without which d2v does not open what was pretrained"""


def convert(arguments: Sequence[str]) -> int:
    """See `ConvertOptions`."""
    given = parse(ConvertOptions, arguments, "convert")

    from ..formats.convert import run_convert

    run_convert(
        given.run,
        given.out,
        given.to,
        step=given.step,
        weights=given.weights,
        encoder_only=given.encoder_only,
    )
    return 0
