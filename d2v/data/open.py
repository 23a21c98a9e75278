"""The three doors `open_data`, `open_labelled` and `check_data`, which dispatch to a modality's `pipeline` by
the preset's front end.

A `pipeline` module provides three functions of the same names and a `loader.Source`; everything that does not
depend on the modality (order, workers, resuming, bad files) is in `loader`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch

from ..config.fronts import Modality
from ..config.run import Config
from .remote import at_hand
from .shards import refuse_compressed, suffixes_in
from .types import DataError, Labelled, Pipeline, Report
from .walk import suffix_of, walk

ROOMS = {"image": "images", "audio": "speech", "text": "text"}
"""modality -> its room"""


def _module(path: str, cfg: Config) -> ModuleType:
    from .embedded import EMBEDDED

    modality = cfg.model.modality
    if path in EMBEDDED:
        if EMBEDDED[path] != modality:
            raise DataError(
                f"data: {path!r} is embedded {EMBEDDED[path]} data, preset {cfg.preset} reads {modality}"
            )
    elif not Path(path).exists():
        raise DataError(f"data: {path} does not exist; embedded data sets: {', '.join(EMBEDDED)}")
    refuse_compressed(path)
    return importlib.import_module(f".{ROOMS[modality]}.pipeline", __package__)


def open_data(
    path: str,
    cfg: Config,
    *,
    device: torch.device | str = "cpu",
    purpose: Literal["train", "eval"] = "train",
    run_dir: str | Path | None = None,
) -> Pipeline:
    """The batches of a folder, file, tar, URL of these or embedded data set ("digits", "speech", "text").

    purpose: "train" takes the training part where the data set has parts, "eval" all of it (of an embedded
        one the held-out part). Whether samples are augmented depends on how they are read: `micro_batches`
        augments, `in_order` does not.
    run_dir: where files that belong to the run are kept (a trained tokenizer).
    Derived files (token blocks) are kept in `cache.default_cache()`.
    Raises DataError.
    """
    path = at_hand(path)
    return _module(path, cfg).open_data(
        path,
        cfg,
        device=torch.device(device),
        purpose=purpose,
        run_dir=_path(run_dir),
    )


def open_labelled(
    path: str, cfg: Config, *, run_dir: str | Path | None = None, classes: Sequence[str] | None = None
) -> Labelled:
    """The labelled splits of a data set; DataError "labels missing: ..." when it has no labels.

    classes: those of a model that is to be scored: the splits are what is held out, or all of a data set
    where nothing is, in which not every class need occur.
    """
    path = at_hand(path)
    return _module(path, cfg).open_labelled(path, cfg, run_dir=_path(run_dir), classes=classes)


def check_data(path: str, cfg: Config, *, any_batch: bool = False) -> Report:
    """Read everything once that training would read: counts, sizes, histograms, every file that is not used
    with its reason, and in `refused` why training would stop.

    any_batch: whether a data set may be smaller than `data.batch`.
    """
    report, path = Report.of(path, cfg.data), at_hand(path)
    module = _module(path, cfg)
    try:
        module.check_data(path, cfg, report, any_batch)
        if cfg.model.modality == "audio":
            from .speech.transcripts import check_transcripts

            check_transcripts(path, cfg, report)
    except DataError as error:
        report.refused = str(error)
    return report


def guess_modality(path: str) -> Modality:
    """The modality that most files under `path` belong to, by their suffixes.

    A text beside a picture or sound of its name is its label or transcript and does not count; of as many
    files pictures come first, then sounds. A .tsv is a manifest of sounds when its first line is a folder,
    else a table of texts; rows of .arrow and .parquet files are what their columns hold, a tar what its first
    picture or sound is, or texts where it has neither.
    Raises DataError when `path` does not exist or holds no file of any modality.
    """
    from .arrow import SUFFIXES as ROWS
    from .arrow import kind_of_rows
    from .images.store import EXTENSIONS as IMAGE
    from .speech.files import SUFFIXES, is_manifest
    from .text.corpus import EXTENSIONS as TEXT

    root = Path(at_hand(path))
    if not root.exists():
        raise DataError(f"data: {path} does not exist")
    refuse_compressed(path)
    kinds: dict[Modality, set[str]] = {
        "image": {*IMAGE, ".npz", ".tar"},
        "audio": {*SUFFIXES},
        "text": {*TEXT, *ROWS},
    }
    found: dict[Modality, list[str]] = {kind: [] for kind in kinds}
    files = walk(root, set().union(*kinds.values()))
    for file in files.files:
        suffix = suffix_of(file)
        kind = next(kind for kind, known in kinds.items() if suffix in known)
        if suffix in ROWS:
            kind = kind_of_rows(files.root / file)
        elif suffix == ".tar":
            kind = _kind_of_tar(files.root / file)
        elif suffix == ".tsv" and is_manifest(files.root / file):
            kind = "audio"
        found[kind].append(file)
    seen = {os.path.splitext(file)[0] for kind in ("image", "audio") for file in found[kind]}
    found["text"] = [file for file in found["text"] if os.path.splitext(file)[0] not in seen]
    if not any(found.values()):
        known = "; ".join(f"{kind}: {' '.join(sorted(suffixes))}" for kind, suffixes in kinds.items())
        left = "".join(f"; {line}" for line in Report(path, 0, left_out=files.left_out).lines())
        raise DataError(f"data: {path} holds no image, audio or text file{left}; what is read: {known}")
    return max(found, key=lambda kind: len(found[kind]))


def _kind_of_tar(shard: Path) -> Modality:
    from .images.store import EXTENSIONS as IMAGE
    from .speech.files import SUFFIXES
    from .text.tars import MEMBERS

    texts = False
    for suffix in suffixes_in(shard):
        if suffix in IMAGE or suffix in SUFFIXES:
            return "image" if suffix in IMAGE else "audio"
        texts = texts or suffix in MEMBERS
    return "text" if texts else "image"


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)
