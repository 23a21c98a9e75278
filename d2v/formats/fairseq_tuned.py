"""The original's fine-tuned checkpoints: image classification, CTC, sentence classification.

Such a file keeps the pretraining config inside its own (`pretrained_model_args` or `w2v_args`), where
fine-tuning has overwritten some settings by name: of those, only what an evaluated model computes is read.
Source: fairseq, models/mae_image_classification.py, models/data2vec_text_classification.py,
models/wav2vec/wav2vec2_asr.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..config.model import ModelConfig
from ..config.toml import CheckpointError
from ..config.tune import DropConfig, HeadConfig, tuned_model_config
from .fairseq import canonical, config_tree, translate
from .fairseq_config import Section, Tree
from .pt_file import PtFile

_HEADS = {
    "w2v_encoder.proj.weight": ("ctc", "w2v_encoder.w2v_model.", "w2v_args"),
    "classification_heads.sentence_classification_head.out_proj.weight": (
        "sentence", "model.", "pretrained_model_args",
    ),
    "head.weight": ("classify", "model.", "pretrained_model_args"),
}  # fmt: skip
"""key of the last layer -> task, prefix of the encoder's keys, where its config is"""

_SWITCHES: dict[str, dict[str, Any]] = {
    "classify": {"use_fc_norm": True},
    "sentence": {"pooler_activation_fn": "tanh", "spectral_norm_classification_head": False},
    "ctc": {"blank_weight": 0},
}
"""the only accepted value of what changes the logits, by task; a file that leaves it out has it"""

_POOLING = ("MEAN_POOLING", "CLS_TOKEN", "LIN_SOFTMAX")
"""of image classification, in the order of the original's enum"""


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
        lazy = canonical(kept, path)
        shapes = {key.removeprefix(prefix): t.size for key, t in lazy.items() if key.startswith(prefix)}
        tree = config_tree(root, path)
        section = Section(Tree(tree, path), ("model",))
        pretraining = section.raw(place, None)
        if not isinstance(pretraining, dict) or not isinstance(pretraining.get("model"), dict):
            raise CheckpointError(f"{path}: no cfg.model.{place}.model: the architecture is unknown")
        section.require(_SWITCHES[task])
        section.require_choice("prediction_mode", _POOLING, _POOLING[0])
        model = translate(pretraining, shapes, path, tuned=tree)
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
