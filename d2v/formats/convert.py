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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

from ..config.atomic import replacing
from ..config.fronts import ImageFront, TextFront
from ..config.run import WaveNorm
from ..config.toml import to_dict
from ..data.normalisation import IMAGENET, KEY, OURS, WAVES, Normalisation
from ..model import Pretraining
from ..model.encoder import Network
from ..model.pretraining import Weights
from ..model.tuned import FineTuned
from ..train.checkpoint import find_run
from .fairseq_config import original_config, original_task
from .fairseq_names import TUNED, TunedFile, nested
from .folder import CONFIG, FORMAT, LABELS, TOKENIZER, VOCABULARY, WEIGHTS, for_file
from .hf_export import write_folder
from .hf_preprocessors import write_json
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

    @property
    def records(self) -> dict[str, Any]:
        """How its data were normalised, as our own files say it."""
        pictures = {} if self.normalisation is None else {KEY: self.normalisation.record}
        return pictures if self.waves is None else {**pictures, WAVES: self.waves}

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
        config: dict[str, Any] = {"format": FORMAT, "model": to_dict(model.cfg), **facts.records}
        if not isinstance(model, Pretraining):
            config["head"] = to_dict(model.head_cfg)
        write_json(folder / CONFIG, config)
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


def save_original(model: Pretraining | FineTuned, out: Path, facts: Facts = NOTHING) -> None:
    """A `.pt` file as the original's trainer writes it: plain containers, the teacher under `_ema`.

    Of a fine-tuned model the encoder's config stands inside its own, as there, with what `d2v.load` reads of
    it; settings of training are left out. What the original has no place for but ignores lies under "d2v".
    Raises ValueError naming what the original has no words for.
    """
    tensors = for_file(model.state_dict())
    known: dict[str, Any] = {**facts.texts, **facts.records}
    if facts.waves != "transformers":  # the original's own, or none
        known.pop(WAVES, None)
    kind: TunedFile | None = None
    if not isinstance(model, Pretraining):
        task = model.head_cfg.task
        kind = next((kind for kind in TUNED if (kind.task, kind.modality) == (task, model.modality)), None)
        if kind is None:
            raise ValueError(f"convert: the original has no {task} of {model.modality}")
    prefix = "" if kind is None else kind.prefix
    shapes = {name.removeprefix(prefix): tuple(t.shape) for name, t in tensors.items()}
    cfg = {"model": original_config(model.cfg, shapes), **original_task(model.cfg.front, facts.waves)}
    if kind is not None and not isinstance(model, Pretraining):
        classes = {} if kind.task == "ctc" else {"num_classes": model.head_cfg.outputs}
        cfg = {"model": {"_name": kind.name, kind.place: cfg, **classes}}
    state = {"args": None, "cfg": cfg, "model": nested(tensors), **({OURS: known} if known else {})}
    with replacing(out) as file:
        torch.save(state, file)
