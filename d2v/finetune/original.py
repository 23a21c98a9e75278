"""The original's fine-tuned checkpoints: image classification, CTC, sentence classification.

Such a file keeps the pretraining config inside its own (`pretrained_model_args` or `w2v_args`), where
fine-tuning has overwritten some settings by name; those that do not change what an evaluated model computes
are put back before it is translated. Source: fairseq, models/mae_image_classification.py,
models/data2vec_text_classification.py, models/wav2vec/wav2vec2_asr.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import CheckpointError
from ..config import ModelConfig
from ..original import _PUBLISHED, _canonical, _config_tree, translate
from ..pt_file import PtFile
from .config import DropConfig, HeadConfig
from .model import tuned_model_config

_HEADS = {
    "w2v_encoder.proj.weight": ("ctc", "w2v_encoder.w2v_model.", "w2v_args"),
    "classification_heads.sentence_classification_head.out_proj.weight": (
        "sentence", "model.", "pretrained_model_args",
    ),
    "head.weight": ("classify", "model.", "pretrained_model_args"),
}  # fmt: skip
"""key of the last layer -> task, prefix of the encoder's keys, where its config is"""

_OVERWRITTEN = (
    "dropout_input", "mask_dropout", "encoder_zero_mask", "mask_channel_prob", "mask_prob_min",
    "inverse_mask", "keep_masked_pct", "add_masks", "remove_masks", "prenet_layerdrop",
    "start_drop_path_rate", "end_drop_path_rate",
)  # fmt: skip
"""settings of training only, which fine-tuning overwrites by name wherever they stand"""


def load_original_tuned(path: str | Path) -> tuple[ModelConfig, HeadConfig, dict[str, Tensor]]:
    """Architecture, head and weights (names as in `FineTuned`, dtypes as in the file).

    Leftovers of pretraining (decoder, teacher) are dropped, as the original's models do. Raises
    CheckpointError naming the file and what is wrong with it.
    """
    with PtFile(path) as file:
        root = file.root
        weights = root.get("model") if isinstance(root, dict) else None
        if not isinstance(weights, dict) or not (heads := [key for key in _HEADS if key in weights]):
            raise CheckpointError(
                f"{path}: holds none of the last layers of fine-tuned models: {', '.join(_HEADS)}"
            )
        task, prefix, place = _HEADS[heads[0]]
        kept = {key: value for key, value in weights.items() if not _is_leftover(str(key), prefix)}
        lazy = _canonical(kept, path)
        shapes = {key.removeprefix(prefix): t.size for key, t in lazy.items() if key.startswith(prefix)}
        tree = _config_tree(root, path)["model"].get(place)
        if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
            raise CheckpointError(f"{path}: no cfg.model.{place}.model: the architecture is unknown")
        model = translate(_as_pretrained(tree), shapes, path)
        outputs = lazy[heads[0]].size[0]
        head = HeadConfig(
            task=task,  # type: ignore[arg-type]
            outputs=outputs,
            regression=task == "sentence" and outputs == 1,
        )
        return tuned_model_config(model, DropConfig()), head, {k: file.tensor(t) for k, t in lazy.items()}


def _is_leftover(key: str, prefix: str) -> bool:
    inner = key.removeprefix(prefix)
    return inner.startswith("_ema") or ".decoder." in inner or key.startswith("_ema")


def _as_pretrained(tree: dict[str, Any]) -> dict[str, Any]:
    """The config with training's settings as pretraining has them."""
    tree = copy.deepcopy(tree)
    accepted = {key: value for section in _PUBLISHED.values() for key, value in section.items()}

    def restore(section: dict[str, Any]) -> None:
        for key in _OVERWRITTEN:
            if key in section:
                section[key] = accepted[key]

    restore(tree["model"])
    for name, section in (tree["model"].get("modalities") or {}).items():
        if isinstance(section, dict):
            restore(section)
            if "inverse_mask" in section:
                section["inverse_mask"] = name == "image"
            if section.get("mask_prob") == 0:
                section.pop("mask_prob")
            if "learned_alibi_scale" in section:
                section["learned_alibi_scale"] = True  # fine-tuning may stop its learning (update_alibi)
            if section.get("decoder") is None:
                section["decoder"] = {}
    return tree
