"""The original's (fairseq's) names for what is ours: one table for reading its files and for writing them.

Sections of its config go by the original's dataclasses: "" is Data2VecMultiConfig (`cfg.model`), "modality"
D2vModalityConfig, "AUDIO", "IMAGE", "TEXT" what each modality adds to it, "decoder" D2vDecoderConfig,
"task" what `cfg.task` says of speech. Source: fairseq, models/data2vec2.py and
models/modalities/{base,audio,images,text,modules}.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T")

MODALITIES = ("AUDIO", "IMAGE", "TEXT")
"""in the order of the original's enum, which counts from 1"""

CONV_LAYERS = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"
"""the original's default, of Python's syntax"""

FIELDS: dict[str, dict[str, tuple[str, Any]]] = {
    "": {
        "embed_dim": ("dim", 768),
        "num_heads": ("heads", 12),
        "depth": ("depth", 8),
        "mlp_ratio": ("mlp_ratio", 4.0),
        "norm_eps": ("norm_eps", 1e-6),
        "encoder_dropout": ("encoder_dropout", 0.1),
        "attention_dropout": ("attention_dropout", 0.1),
        "activation_dropout": ("activation_dropout", 0.0),
        "post_mlp_drop": ("post_mlp_dropout", 0.1),
        "layerdrop": ("layerdrop", 0.0),
        "clone_batch": ("mask.clones", 1),
        "average_top_k_layers": ("target.top_k", 8),
        "loss_beta": ("loss_beta", 0.0),
        "loss_scale": ("loss_scale", None),
        "cls_loss": ("cls_loss", 0.0),
        "ema_encoder_only": ("ema_encoder_only", True),
    },
    "modality": {
        "prenet_depth": ("prenet_depth", 4),
        "prenet_dropout": ("prenet_dropout", 0.0),
        "num_extra_tokens": ("front.extra_tokens", 0),
        "mask_prob": ("mask.prob", 0.7),
        "mask_length": ("mask.length", 5),
        "mask_prob_adjust": ("mask.adjust", 0.0),
        "mask_noise_std": ("decoder.noise_std", 0.01),
    },
    "decoder": {
        "decoder_dim": ("decoder.dim", 384),
        "decoder_groups": ("decoder.groups", 16),
        "decoder_kernel": ("decoder.kernel", 5),
        "decoder_layers": ("decoder.layers", 5),
        "decoder_residual": ("decoder.residual", True),
        "projection_layers": ("decoder.projection_layers", 1),
        "projection_ratio": ("decoder.projection_ratio", 2.0),
        "input_dropout": ("decoder.input_dropout", 0.1),
    },
    "IMAGE": {
        "input_size": ("front.height", 224),
        "patch_size": ("front.patch", 16),
        "in_chans": ("front.channels", 3),
    },
    "AUDIO": {
        "feature_encoder_spec": ("front.conv_layers", CONV_LAYERS),
        "conv_pos_width": ("front.position_width", 95),
        "conv_pos_groups": ("front.position_groups", 16),
        "conv_pos_depth": ("front.position_layers", 5),
        "use_alibi_encoder": ("front.alibi", False),
    },
    "TEXT": {"dropout": ("front.dropout", 0.1)},
    "task": {"sample_rate": ("front.sample_rate", 16_000)},
}
"""section -> its key -> (our key in ModelConfig, the original's default; None: a float or none)"""

REPEATED: dict[str, dict[str, str]] = {
    "IMAGE": {"embed_dim": "dim"},
    "AUDIO": {
        "num_alibi_heads": "heads",
        "learned_alibi_scale": "front.alibi",
        "learned_alibi_scale_per_head": "front.alibi",
    },
    "TEXT": {"max_source_positions": "front.max_positions"},
}
"""section -> its key -> our key that another setting, or of text the weights' shape, gives"""

NORMS = {
    "target.norm": ("{}_norm_target_layer", ("instance", "layer", "batch")),
    "target.final": ("{}_norm_targets", ("layer", "instance")),
}
"""our key, none or one of some kinds -> the model's switches, of which at most one is on, and the kinds"""

SWITCHES: dict[str, dict[str, Any]] = {
    "": {"layer_norm_first": False, "norm_affine": True},
    "modality": {"learned_alibi": False, "learned_alibi_scale_per_layer": False},
    "IMAGE": {"use_alibi_encoder": False, "fixed_positions": True},
    "AUDIO": {"extractor_mode": "layer_norm", "conv_pos_pre_ln": False},
    "TEXT": {
        "use_alibi_encoder": False, "learned_pos": True, "no_scale_embedding": True,
        "layernorm_embedding": True, "no_token_positional_embeddings": False,
    },
}  # fmt: skip
"""the only accepted value of each switch, by section; what a file leaves out has its default, which is the
accepted one except where `DEFAULTS` says otherwise"""

