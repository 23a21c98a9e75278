"""The commands `d2v probe` and `d2v extract`: what frozen features know, and they themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from .parse import Backends, DataPath, LabelColumn, Model, TextColumn, join_backends, parse


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Accuracy of frozen features on labelled data."""

    run: Model
    """run directory, checkpoint folder, original .pt, or hf:FOLDER of transformers"""
    data: DataPath
    """labelled folder or embedded data set"""
    text_column: TextColumn = None
    """of texts: key or column of the text; none: the run's"""
    label_column: LabelColumn = None
    """of texts: key or column of the label; none: the run's"""
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

    from ..evaluate.probe import run_probe

    run_probe(
        given.run, given.data, layer=given.layer, weights=given.weights, kinds=kinds, backend=given.backend,
        text_column=given.text_column, label_column=given.label_column,
    )  # fmt: skip
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

    from ..evaluate.features import run_extract

    run_extract(
        given.run, given.data, given.out,
        layer=given.layer, pool=given.pool, weights=given.weights, backend=given.backend,
    )  # fmt: skip
    return 0
