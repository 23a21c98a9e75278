"""The original's `.pt` files (fairseq, examples/data2vec), pretrained and fine-tuned: weights and config.

A fine-tuned file keeps the pretraining config inside its own, where fine-tuning has overwritten some settings
by name: of those, only what an evaluated model computes is read. Source: fairseq, models/data2vec2.py,
models/mae_image_classification.py, models/data2vec_text_classification.py, models/wav2vec/wav2vec2_asr.py.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config.model import ModelConfig
from ..config.run import WaveNorm
from ..config.toml import CheckpointError
from ..config.tune import DropConfig, HeadConfig, tuned_model_config
from .fairseq_config import normalises, translate
from .fairseq_names import POOLING, TEACHER, TUNED, flat
from .fairseq_tree import Section, Tree, plain
from .pt_file import LazyTensor, PtFile

_SHARED = 4
"""weights that may be read from the same values, on average: a student and its teacher share all at most"""


def load_original(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Architecture and weights of a pretraining `.pt` file: student keys, then `_ema.<key>` (teacher).

    Tensors keep the file's dtype (fp16 runs save an fp16 student and an fp32 teacher). Only the
    model's tensors are read. Raises `CheckpointError` naming the file and what is wrong with it.
    """
    with PtFile(path) as file:
        weights = _weights(file)
        if prefixes := _fine_tuned_prefixes(weights):
            raise CheckpointError(
                f"{path}: fine-tuned checkpoint (its keys start with `{prefixes[0]}`); "
                "only pretraining checkpoints can be loaded"
            )
        lazy = _canonical(weights, path)
        config = translate(_config_tree(file), {key: t.size for key, t in lazy.items()}, path)
        if not any(key.startswith(f"{TEACHER}.") for key in lazy):
            raise CheckpointError(f"{path}: no `{TEACHER}` in its model: the teacher was not saved")
        return config, {key: file.tensor(tensor) for key, tensor in lazy.items()}


def load_original_tuned(path: str | Path) -> tuple[ModelConfig, HeadConfig, dict[str, Tensor]]:
    """Architecture, head and weights (names as in `FineTuned`, dtypes as in the file).

    Leftovers of pretraining (decoder, teacher) are dropped, as the original's models do. Raises
    CheckpointError naming the file and what is wrong with it.
    """
    with PtFile(path) as file:
        weights = _weights(file)
        kind = next((kind for kind in TUNED if kind.last in weights), None)
        if kind is None:
            listed = ", ".join(kind.last for kind in TUNED)
            raise CheckpointError(f"{path}: holds none of the last layers of fine-tuned models: {listed}")
        kept = {key: value for key, value in weights.items() if not _is_leftover(str(key), kind.prefix)}
        lazy = _canonical(kept, path)
        shapes = {k.removeprefix(kind.prefix): t.size for k, t in lazy.items() if k.startswith(kind.prefix)}
        tree = _config_tree(file)
        section = Section(Tree(tree, path), ("model",))
        pretraining = section.raw(kind.place)
        if not isinstance(pretraining, dict) or not isinstance(pretraining.get("model"), dict):
            raise CheckpointError(f"{path}: no cfg.model.{kind.place}.model: the architecture is unknown")
        section.require(kind.switches)
        section.require_choice("prediction_mode", POOLING, POOLING[0])
        model = translate(pretraining, shapes, path, tuned=tree)
        outputs = lazy[kind.last].size[0]
        head = HeadConfig(
            task=kind.task, outputs=outputs, regression=kind.task == "sentence" and outputs == 1
        )
        return tuned_model_config(model, DropConfig()), head, {k: file.tensor(t) for k, t in lazy.items()}


def is_finetuned(path: str | Path) -> bool:
    """Whether a `.pt` file holds a fine-tuned model. Raises CheckpointError for what is no such file."""
    with PtFile(path) as file:
        weights = file.root.get("model") if isinstance(file.root, dict) else None
        return isinstance(weights, dict) and bool(_fine_tuned_prefixes(weights))


def wave_norm(file: PtFile) -> WaveNorm:
    """How the waveforms of a file's model were normalised. CheckpointError."""
    values = _config_tree(file)
    places = dict.fromkeys(kind.place for kind in TUNED)
    encoders = [values["model"].get(place) for place in places]
    tuned = next((inner for inner in encoders if isinstance(inner, dict)), None)
    tree = Tree(values, file.path) if tuned is None else Tree(tuned, file.path, values)
    return "fairseq" if normalises(tree) else "none"


def _weights(file: PtFile) -> dict[str, Any]:
    weights = file.root.get("model") if isinstance(file.root, dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError(f"{file.path}: no `model` in it: not a checkpoint of the original")
    return weights


def _fine_tuned_prefixes(weights: Mapping[str, Any]) -> list[str]:
    prefixes = dict.fromkeys(kind.prefix.partition(".")[0] + "." for kind in TUNED)
    return [prefix for prefix in prefixes if any(str(key).startswith(prefix) for key in weights)]


def _is_leftover(key: str, prefix: str) -> bool:
    inner = key.removeprefix(prefix)
    return inner.startswith(TEACHER) or ".decoder." in inner or key.startswith(TEACHER)


def _canonical(weights: Mapping[str, Any], path: str | Path) -> dict[str, LazyTensor]:
    """Today's key names and shapes; older files have other ones, which the original renames on load."""
    teacher = weights.get(TEACHER) or {}
    if not isinstance(teacher, dict) or not all(isinstance(key, str) for key in (*weights, *teacher)):
        raise CheckpointError(f"{path}: its `model` must hold tensors by name")
    out: dict[str, LazyTensor] = {}
    for key, value in flat(weights).items():
        if not isinstance(value, LazyTensor):
            raise CheckpointError(f"{path}: {key} must be a tensor, got {reprlib.repr(value)}")
        if key.endswith(".alibi_scale") and len(value.size) == 4:
            value = LazyTensor(value.storage, value.offset, (1, *value.size), (0, *value.stride))
        out[key] = value
    needed = sum(t.numel for t in out.values())
    stored = sum(storage.numel for storage in {t.storage for t in out.values()})
    if needed > _SHARED * stored:
        raise CheckpointError(f"{path}: its weights have {needed:,} values, of which it holds {stored:,}")
    return out


def _config_tree(file: PtFile) -> dict[str, Any]:
    """The config of a file as plain containers; it has a section `model`."""
    root = file.root
    try:
        tree = plain(root.get("cfg") or {"model": root.get("args")})
    except (RecursionError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file.path}: its cfg is damaged: {error!r}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise CheckpointError(f"{file.path}: no `model` section in its cfg: the architecture is unknown")
    return tree