PRETRAINING: dict[str, dict[str, Any]] = {
    "": {
        "end_of_block_targets": False, "dropout_input": 0, "start_drop_path_rate": 0,
        "end_drop_path_rate": 0, "shared_decoder": None, "recon_loss": 0, "d2v_loss": 1,
        "decoder_group": False,
    },
    "modality": {
        "prenet_layerdrop": 0, "start_drop_path_rate": 0, "end_drop_path_rate": 0, "mask_prob_min": None,
        "keep_masked_pct": 0, "add_masks": False, "remove_masks": False, "mask_dropout": 0,
        "encoder_zero_mask": True, "mask_channel_prob": 0, "local_grad_mult": 1,
    },
    "IMAGE": {
        "inverse_mask": True, "ema_local_encoder": True, "transformer_decoder": False,
        "enc_dec_transformer": False,
    },
    "AUDIO": {"inverse_mask": False, "ema_local_encoder": False},
    "TEXT": {"inverse_mask": False, "ema_local_encoder": False, "mask_length": 1},
    "decoder": {"add_positions_masked": False, "add_positions_all": False},
}  # fmt: skip
"""as `SWITCHES`, of what only pretraining computes; fine-tuning overwrites some of it, by name"""

DEFAULTS: dict[str, dict[str, Any]] = {
    "": dict.fromkeys((name.format(kind) for name, kinds in NORMS.values() for kind in kinds), False),
    "modality": dict.fromkeys(
        ("inverse_mask", "ema_local_encoder", "use_alibi_encoder", "learned_alibi_scale",
         "learned_alibi_scale_per_head"), False
    ),
    "IMAGE": {"embed_dim": 768},
    "task": {"normalize": True},
}  # fmt: skip
"""the original's, of keys outside `FIELDS` whose accepted value is another one or none"""

_REST = {
    "": """_name ema_decay ema_same_dtype log_norms ema_end_decay ema_anneal_end_step max_update modalities
        min_target_var min_pred_var supported_modality mae_init seed skip_ema""",
    "modality": """type init_extra_token_zero mask_channel_length alibi_scale alibi_max_pos num_alibi_heads
        model_depth decoder""",
    "IMAGE": "alibi_dims alibi_distance",
}
"""keys that concern optimisation, logging or initial values, or that are checked on their own"""

KNOWN: dict[str, frozenset[str]] = {
    section: frozenset(_REST.get(section, "").split()).union(
        *(table.get(section, {}) for table in (FIELDS, REPEATED, SWITCHES, PRETRAINING, DEFAULTS))
    )
    for section in ("", "modality", *MODALITIES, "decoder")
}
"""keys of the original's dataclasses; the modality's own are with it"""


def defaults(*sections: str) -> dict[str, Any]:
    """The original's defaults of these sections together, of all that is no switch at its accepted value."""
    found: dict[str, Any] = {}
    for section in sections:
        found |= {key: default for key, (_, default) in FIELDS.get(section, {}).items()}
        found |= DEFAULTS.get(section, {})
    return found


@dataclass(frozen=True)
class TunedFile:
    """How the original writes a model fine-tuned for one task."""

    task: Literal["classify", "sentence", "ctc"]
    modality: str
    name: str
    """of its model"""
    prefix: str
    """of the encoder's weights"""
    place: str
    """of the encoder's own config, in that of the model"""
    last: str
    """weight of the last layer, whose rows are the outputs"""
    switches: Mapping[str, Any]
    """of what changes the logits: the only accepted value, which a file that leaves it out has"""


TUNED = (
    TunedFile(
        "ctc", "audio", "wav2vec_ctc", "w2v_encoder.w2v_model.", "w2v_args", "w2v_encoder.proj.weight",
        {"blank_weight": 0},
    ),
    TunedFile(
        "sentence", "text", "data2vec_text_classification", "model.", "pretrained_model_args",
        "classification_heads.sentence_classification_head.out_proj.weight",
        {"pooler_activation_fn": "tanh", "spectral_norm_classification_head": False},
    ),
    TunedFile(
        "classify", "image", "mae_image_classification", "model.", "pretrained_model_args", "head.weight",
        {"use_fc_norm": True},
    ),
)  # fmt: skip

POOLING = ("MEAN_POOLING", "CLS_TOKEN", "LIN_SOFTMAX")
"""of image classification, in the order of the original's enum; the first is ours"""

TEACHER = "_ema"
"""of the weights: where the teacher's lie in a file, and with a dot before each of their names elsewhere"""


def flat(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of a file by our names: student keys, then `_ema.<key>` (teacher).

    What older files call otherwise has today's name, as the original renames it on load; what it drops is
    left out.
    """
    student = {key: value for key, value in weights.items() if key != TEACHER}
    teacher = {f"{TEACHER}.{key}": value for key, value in (weights.get(TEACHER) or {}).items()}
    return {
        re.sub(
            r"(?<=\.)positional_encoder\.(pos_embed|positions)$", "fixed_positional_encoder.positions", key
        ): v
        for key, v in (student | teacher).items()
        if not key.endswith((".encoder_mask", "IMAGE.alibi_bias"))
    }


def nested(weights: Mapping[str, T]) -> dict[str, T | dict[str, T]]:
    """The inverse of `flat`, with today's names; a dict of the teacher's only where there is one."""
    prefix = f"{TEACHER}."
    student: dict[str, T | dict[str, T]] = {k: t for k, t in weights.items() if not k.startswith(prefix)}
    teacher = {k.removeprefix(prefix): t for k, t in weights.items() if k.startswith(prefix)}
    return student | ({TEACHER: teacher} if teacher else {})
