"""`d2v convert`: a model as a folder of safetensors, as a `.pt` file of the original, or for transformers.

Pretrained or fine-tuned. Weights keep their values, teacher included, and are written in fp32 (half-precision
files of the original grow); the optimizer stays behind. What the original's config cannot say is refused by
name before anything is written, but for model.cls_rows and model.init_std, which it has no place for and
which are left out. Stock timm has no post-norm block, so no timm model can hold these weights.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

from ..config.atomic import replacing
from ..config.fronts import Front, ImageFront, LogMelFront, TextFront, WaveformFront
from ..config.model import ModelConfig
from ..config.run import WaveNorm
from ..config.toml import flatten, to_dict
from ..data.normalisation import IMAGENET, KEY, OURS, WAVES, Normalisation
from ..model import Pretraining
from ..model.encoder import Network
from ..model.pretraining import Weights
from ..model.tuned import FineTuned
from ..train.checkpoint import find_run
from .fairseq import translate
from .folder import CONFIG, FORMAT, LABELS, TOKENIZER, VOCABULARY, WEIGHTS, for_file
from .hf_export import write_folder
from .open import load
from .pt_file import PtFile
from .recorded import ours, recorded, recorded_waves

Target = Literal["safetensors", "original", "hf"]
FAIRSEQ_LETTERS = "dict.ltr.txt"


def run_convert(
    source: str | Path,
    out: str | Path,
    target: Target,
    *,
    step: int | None = None,
    weights: Weights | None = None,
    encoder_only: bool = False,
) -> Path:
    """Write the model at `source` to `out`; see `d2v.load` for what source may be.

    safetensors: a folder with model.safetensors, config.json and, for text, the tokenizer.json that lies
    beside the source; of a fine-tuned model with labels.json. original: a `.pt` file, and beside it the
    tokenizer.json that the source has.
    hf: a folder for transformers, see `d2v.formats.hf_export`. step: of a run's checkpoint; none: the newest,
    or the best of a fine-tuned one. weights: whose encoder transformers reads of hf: the student's (none) or
    the teacher's. encoder_only: hf without what pretraining alone needs; d2v does not open it again.
    Raises CheckpointError for what cannot be read, ValueError for what the target cannot hold and for an
    `out` that exists.
    """
    out, source = Path(out), Path(source)
    if out.exists():
        raise ValueError(f"convert: {out} exists already: choose another name")
    if weights is not None and target != "hf":
        raise ValueError(f"convert: weights are chosen for hf alone, {target} holds both")
    if encoder_only and target != "hf":
        raise ValueError(f"convert: encoder_only is for hf alone, got {target}")
    model = load(source, step=step)
    if not isinstance(model, Pretraining) and not isinstance(model.backbone, Network):
        raise ValueError(f"convert: {source} has an encoder of transformers: only ours are converted")
    facts = Facts.of(source, model)
    if target == "original":
        beside = _beside(facts.tokenizer, out.parent / TOKENIZER)
        save_original(model, out, facts)
        if beside is not None:
            shutil.copyfile(beside, out.parent / TOKENIZER)
    elif target == "hf":
        with _making(out) as folder:
            _write_hf(model, folder, facts, weights or "student", encoder_only)
    else:
        save_folder(model, out, facts)
    print(f"{out}: {sum(t.numel() for t in model.state_dict().values()):,} values")
    if isinstance(model.cfg.front, ImageFront):
        _say_normalisation(source, target, facts.normalisation)
    return out


@dataclass(frozen=True)
class Facts:
    """What belongs to a model beside its weights and its config."""

    normalisation: Normalisation | None = None
    waves: WaveNorm | None = None
    tokenizer: Path | None = None
    """of text: the file"""
    texts: Mapping[str, str] = field(default_factory=dict)
    """of a fine-tuned model: name of a file (labels, vocabulary) -> what stands in it"""

    @classmethod
    def of(cls, source: Path, model: Pretraining | FineTuned) -> Facts:
        """Those of the model at `source`. Raises CheckpointError, and DataError for a broken vocabulary."""
        front, home = model.cfg.front, _home(source)
        texts: dict[str, str] = {}
        if not isinstance(model, Pretraining):
            files = [home / name for name in (LABELS, VOCABULARY) if (home / name).is_file()]
            texts = {file.name: file.read_text(encoding="utf-8") for file in files}
            texts |= {} if source.is_dir() else _texts_of_file(source)
            if model.head_cfg.task == "ctc" and LABELS not in texts:
                texts |= _letters(home)
        tokenizer = home / TOKENIZER
        return cls(
            recorded(source, front),
            recorded_waves(source, front),
            tokenizer if isinstance(front, TextFront) and tokenizer.is_file() else None,
            texts,
        )


def _letters(home: Path) -> dict[str, str]:
    """A CTC vocabulary in a folder without labels: ours, or the dictionary beside a model of fairseq."""
    from ..data.speech.transcripts import Vocabulary

    for file in (home / VOCABULARY, home / FAIRSEQ_LETTERS):
        if file.is_file():
            text = json.dumps(Vocabulary.read(file).letters, ensure_ascii=False) + "\n"
            return {LABELS: text, VOCABULARY: text}
    return {}


def _texts_of_file(file: Path) -> dict[str, str]:
    with PtFile(file) as held:
        known = ours(held)
    return {name: known[name] for name in (LABELS, VOCABULARY) if isinstance(known.get(name), str)}


def _beside(tokenizer: Path | None, there: Path) -> Path | None:
    """The tokenizer, where it is to be copied to lie beside a `.pt` file.

    ValueError where another one lies there already.
    """
    if tokenizer is None or not there.exists():
        return tokenizer
    from ..data.text.tokenizer import load_tokenizer

    read = ("model", "normalizer", "pre_tokenizer")
    one, other = (json.loads(load_tokenizer(path).to_str()) for path in (tokenizer, there))
    if any(one[key] != other[key] for key in read):
        raise ValueError(f"convert: {there} is another tokenizer than {tokenizer}: choose another folder")
    return None


def _say_normalisation(source: Path, target: Target, value: Normalisation | None) -> None:
    """What a user must know about the pictures of the new model."""
    if value is None:
        then = ": those in preprocessor_config.json are a guess, correct them" if target == "hf" else ""
        print(f"note: with what mean and deviation {source} was trained is recorded nowhere{then}")
    elif target == "original" and not value.same_as(IMAGENET):
        print(f"note: pictures were normalised with {value}: d2v reads it in the file, the original does not")


def _home(source: Path) -> Path:
    """The folder of what belongs to a model: its run or converted folder, or that of its file."""
    return find_run(source if source.is_dir() else source.parent)[0]


NOTHING = Facts()


def save_folder(model: Pretraining | FineTuned, out: Path, facts: Facts = NOTHING) -> None:
    """A folder that `d2v.load` opens, whole or not at all."""
    with _making(out) as folder:
        safetensors.torch.save_file(for_file(model.state_dict()), folder / WEIGHTS)
        config: dict[str, Any] = {"format": FORMAT, "model": to_dict(model.cfg)}
        if facts.normalisation is not None:
            config[KEY] = facts.normalisation.record
        if facts.waves is not None:
            config[WAVES] = facts.waves
        if not isinstance(model, Pretraining):
            config["head"] = to_dict(model.head_cfg)
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        if facts.tokenizer is not None:
            shutil.copyfile(facts.tokenizer, folder / TOKENIZER)
        _write_texts(facts, folder)


def _write_texts(facts: Facts, folder: Path) -> None:
    for name, text in facts.texts.items():
        (folder / name).write_text(text, encoding="utf-8")


@contextmanager
def _making(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block ends, and is gone after an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield making
        making.chmod(0o755)
        making.rename(out)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _write_hf(
    model: Pretraining | FineTuned, folder: Path, facts: Facts, weights: Weights, encoder_only: bool
) -> None:
    """The folder's files, with the labels as d2v reads them."""
    labels = facts.texts.get(LABELS)
    write_folder(
        model,
        folder,
        weights=weights,
        encoder_only=encoder_only,
        normalisation=facts.normalisation,
        waves=facts.waves or "fairseq",
        tokenizer=facts.tokenizer,
        labels=None if labels is None else json.loads(labels),
    )
    _write_texts(facts, folder)


