"""Opening models: runs, checkpoint folders, converted folders, `.pt` files, folders of transformers.

`load` gives a model. `open_model` and `open_encoder` give it with the data settings that it was trained with.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..config.fronts import TextFront
from ..config.model import ModelConfig
from ..config.run import Config, DataConfig
from ..config.toml import CheckpointError, from_dict, is_tuned, read_config, read_settings, read_tuned_config
from ..config.tune import FineTuneConfig, HeadConfig
from ..model import Pretraining, build_model
from ..model.huggingface import Encoder, naming_release
from ..model.tuned import FineTuned, build_tuned
from ..train.checkpoint import check_fits, fill_model, find_checkpoint, find_run, load_checkpoint
from ..train.process import pick_device
from .fairseq import is_finetuned, load_original, load_original_tuned
from .folder import CONFIG, FORMAT, TOKENIZER, WEIGHTS, is_folder
from .hf_export import PRETRAINING, joined, theirs
from .hf_folder import is_ours
from .hf_import import open_hf
from .recorded import as_recorded

M = TypeVar("M", bound="Pretraining | FineTuned")


def load(
    path: str | Path, *, device: str | torch.device = "cpu", step: int | None = None
) -> Pretraining | FineTuned:
    """A model in eval mode from any of four kinds of `path`.

    A run directory (its newest checkpoint, of a fine-tuned one the best, or that of `step`), a checkpoint
    folder in it (`checkpoints/step_N`; `checkpoints`, `best` and what lies in there likewise), a folder of
    `d2v convert`, or a `.pt` file of the original, which needs neither fairseq nor omegaconf and runs no
    code. What was pretrained is a `Data2Vec`, its teacher loaded (or another `d2v.model.Pretraining`, if that
    was its objective); what was fine-tuned, here or by the original, is a `FineTuned` with `.logits()`.
    Raises `CheckpointError`, naming the file, when anything is missing, damaged or not supported.
    """
    path = Path(path)
    if is_folder(path):
        if step is not None:
            raise ValueError(f"load: step must be None for a converted folder, got {step}")
        return load_folder(path).to(device).eval()
    if not path.is_dir():
        if step is not None:
            raise ValueError(f"load: step must be None for a file, got {step}")
        if path.suffix in (".safetensors", ".json", ".toml") and path.is_file():
            raise CheckpointError(f"{path}: a part of a model's folder: give {path.parent}")
        if is_finetuned(path):
            return load_tuned_file(path).to(device)
        config, tensors = load_original(path)
    else:
        run, folder = find_checkpoint(path, step)
        if is_tuned(read_settings(run)):
            return load_run(path, step=step)[0].to(device)
        config, tensors = read_config(run)[0].model, load_checkpoint(folder).model
    return _filled(lambda: build_model(config), tensors, path).to(device)


def load_run(path: str | Path, *, step: int | None = None) -> tuple[FineTuned, FineTuneConfig, str]:
    """A fine-tuned model in eval mode, its config (pictures normalised as recorded), and where its data was.

    path: a run or a checkpoint folder in it. step: of a run's checkpoint; none: the best one, or before the
    first evaluation the newest. Raises CheckpointError.
    """
    run, folder = find_checkpoint(path, step)
    cfg, data, _ = read_tuned_config(run)
    with naming_release(cfg.transformers):
        model = _filled(lambda: build_tuned(cfg), load_checkpoint(folder).model, folder)
    return model, as_recorded(cfg, run), data


def load_tuned_file(path: str | Path) -> FineTuned:
    """A fine-tuned model of the original in eval mode, from its `.pt`. Raises CheckpointError."""
    cfg, head, tensors = load_original_tuned(path)
    return _filled(lambda: FineTuned(cfg, head), tensors, path)


def _shapes(make: Callable[[], M]) -> M:
    """The model without its memory."""
    with torch.device("meta"):
        return make()


def _filled(
    make: Callable[[], M], tensors: Mapping[str, Tensor], source: str | Path, shapes: M | None = None
) -> M:
    """The model with these weights, in eval mode. What a config says of sizes is believed only where the
    weights have them: shapes, of `shapes` where they are known, are compared before the model is made."""
    check_fits(_shapes(make) if shapes is None else shapes, tensors, source)
    model = make()
    fill_model(model, tensors, source)
    model.eval()
    return model


PREFIX = "hf:"
"""before the folder of a model of transformers"""


def open_encoder(path: str | Path) -> tuple[Encoder, Config, Path | None]:
    """As `open_model`, and `hf:FOLDER` opens a model of transformers, or what `d2v convert --to hf` wrote."""
    if not str(path).startswith(PREFIX):
        return open_model(path)
    folder = str(path).removeprefix(PREFIX)
    return open_model(folder) if is_ours(folder) else open_hf(folder, pick_device("auto"))


def open_model(path: str | Path) -> tuple[Pretraining, Config, Path | None]:
    """A model, its config and the folder of its tokenizer, from a run, a checkpoint folder or a `.pt` file.

    Pictures and waves are normalised as they were in training, where that is known. An original text model
    needs `tokenizer.json` beside its file. Raises CheckpointError, and ValueError for the missing tokenizer.
    """
    if str(path).startswith(PREFIX):
        raise ValueError(f"{path}: one of our models is needed, not one of transformers")
    path = Path(path)
    model = load(path, device=pick_device("auto"))
    if not isinstance(model, Pretraining):
        raise ValueError(
            f"{path} is fine-tuned: a pretrained model is needed (`d2v eval` scores fine-tuned ones)"
        )
    if path.is_dir() and not is_folder(path):
        run = find_run(path)[0]
        cfg, _ = read_config(run)
        return model, as_recorded(cfg, run), run
    front, data, home = model.cfg.front, DataConfig(), path if path.is_dir() else path.parent
    if isinstance(front, TextFront):
        if not (home / TOKENIZER).is_file():
            raise ValueError(f"{path}: {TOKENIZER} must lie beside a text model of the original")
        data = dataclasses.replace(data, block=min(data.block, front.max_positions))
    return model, as_recorded(Config(preset=path.stem, model=model.cfg, data=data), path), home


def load_folder(path: Path) -> Pretraining | FineTuned:
    """The model of a folder of `run_convert`, for d2v or for transformers.

    Raises CheckpointError naming the wrong file.
    """
    values, make = _maker(path / CONFIG)
    tensors = _read(path / WEIGHTS)
    try:
        shapes = _shapes(make)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path / CONFIG}: not a converted model: {error}") from error
    if "weights" in values or not isinstance(shapes, Pretraining):
        tensors = _from_hf(path, values, shapes, tensors)
    return _filled(make, tensors, path / WEIGHTS, shapes)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: damaged: {error}") from error


def _from_hf(
    path: Path, values: dict[str, Any], shapes: Pretraining | FineTuned, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A folder's tensors by the names of the model's state dict; those of our own folders have them."""
    if not isinstance(shapes, Pretraining):
        names = shapes.state_dict().keys()
        ours = {} if tensors.keys() == names else {theirs(name): name for name in names}
        return {ours.get(name, name): t for name, t in tensors.items()}
    if values["weights"] not in ("student", "teacher"):
        got = values["weights"]
        raise CheckpointError(f"{path / CONFIG}: weights must be student or teacher, got {got!r}")
    if not (path / PRETRAINING).is_file():
        raise CheckpointError(
            f"{path / PRETRAINING}: missing: the folder holds an encoder alone, for transformers; d2v opens "
            "what it was made of"
        )
    try:
        return joined(shapes, values["weights"], tensors, _read(path / PRETRAINING))
    except ValueError as error:  # a teacher where the objective has none
        raise CheckpointError(f"{path / CONFIG}: not a converted model: {error}") from error


def _maker(file: Path) -> tuple[dict[str, Any], Callable[[], Pretraining | FineTuned]]:
    """What a config.json says of d2v's model, and what makes it."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if "d2v" in values:
            values = {"format": FORMAT, **values["d2v"]}
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']!r}, this version reads {FORMAT!r}")
        cfg = from_dict(ModelConfig, values["model"])
        if "head" not in values:
            return values, lambda: build_model(cfg)
        head = from_dict(HeadConfig, values["head"], "head")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a converted model: {error}") from error
    return values, lambda: FineTuned(cfg, head)
