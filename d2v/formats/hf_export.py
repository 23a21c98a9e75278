"""`d2v convert --to hf`: a folder that transformers opens with `trust_remote_code=True`.

    AutoModel.from_pretrained(folder, trust_remote_code=True)

Its model.safetensors holds the encoder, of student or teacher, or a fine-tuned model with its head. What else
was pretrained (decoder, heads, the other one's encoder) lies beside it in pretraining.safetensors, which
transformers does not read. Weights keep their values in fp32, the optimizer stays behind. The config carries
the model's own config too, so that `d2v.load` opens the folder again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ..config.fronts import ImageFront, LogMelFront, TextFront, WaveformFront
from ..config.model import ModelConfig
from ..config.run import WaveNorm
from ..config.toml import to_dict
from ..config.tune import HeadConfig
from ..data.normalisation import IMAGENET, PREPROCESSOR, WAVES, Normalisation
from ..model import Pretraining
from ..model.pretraining import Weights
from ..model.tuned import BLANK, FineTuned
from .folder import CONFIG, WEIGHTS, for_file
from .hf_card import card
from .hf_preprocessors import copy_code, ctc_vocabulary, write_json, write_speech, write_tokenizer

CODE = ("configuration_data2vec2.py", "fronts_data2vec2.py", "modeling_data2vec2.py")
PICTURES = ("image_processing_data2vec2.py", "../../data/images/eval_picture.py")
"""code of a folder, from hf_code/"""
PRETRAINING = "pretraining.safetensors"
HEADS = {
    ("classify", "image"): "ImageClassification",
    ("classify", "audio"): "AudioClassification",
    ("ctc", "audio"): "CTC",
    ("sentence", "text"): "SequenceClassification",
}
"""task and modality -> what the class is called after `Data2Vec2For` and after `AutoModelFor`"""
_MODELS = "modeling_data2vec2.Data2Vec2"
_RENAMED = (
    ("w2v_encoder.w2v_model.", "data2vec2."),
    ("w2v_encoder.proj.", "lm_head."),
    ("classification_heads.sentence_classification_head.", ""),
    ("model.", "data2vec2."),
)
"""prefixes of a fine-tuned model's parameters, ours and the folder's; the first that fits"""


def write_folder(
    model: Pretraining | FineTuned,
    folder: Path,
    *,
    weights: Weights = "student",
    encoder_only: bool = False,
    normalisation: Normalisation | None = None,
    waves: WaveNorm = "fairseq",
    tokenizer: Path | None = None,
    labels: list[str] | None = None,
) -> None:
    """Write every file into the empty `folder`.

    weights: whose encoder transformers reads. encoder_only: leave out pretraining.safetensors, without which
    `d2v.load` does not open what was pretrained.
    normalisation: of pictures; none: ImageNet's for three channels, 0.5 otherwise. waves: data.wave_norm of
    speech. tokenizer: of text. labels: class names, or a CTC vocabulary, which may have fewer letters than
    there are outputs. Raises ValueError for what a folder cannot hold.
    """
    cfg, values, name = model.cfg, _config(model.cfg), "Model"
    head: tuple[str, HeadConfig] | None = None
    if not isinstance(model, FineTuned):
        held, rest = split(model, weights)
        if not encoder_only:
            _save(rest, folder / PRETRAINING)
        values["d2v"]["weights"] = weights
        heads = [called for (_, modality), called in HEADS.items() if modality == cfg.modality]
    else:
        if weights == "teacher" or encoder_only:
            asked = "weights must be student" if weights == "teacher" else "encoder_only must be left out"
            raise ValueError(f"convert: {asked} for a fine-tuned model")
        held = {theirs(name): t for name, t in model.state_dict().items()}
        head = HEADS[model.head_cfg.task, cfg.modality], model.head_cfg
        name, heads = f"For{head[0]}", [head[0]]
        values["d2v"]["head"] = asdict(model.head_cfg)
        values |= _outputs(head, labels)
    if cfg.modality == "audio":
        values["d2v"][WAVES] = waves
    values["architectures"] = [f"Data2Vec2{name}"]
    values["auto_map"] |= {f"AutoModelFor{called}": f"{_MODELS}For{called}" for called in heads}
    _save(held, folder / WEIGHTS)
    write_json(folder / CONFIG, values)
    copy_code(CODE, folder)
    front = cfg.front
    if isinstance(front, ImageFront):
        normalisation = normalisation or _usual(front.channels)
        copy_code(PICTURES, folder)
        write_json(folder / PREPROCESSOR, _pictures(front, normalisation))
    elif isinstance(front, (WaveformFront, LogMelFront)):
        write_speech(front, labels if head is not None and head[0] == "CTC" else None, folder, waves)
    elif tokenizer is not None:
        write_tokenizer(tokenizer, folder, front)
    text = card(
        cfg,
        parameters=sum(t.numel() for t in held.values()),
        weights=weights,
        head=head,
        names=() if head is not None and head[1].regression else labels or (),
        normalisation=normalisation,
        waves=waves,
        prepared=not isinstance(front, TextFront) or tokenizer is not None,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    safetensors.torch.save_file(for_file(tensors), file, metadata={"format": "pt"})


def split(model: Pretraining, weights: Weights) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the encoder's tensors by the student's names, all others by their own)."""
    encoder = encoder_weights(model, weights)
    held = set(map(id, encoder.values()))
    whole = model.state_dict(keep_vars=True)
    return encoder, {name: t for name, t in whole.items() if id(t) not in held}