TUNED = {
    ("classify", "image"): ("mae_image_classification", "model.", "pretrained_model_args"),
    ("sentence", "text"): ("data2vec_text_classification", "model.", "pretrained_model_args"),
    ("ctc", "audio"): ("wav2vec_ctc", "w2v_encoder.w2v_model.", "w2v_args"),
}
"""task and modality -> the original's model, prefix of the encoder's keys, where its config is"""


def save_original(model: Pretraining | FineTuned, out: Path, facts: Facts = NOTHING) -> None:
    """A `.pt` file as the original's trainer writes it: plain containers, the teacher under `_ema`.

    Of a fine-tuned model the encoder's config stands inside its own, as there, with what `d2v.load` reads of
    it; settings of training are left out. What the original has no place for but ignores lies under "d2v".
    Raises ValueError naming what the original has no words for.
    """
    tensors = for_file(model.state_dict())
    known: dict[str, Any] = dict(facts.texts)
    if facts.normalisation is not None:
        known[KEY] = facts.normalisation.record
    if facts.waves == "transformers":  # the original has one way to normalise
        known[WAVES] = facts.waves
    extra, task = {OURS: known} if known else {}, _task(model.cfg.front, facts.waves)
    if not isinstance(model, Pretraining):
        head = model.head_cfg
        if (head.task, model.modality) not in TUNED:
            raise ValueError(f"convert: the original has no {head.task} of {model.modality}")
        name, prefix, place = TUNED[head.task, model.modality]
        shapes = {key.removeprefix(prefix): tuple(t.shape) for key, t in tensors.items()}
        tuned: dict[str, Any] = {"_name": name, place: {"model": original_config(model.cfg, shapes), **task}}
        if head.task != "ctc":
            tuned["num_classes"] = head.outputs
        with replacing(out) as file:
            torch.save({"args": None, "cfg": {"model": tuned}, "model": tensors, **extra}, file)
        return
    student = {name: t for name, t in tensors.items() if not name.startswith("_ema.")}
    teacher = {name.removeprefix("_ema."): t for name, t in tensors.items() if name.startswith("_ema.")}
    tree = original_config(model.cfg, {name: tuple(t.shape) for name, t in tensors.items()})
    state = {"args": None, "cfg": {"model": tree, **task}, "model": {**student, "_ema": teacher}, **extra}
    with replacing(out) as file:
        torch.save(state, file)


