"""The rivals of data2vec 2.0: each against its paper's definition, and as a run like any other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import d2v
import d2v.data.open
from d2v.cli.main import main
from d2v.config.model import ModelConfig
from d2v.config.objectives import for_objective
from d2v.config.presets import PRESETS, preset
from d2v.evaluate.probe import features_of
from d2v.formats.convert import run_convert
from d2v.model import Pretraining, build_model
from d2v.model.rivals import Data2Vec1, MaskedAutoencoder, MaskedLM, _corrupted
from d2v.model.tuned import FineTuned
from d2v.train.pretrain import run
from d2vkern import MaskPlan
from tests.d2v.test_resume import RANDOM, assert_same_run
from tests.d2v.tiny_models import make_source
from tests.d2v.tiny_runs import make_data, tiny

PAIRS = [
    ("image", "data2vec1"),
    ("image", "mae"),
    ("audio", "data2vec1"),
    ("audio", "mae"),
    ("text", "data2vec1"),
    ("text", "mlm"),
]


def make(modality: str, objective: Any, **changed: Any) -> Pretraining:
    torch.manual_seed(0)
    cfg = for_objective(tiny(modality), objective).model
    return build_model(dataclasses.replace(cfg, **changed)).train()


def plan_of(model: Pretraining, source: Tensor) -> MaskPlan:
    return model.sample_masks(source, torch.arange(len(source)), seed=3)


@pytest.mark.parametrize(("modality", "objective"), PAIRS)
def test_masked_places_alone_enter_the_loss_and_all_parameters_learn(modality: str, objective: str) -> None:
    model, source = make(modality, objective), make_source(modality)
    out = model(source, None, plan_of(model, source))
    masked = out.plan.mask.sum()
    assert int(out.sample_size) == int(masked) > 0
    out.loss.backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []
    assert out.decoded.shape[:2] == out.plan.mask.shape


def test_data2vec1_is_smooth_l1_between_a_linear_head_and_the_teachers_layers() -> None:
    model, source = make("image", "data2vec1"), make_source("image")
    assert isinstance(model, Data2Vec1)
    with torch.no_grad():
        for p in model._ema.parameters():
            p.add_(0.02 * torch.randn_like(p))
    plan = plan_of(model, source)
    out = model(source, None, plan)
    layers = model.features(source, teacher=True).layers[-2:]
    targets = torch.stack([F.layer_norm(layer[:, 1:], (16,)) for layer in layers]).mean(0)
    torch.testing.assert_close(out.targets, targets)

    assert model.mask_token is not None
    local = model.encoder.local(source, None, torch.float32)
    x = torch.where(plan.mask[..., None], model.mask_token, local)
    x, context = model.encoder.contextualise(x, None, None)
    for block in model.blocks:
        x, _ = block(x, context)
    assert x.shape[1] == 37  # masked tokens go through the encoder
    predicted = F.linear(x[:, 1:], model.head.weight, model.head.bias)
    loss = F.smooth_l1_loss(predicted[plan.mask], targets[plan.mask], beta=2.0, reduction="sum") / 16**0.5
    torch.testing.assert_close(out.loss_sum, loss)
    torch.testing.assert_close(out.decoded, predicted)


def test_mae_is_the_error_of_normalised_patches_at_masked_places() -> None:
    model, source = make("image", "mae"), make_source("image")
    assert isinstance(model, MaskedAutoencoder)
    plan = plan_of(model, source)
    out = model(source, None, plan)
    assert out.student.shape == (4, 1 + 9, 16)  # the encoder sees a quarter of 36 patches
    patches = source[:, 0].unfold(1, 4, 4).unfold(2, 4, 4).reshape(4, 36, 16)
    wanted = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(out.targets, wanted)
    errors = (out.decoded - wanted).square().mean(-1)
    torch.testing.assert_close(out.loss, errors[plan.mask].mean())


def test_mae_of_speech_predicts_normalised_spectra() -> None:
    model, source = make("audio", "mae"), make_source("audio")
    assert isinstance(model, MaskedAutoencoder)
    out = model(source, None, plan_of(model, source))
    assert out.targets.shape == (4, 49, 16)
    torch.testing.assert_close(out.targets.mean(-1), torch.zeros(4, 49), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.targets.var(-1), torch.ones(4, 49), atol=1e-3, rtol=0)
    errors = (out.decoded - out.targets).square().mean(-1)
    torch.testing.assert_close(out.loss, errors[out.plan.mask].mean())


def test_mlm_is_cross_entropy_through_the_embedding() -> None:
    model, source = make("text", "mlm"), make_source("text")
    assert isinstance(model, MaskedLM)
    plan = plan_of(model, source)
    assert plan.mask.sum(1).tolist() == [24 - int(24 * 0.85)] * 4
    torch.manual_seed(5)
    out = model(source, None, plan)
    torch.manual_seed(5)
    ids = _corrupted(source, plan.mask, model.cfg.front)  # type: ignore[arg-type]
    x, context = model.encoder.contextualise(model.encoder.local(ids, None, torch.float32), None, None)
    for block in model.blocks:
        x, _ = block(x, context)
    hidden = model.lm_norm(F.gelu(model.lm_dense(x[plan.mask])))
    embedding = dict(model.named_parameters())["modality_encoders.TEXT.local_encoder.embed_tokens.weight"]
    logits = hidden @ embedding.T + model.lm_bias
    torch.testing.assert_close(out.loss, F.cross_entropy(logits, source[plan.mask]))
    right = (logits.argmax(1) == source[plan.mask]).float().mean()
    torch.testing.assert_close(out.metrics["accuracy"], right)


def test_mlm_replaces_80_10_10() -> None:
    front = preset("text_tiny").model.front
    torch.manual_seed(0)
    ids = torch.randint(4, front.vocab_size, (200, 500))  # type: ignore[union-attr]
    ids[:, -50:] = front.pad_id  # type: ignore[union-attr]
    mask = torch.rand(ids.shape) < 0.5
    new = _corrupted(ids, mask, front)  # type: ignore[arg-type]
    assert torch.equal(new[~mask], ids[~mask])
    assert torch.equal(new[:, -50:], ids[:, -50:])
    chosen = mask[:, :-50]
    before, after = ids[:, :-50][chosen], new[:, :-50][chosen]
    gone, kept = after == front.mask_id, after == before  # type: ignore[union-attr]
    share = [float(x.double().mean()) for x in (gone, kept, ~(gone | kept))]
    deviation = (0.8 * 0.2 / len(after)) ** 0.5
    assert np.allclose(share, [0.8, 0.1, 0.1], atol=5 * deviation)
    assert int(after[~gone].min()) >= 4


@pytest.mark.parametrize("objective", ["data2vec1", "mae"])
def test_what_is_masked_cannot_be_seen(objective: str) -> None:
    model, source = make("image", objective).eval(), make_source("image")
    plan = plan_of(model, source)
    hidden = plan.mask.view(4, 6, 6).repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    changed = torch.where(hidden, source + 1, source)
    one, two = (model(x, None, plan).decoded for x in (source, changed))
    assert torch.equal(one, two)
    seen = torch.where(hidden, source, source + 1)
    assert not torch.equal(one, model(seen, None, plan).decoded)


def test_blocks_are_the_inverse_of_visible_blocks() -> None:
    model, source = make("image", "data2vec1"), make_source("image")
    plan = plan_of(model, source)
    assert plan.mask.sum(1).tolist() == [21] * 4  # of 36
    again = MaskPlan.from_mask(plan.mask, 1)
    assert torch.equal(plan.ids_keep, again.ids_keep) and torch.equal(plan.slot, again.slot)
    assert torch.equal(plan.ids_mask, again.ids_mask)


@pytest.mark.parametrize(
    ("modality", "objective", "kind"),
    [
        ("text", "mae", None),
        ("image", "mlm", None),
        ("image", "data2vec2", "span"),
        ("text", "data2vec2", "block"),
    ],
)
def test_what_does_not_fit_is_refused(modality: str, objective: Any, kind: Any) -> None:
    model = tiny(modality).model
    with pytest.raises(ValueError, match="config: (model.objective|mask.kind) must be"):
        dataclasses.replace(model, objective=objective, mask=dataclasses.replace(model.mask, kind=kind))


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_has_its_rivals(name: str) -> None:
    cfg = preset(name)
    assert for_objective(cfg, "data2vec2") == cfg
    for objective in ("data2vec1", "mlm" if cfg.model.modality == "text" else "mae"):
        if objective == "mae" and name in ("audio_base", "audio_large"):
            with pytest.raises(ValueError, match="model.objective must be another"):
                for_objective(cfg, "mae")
            continue
        model: ModelConfig = for_objective(cfg, objective).model  # type: ignore[arg-type]
        assert (model.objective, model.mask.clones, model.dim) == (objective, 1, cfg.model.dim)
    base = for_objective(preset("image_base"), "mae")
    assert (base.model.mae.dim, base.model.mae.depth, base.data.batch) == (528, 8, 4096)


@pytest.mark.parametrize(("modality", "objective"), PAIRS)
def test_runs_learn_and_resume_bitwise(modality: str, objective: Any, tmp_path: Path) -> None:
    data = make_data(modality, tmp_path / "data")
    cfg = for_objective(
        tiny(modality, steps=24, batch=1 if modality == "audio" else 2, model=RANDOM), objective
    )
    whole = run(cfg, data, tmp_path / "whole")
    run(cfg, data, tmp_path / "parts", stop=lambda step: step == 7)
    run(cfg, data, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    losses = [row["loss"] for row in whole.metrics]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_a_rivals_run_is_loaded_probed_fine_tuned_and_converted(tmp_path: Path) -> None:
    data = make_data("image", tmp_path / "data")
    run(for_objective(tiny("image", steps=2, batch=2), "mae"), data, tmp_path / "run")
    model = d2v.load(tmp_path / "run")
    assert isinstance(model, MaskedAutoencoder)
    source = make_source("image")
    assert model.features(source).x.shape == (4, 36, 16)
    with pytest.raises(ValueError, match="objective mae has no teacher"):
        model.features(source, teacher=True)

    pictures = np.random.default_rng(0).integers(0, 255, (40, 24, 24, 1), dtype=np.uint8)
    np.savez(tmp_path / "labelled.npz", images=pictures, labels=np.arange(40) % 2)
    labelled = d2v.data.open.open_labelled(str(tmp_path / "labelled.npz"), tiny("image"))  # type: ignore[attr-defined]
    assert features_of(model, labelled.splits["test"])[0].shape == (8, 16)
    with pytest.raises(ValueError, match="weights must be student: objective mae"):
        features_of(model, labelled.splits["test"], weights="teacher")
    arguments = [
        "finetune",
        str(tmp_path / "run"),
        "--task",
        "classify",
        "--train.steps",
        "2",
        "--data.batch",
        "8",
    ]
    assert main([*arguments, "--data", str(tmp_path / "labelled.npz"), "--out", str(tmp_path / "tuned")]) == 0
    tuned = d2v.load(tmp_path / "tuned")
    assert isinstance(tuned, FineTuned)

    run_convert(tmp_path / "run", tmp_path / "folder", "safetensors")
    back = d2v.load(tmp_path / "folder")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))
    with pytest.raises(ValueError, match="the original is for data2vec2, got objective mae"):
        run_convert(tmp_path / "run", tmp_path / "x.pt", "original")


def test_train_takes_the_objective(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data("image", tmp_path / "data")
    arguments = ["--data", data, "--train.steps", "2", "--data.batch", "4", "--out", str(tmp_path / "run")]
    assert main(["train", "image_tiny", "--objective", "mae", "--model.mae.depth", "1", *arguments]) == 0
    model = d2v.load(tmp_path / "run")
    assert isinstance(model, MaskedAutoencoder) and len(model.decoder_blocks) == 1
    assert model.cfg.mask.prob == 0.75
    assert main(["train", "--resume", str(tmp_path / "run"), "--objective", "mae"]) == 2
    assert "a run keeps its objective" in capsys.readouterr().err
    assert (
        main(["train", "text_tiny", "--objective", "mae", "--data", "text", "--out", str(tmp_path / "x")])
        == 2
    )
    assert "model.objective must be another" in capsys.readouterr().err
