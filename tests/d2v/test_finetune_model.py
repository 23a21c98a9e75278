"""Fine-tuned models beside the original: logits, loss, gradients, drop path, layer decay, its files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import d2v
from d2v.config.fronts import Modality
from d2v.config.recipes import default_recipe, recipe
from d2v.config.toml import CheckpointError
from d2v.config.tune import (
    FITS,
    DropConfig,
    FineTuneConfig,
    HeadConfig,
    Task,
    TuneConfig,
    tuned_model_config,
)
from d2v.formats.convert import run_convert
from d2v.formats.fairseq import is_finetuned
from d2v.formats.fairseq_config import translate
from d2v.model import Data2Vec
from d2v.model.blocks import Block
from d2v.model.tuned import FineTuned
from d2v.train.finetune_step import lr_scale
from d2v.train.losses import soft_cross_entropy
from d2v.train.optim import param_groups
from tests.d2v.golden_cases import load
from tests.d2v.tiny_models import make_model, make_source

PREFIX = {"image": "model.", "text": "model.", "audio": "w2v_encoder.w2v_model."}
TASKS = {"image": "classify", "text": "sentence", "audio": "ctc"}


def golden_image(goldens: Path) -> tuple[FineTuned, dict[str, Tensor]]:
    case = load(goldens, "image_base")
    with np.load(goldens / "ft_image.npz") as archive:
        numbers = [name for name in archive.files if archive[name].dtype.kind in "fiub"]
        recorded = {name: torch.from_numpy(archive[name]) for name in numbers}
    shapes = {name: tuple(t.shape) for name, t in case.weights.items()}
    cfg = translate({"model": case.facts["cfg"]}, shapes, "image_base")
    model = FineTuned(tuned_model_config(cfg, DropConfig()), HeadConfig(task="classify", outputs=10))
    weights = {f"model.{k}": v for k, v in case.weights.items() if is_encoder(k)}
    weights |= {key.removeprefix("w."): value for key, value in recorded.items() if key.startswith("w.")}
    model.load_state_dict(weights)
    return model, recorded


def is_encoder(key: str) -> bool:
    return not key.startswith("_ema.") and ".decoder." not in key


def test_image_logits_loss_and_gradients_are_the_originals(goldens: Path) -> None:
    model, recorded = golden_image(goldens)
    logits = model.eval().logits(recorded["in.imgs"])
    assert (logits - recorded["logits"]).norm() <= 1e-4 * recorded["logits"].norm()
    labels = recorded["in.labels"].long()
    plain = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(plain, recorded["loss.regression"], rtol=1e-4, atol=0)
    model.train()  # every dropout is 0
    soft = F.one_hot(labels, 10).float() * 0.9 + 0.01
    logits = model.logits(recorded["in.imgs"])
    per_sample = torch.stack([soft_cross_entropy(logits[i : i + 1], soft[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(per_sample, recorded["train.loss.regression_ls0.1"], rtol=1e-4, atol=0)
    per_sample.mean().backward()
    named = dict(model.named_parameters())
    checked = 0
    for key, expected in recorded.items():
        name = key.removeprefix("train.grad.")
        if key.startswith("train.grad.") and name in named:
            grad = named[name].grad
            assert grad is not None and (grad - expected).norm() <= 1e-4 * expected.norm(), name
            checked += 1
    assert checked == 5


def test_drop_path_and_layer_decay_are_the_originals(goldens: Path) -> None:
    facts = json.loads((goldens / "finetune.json").read_text())["image"]
    model, _ = golden_image(goldens)
    model.backbone.set_drop_path(0.1)

    def rates(blocks: Any) -> list[float]:
        return [round(block.drop_path, 6) for block in blocks if isinstance(block, Block)]

    assert rates(model.backbone.encoder.context_encoder.blocks) == facts["drop_path_actual"]["prenet"]
    assert rates(model.backbone.blocks) == facts["drop_path_actual"]["main"]
    cfg = FineTuneConfig(recipe="x", head=model.head_cfg, model=model.cfg, train=TuneConfig(layer_decay=0.65))
    names = {p: name for name, p in model.named_parameters()}
    scale = {
        names[p]: group["lr_scale"]
        for group in param_groups(model, cfg.optim, lr_scale(cfg))
        for p in group["params"]
    }
    for name, overrides in facts["optim_overrides_examples"].items():
        assert scale[name] == pytest.approx(overrides.get("lr_scale", 1.0)), name
    assert scale["head.weight"] == 1.0 and len(scale) == sum(p.requires_grad for p in model.parameters())


def test_drop_path_drops_whole_samples() -> None:
    cfg = make_model("image").cfg
    torch.manual_seed(3)
    model = FineTuned(cfg, HeadConfig(task="classify", outputs=3), DropConfig(path=0.9)).train()
    source = make_source("image", 1).expand(16, -1, -1, -1)
    first = model.logits(source)
    assert len({tuple(row.tolist()) for row in first.detach()}) > 1  # equal samples, unequal paths
    model.eval()
    assert torch.equal(model.logits(source)[0], model.logits(source)[5])


@pytest.mark.parametrize("modality", ["image", "audio", "text"])
def test_the_encoder_is_the_pretrained_one(modality: str) -> None:
    pretrained = make_model(modality).eval()
    model = FineTuned(pretrained.cfg, HeadConfig(task=TASKS[modality], outputs=7)).eval()  # type: ignore[arg-type]
    model.backbone.load_state_dict({k: v for k, v in pretrained.state_dict().items() if is_encoder(k)})
    source = make_source(modality)
    padding = None
    if modality != "image":
        padding = torch.arange(source.shape[1]) >= torch.tensor([source.shape[1], 16, 9_000, 12])[:, None]
        padding = padding[: len(source)] if modality == "text" else padding & (torch.arange(4) != 3)[:, None]
        padding[1] = False
    features = pretrained.features(source, padding)
    x, padded = model.backbone(source, padding)
    torch.testing.assert_close(x[:, pretrained.cfg.front.extra_tokens :], features.x, rtol=0, atol=1e-6)
    assert (padded is None) == (padding is None)
    logits = model.logits(source, padding)
    assert logits.dtype == torch.float32
    assert logits.shape == ((4, x.shape[1], 7) if modality == "audio" else (4, 7))
    if modality == "audio":
        assert padded is not None and padded.any()
        assert (logits[padded].argmax(-1) == 0).all() and torch.isneginf(logits[padded][:, 1:]).all()
        assert torch.isfinite(logits[~padded]).all()


def test_padding_changes_no_logits_of_a_class() -> None:
    model = FineTuned(make_model("text").cfg, HeadConfig(task="sentence", outputs=3)).eval()
    source = make_source("text")[:1, :12]
    longer = F.pad(source, (0, 5), value=1)
    padding = torch.arange(17)[None] >= 12
    torch.testing.assert_close(model.logits(longer, padding), model.logits(source), rtol=1e-5, atol=1e-6)


def saved_by_the_original(goldens: Path, modality: str, path: Path) -> tuple[FineTuned, Tensor, Path]:
    """A fine-tuned file as fairseq writes it, the model it holds, and a source."""
    case = load(goldens, f"{modality}_base")
    encoder = {PREFIX[modality] + k: v for k, v in case.weights.items() if is_encoder(k)}
    left = {PREFIX[modality] + k: v for k, v in case.weights.items() if ".decoder." in k}
    shapes = {name: tuple(t.shape) for name, t in case.weights.items()}
    pretraining = translate({"model": case.facts["cfg"]}, shapes, modality)
    torch.manual_seed(0)
    model = FineTuned(
        tuned_model_config(pretraining, DropConfig()),
        HeadConfig(task=TASKS[modality], outputs=5),  # type: ignore[arg-type]
    )
    head = {k: v for k, v in model.state_dict().items() if not k.startswith(PREFIX[modality])}
    model.load_state_dict({**encoder, **head})
    inner = json.loads(json.dumps(case.facts["cfg"]))
    # what wav2vec2_asr.py overwrites by name wherever it stands
    section = inner["modalities"][modality]
    section |= {
        "encoder_zero_mask": False,
        "mask_channel_prob": 0.25,
        "prenet_layerdrop": 0.1,
        "inverse_mask": False,
    }
    key = "w2v_args" if modality == "audio" else "pretrained_model_args"
    cfg = {"model": {"_name": "x", key: {"model": inner, "task": {"_name": "mae_image_pretraining"}}}}
    torch.save({"cfg": cfg, "model": {**encoder, **left, **head}}, path)
    return model.eval(), case.tensors["in.source"], path


@pytest.mark.parametrize("modality", ["image", "audio", "text"])
def test_files_of_the_original_load(goldens: Path, modality: str, tmp_path: Path) -> None:
    expected, source, path = saved_by_the_original(goldens, modality, tmp_path / "ft.pt")
    assert is_finetuned(path)
    model = d2v.load(path)
    assert isinstance(model, FineTuned) and not model.training
    assert model.head_cfg == HeadConfig(task=TASKS[modality], outputs=5)  # type: ignore[arg-type]
    assert torch.equal(model.logits(source), expected.logits(source))


@pytest.mark.parametrize("name", ["audio_base", "audio_padded", "text_base"])
def test_logits_are_the_head_on_the_originals_features(goldens: Path, name: str, tmp_path: Path) -> None:
    modality = name.partition("_")[0]
    model = d2v.load(saved_by_the_original(goldens, modality, tmp_path / "ft.pt")[2])
    case = load(goldens, name)
    features, padding = case.tensors["feat.x"].double(), case.tensors.get("in.padding_mask")

    def through(x: Tensor, layer: Any) -> Tensor:
        return x @ layer.weight.double().T + layer.bias.double()

    assert isinstance(model, FineTuned)
    if modality == "audio":  # wav2vec2_asr.py: a linear layer; padded frames are blank
        expected = through(features, model.w2v_encoder["proj"])
        if padding is not None:
            blank = torch.full((5,), float("-inf"), dtype=torch.float64)
            blank[0] = 0
            expected[case.tensors["feat.padding_mask"].bool()] = blank
    else:  # data2vec_text_classification.py: the first token through dense, tanh, out_proj
        head: Any = model.classification_heads["sentence_classification_head"]
        expected = through(torch.tanh(through(features[:, 0], head["dense"])), head["out_proj"])
    logits = model.logits(case.tensors["in.source"], padding).double()
    assert torch.equal(logits.isinf(), expected.isinf()) and logits.shape == expected.shape
    real = expected.isfinite()
    assert (logits[real] - expected[real]).norm() <= 1e-5 * expected[real].norm()


@pytest.mark.parametrize("modality", ["image", "audio", "text"])
def test_saved_files_have_the_originals_keys(goldens: Path, modality: str, tmp_path: Path) -> None:
    facts = json.loads((goldens / "finetune.json").read_text())[modality]
    model, _, path = saved_by_the_original(goldens, modality, tmp_path / "ft.pt")
    run_convert(path, tmp_path / "back.pt", "original")
    pretrained = load(goldens, f"{modality}_base").weights
    encoder = {facts["backbone_prefix"] + key for key in pretrained if is_encoder(key)}
    dropped = {key for key in pretrained if not is_encoder(key) and not key.startswith("_ema.")}
    assert dropped == {key for key in facts["dropped"] if key != "_ema"}
    saved = torch.load(tmp_path / "back.pt")["model"]
    assert saved.keys() == encoder | facts["new_keys"].keys()
    assert all(torch.equal(saved[key], t) for key, t in model.state_dict().items())


def test_damaged_files_of_the_original_are_named(goldens: Path, tmp_path: Path) -> None:
    *_, path = saved_by_the_original(goldens, "image", tmp_path / "ft.pt")
    saved = torch.load(path)
    del saved["model"]["head.bias"]
    torch.save(saved, tmp_path / "short.pt")
    with pytest.raises(CheckpointError, match=r"short.pt: does not fit the model: 1 missing: head.bias"):
        d2v.load(tmp_path / "short.pt")
    del saved["cfg"]["model"]["pretrained_model_args"]
    torch.save(saved, tmp_path / "bare.pt")
    with pytest.raises(CheckpointError, match="no cfg.model.pretrained_model_args.model"):
        d2v.load(tmp_path / "bare.pt")
    assert isinstance(d2v.load(goldens / "ckpt_image_base.pt"), Data2Vec)


@pytest.mark.parametrize("modality", ["image", "audio", "text"])
@pytest.mark.parametrize("task", ["classify", "ctc", "sentence"])
def test_tasks_that_do_not_fit_are_refused(task: Task, modality: Modality) -> None:
    """When the model is made, and before it when a run's settings are."""
    cfg = make_model(modality).cfg
    base = recipe(default_recipe(task, cfg))
    if modality in FITS[task]:
        assert base.on("it", cfg).head.task == task
        return
    message = f"finetune: task {task} needs {' or '.join(FITS[task])}, got {modality}, for which "
    with pytest.raises(ValueError, match=message):
        FineTuned(cfg, HeadConfig(task=task, outputs=3))
    with pytest.raises(ValueError, match=message):
        base.on("it", cfg)


def test_heads_that_cannot_be_are_refused() -> None:
    cfg = make_model("image").cfg
    with pytest.raises(ValueError, match="head.outputs must be positive, got 0"):
        FineTuned(cfg, HeadConfig(task="classify"))
    with pytest.raises(ValueError, match="freeze_front needs a waveform front end, got ImageFront"):
        FineTuned(cfg, HeadConfig(task="classify", outputs=3)).freeze_front()


def test_dropouts_of_a_recipe_replace_those_of_pretraining() -> None:
    cfg = make_model("text", encoder_dropout=0.3, layerdrop=0.2).cfg
    tuned = tuned_model_config(cfg, DropConfig(dropout=0.1, attention=0.2))
    rates = (tuned.encoder_dropout, tuned.post_mlp_dropout, tuned.prenet_dropout, tuned.front.dropout)  # type: ignore[union-attr]
    assert rates == (0.1,) * 4 and (tuned.attention_dropout, tuned.layerdrop) == (0.2, 0.0)
    assert dataclasses.replace(tuned, front=cfg.front) != cfg