def _task(front: Front, waves: WaveNorm | None = None) -> dict[str, Any]:
    """The original's `cfg.task`, of what says how speech is read."""
    if not isinstance(front, WaveformFront):
        return {}
    read = {"sample_rate": front.sample_rate, "normalize": waves != "none"}
    return {"task": {"_name": "audio_pretraining", **read}}


def original_config(cfg: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The original's `cfg.model` for a `ModelConfig`: the inverse of `d2v.formats.fairseq.translate`.

    shapes: of the weights. ValueError for what is lost on the way there and back.
    """
    front, decoder, target = cfg.front, cfg.decoder, cfg.target
    if isinstance(front, LogMelFront):
        raise ValueError("convert: the original has no log-mel front end")
    if cfg.objective != "data2vec2":
        raise ValueError(f"convert: the original is for data2vec2, got objective {cfg.objective}")
    section: dict[str, Any] = {
        "prenet_depth": cfg.prenet_depth,
        "prenet_dropout": cfg.prenet_dropout,
        "num_extra_tokens": front.extra_tokens,
        "mask_prob": cfg.mask.prob,
        "mask_length": cfg.mask.length,
        "mask_prob_adjust": cfg.mask.adjust,
        "mask_noise_std": decoder.noise_std,
        "inverse_mask": isinstance(front, ImageFront),
        "ema_local_encoder": isinstance(front, ImageFront),
        "use_alibi_encoder": False,
        "decoder": {
            "decoder_dim": decoder.dim,
            "decoder_groups": decoder.groups,
            "decoder_kernel": decoder.kernel,
            "decoder_layers": decoder.layers,
            "decoder_residual": decoder.residual,
            "projection_layers": decoder.projection_layers,
            "projection_ratio": decoder.projection_ratio,
            "input_dropout": decoder.input_dropout,
        },
    }
    if isinstance(front, ImageFront):
        section |= {"embed_dim": cfg.dim, "input_size": front.height, "patch_size": front.patch}
        section |= {"in_chans": front.channels, "fixed_positions": True}
    elif isinstance(front, WaveformFront):
        section |= {
            "feature_encoder_spec": str(list(front.conv_layers)),
            "extractor_mode": "layer_norm",
            "conv_pos_width": front.position_width,
            "conv_pos_groups": front.position_groups,
            "conv_pos_depth": front.position_layers,
            "use_alibi_encoder": front.alibi,
            "num_alibi_heads": cfg.heads,
            "learned_alibi_scale": front.alibi,
            "learned_alibi_scale_per_head": front.alibi,
        }
    else:
        section |= {"max_source_positions": front.max_positions, "dropout": front.dropout}
        section |= {"learned_pos": True, "no_scale_embedding": True, "layernorm_embedding": True}
    norms = {f"{kind}_norm_target_layer": target.norm == kind for kind in ("instance", "layer", "batch")}
    norms |= {f"{kind}_norm_targets": target.final == kind for kind in ("layer", "instance")}
    tree = {
        "_name": "data2vec_multi",
        "supported_modality": cfg.modality.upper(),
        "embed_dim": cfg.dim,
        "num_heads": cfg.heads,
        "depth": cfg.depth,
        "mlp_ratio": cfg.mlp_ratio,
        "norm_eps": cfg.norm_eps,
        "layer_norm_first": False,
        "end_of_block_targets": False,
        "encoder_dropout": cfg.encoder_dropout,
        "attention_dropout": cfg.attention_dropout,
        "activation_dropout": cfg.activation_dropout,
        "post_mlp_drop": cfg.post_mlp_dropout,
        "layerdrop": cfg.layerdrop,
        "clone_batch": cfg.mask.clones,
        "average_top_k_layers": target.top_k,
        **norms,
        "loss_beta": cfg.loss_beta,
        "loss_scale": cfg.loss_scale,
        "cls_loss": cfg.cls_loss,
        "ema_encoder_only": cfg.ema_encoder_only,
        "modalities": {cfg.modality: section},
    }
    back = translate({"model": tree, **_task(front)}, shapes, "convert", quiet=True)
    # what the original does not have: the rows a CLS loss is scaled to, and the deviation of initial weights
    wanted = flatten(to_dict(replace(cfg, cls_rows=None, init_std=back.init_std)))
    found = flatten(to_dict(back))
    if lost := sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)):
        listed = ", ".join(f"{key} = {wanted.get(key)!r}" for key in lost)
        raise ValueError(f"convert: the original cannot express {listed}")
    return tree