def joined(
    shapes: Pretraining, weights: Weights, encoder: Mapping[str, Tensor], rest: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The inverse of `split`: a state dict. shapes: a model of that config, on the meta device."""
    names = {id(t): name for name, t in shapes.state_dict(keep_vars=True).items()}
    own = {name: names[id(t)] for name, t in encoder_weights(shapes, weights).items()}
    return {**rest, **{own.get(name, name): t for name, t in encoder.items()}}


def encoder_weights(model: Pretraining, weights: Weights) -> dict[str, Tensor]:
    """The encoder's tensors by the student's names; what a teacher has no average of is the student's.

    ValueError for the teacher of a model that has none.
    """
    if weights == "teacher" and model.teacher is None:
        raise ValueError(f"convert: weights must be student for objective {model.cfg.objective}, got teacher")
    chosen = model.encoder_tensors()
    if weights == "teacher":
        names = {id(p): name for name, p in model.named_parameters()}
        for teacher, student in zip(*model.teacher_pairs(), strict=True):
            chosen[names[id(student)]] = teacher
    return chosen


def theirs(name: str) -> str:
    """The folder's name of a fine-tuned model's parameter."""
    for ours, new in _RENAMED:
        if name.startswith(ours):
            return new + name.removeprefix(ours)
    return name


def _config(cfg: ModelConfig) -> dict[str, Any]:
    front = cfg.front
    values: dict[str, Any] = {
        "model_type": "data2vec2",
        "auto_map": {
            "AutoConfig": "configuration_data2vec2.Data2Vec2Config",
            "AutoModel": f"{_MODELS}Model",
        },
        "dtype": "float32",
        "modality": cfg.modality,
        "hidden_size": cfg.dim,
        "num_attention_heads": cfg.heads,
        "num_hidden_layers": cfg.depth,
        "prenet_depth": cfg.prenet_depth,
        "mlp_ratio": cfg.mlp_ratio,
        "layer_norm_eps": cfg.norm_eps,
        "extra_tokens": front.extra_tokens,
        "d2v": {"model": to_dict(cfg)},
    }
    if isinstance(front, ImageFront):
        size = {"image_size": [front.height, front.width], "patch_size": front.patch}
        return values | size | {"num_channels": front.channels}
    if isinstance(front, TextFront):
        positions = {"max_positions": front.max_positions, "pad_token_id": front.pad_id}
        return values | {"vocab_size": front.vocab_size} | positions
    if isinstance(front, LogMelFront):
        spectra = {name: getattr(front, name) for name in ("mels", "window", "hop", "stack", "sample_rate")}
        values |= {"log_mel": spectra}
    else:
        values |= {"conv_layers": [list(layer) for layer in front.conv_layers]}
    return values | {
        "position_kernel": front.position_kernel,
        "position_groups": front.position_groups,
        "position_layers": front.position_layers,
        "alibi": front.alibi,
    }


def _outputs(head: tuple[str, HeadConfig], labels: list[str] | None) -> dict[str, Any]:
    """What a head's outputs are. ValueError for more letters than outputs."""
    called, cfg = head
    if called == "CTC":
        if labels and len(ctc_vocabulary(labels)) > cfg.outputs:
            raise ValueError(f"convert: a head of {cfg.outputs} outputs has {len(labels)} letters")
        return {"vocab_size": cfg.outputs, "pad_token_id": BLANK}
    names = labels if labels and len(labels) == cfg.outputs else [f"LABEL_{i}" for i in range(cfg.outputs)]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "regression" if cfg.regression else "single_label_classification",
    }


def _usual(channels: int) -> Normalisation:
    """Where none is known."""
    half = (0.5,) * channels
    return IMAGENET if channels == len(IMAGENET.mean) else Normalisation(half, half, "preprocessor")


def _pictures(front: ImageFront, normalisation: Normalisation) -> dict[str, Any]:
    return {
        "auto_map": {"AutoImageProcessor": "image_processing_data2vec2.Data2Vec2ImageProcessor"},
        "size": {"height": front.height, "width": front.width},
        "image_mean": list(normalisation.mean),
        "image_std": list(normalisation.std),
    }
