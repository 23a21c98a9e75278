"""Data2Vec as its users meet it: masks, batches, precision, dropout, teacher, state dict, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2v.config.model import ModelConfig
from d2v.config.presets import preset
from d2v.model import Data2Vec
from d2vkern import MaskPlan
from d2vkern.testing import assert_bitwise_equal
from tests.d2v.tiny_models import TOKENS, make_model, make_source
from tests.d2v.tiny_runs import tiny

MODALITIES = ("image", "audio", "text")
modalities = pytest.mark.parametrize("modality", MODALITIES)


def make_noiseless(modality: str, **changed: Any) -> Data2Vec:
    """Without the decoder's noise at masked places, which no two passes share."""
    cfg = tiny(modality).model
    decoder = dataclasses.replace(cfg.decoder, noise_std=0.0)
    return make_model(modality, decoder=decoder, **changed)


@modalities
def test_a_pretraining_forward(modality: str) -> None:
    model, source = make_model(modality), make_source(modality)
    out = model(source, ids=torch.arange(4))
    n, t = 4 * model.cfg.mask.clones, TOKENS[modality]
    masked = int(out.plan.mask.sum())
    extra = model.cfg.front.extra_tokens
    assert out.plan.mask.shape == (n, t) and out.student.shape == (n, extra + out.plan.kept, 16)
    assert out.targets.shape == (4, t, 16) and out.decoded.shape == (n, t, 16)
    assert out.sample_size.item() == masked and out.sample_size.dtype == torch.int64
    assert out.loss.item() == pytest.approx(out.loss_sum.item() / masked)
    assert out.loss_sum.item() == pytest.approx(sum(value.item() for value in out.losses.values()))
    assert set(out.losses) == {f"{modality.upper()}_regression"} | ({"cls"} if modality == "image" else set())
    assert set(out.metrics) == {"pred_var", "target_var"}
    assert {name: rows.shape[1] for name, rows in out.health.items()} == {
        "front": 16,
        "prediction": 16,
        "target": 16,
    }
    assert not any(value.requires_grad for value in (*out.losses.values(), *out.health.values()))
    out.loss.backward()
    untrained = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert untrained == set()
    assert all(p.grad is None for p in model.teacher.parameters())


@modalities
def test_decoded_holds_the_predictions_the_loss_saw(modality: str) -> None:
    model = make_model(modality)
    out = model(make_source(modality), ids=torch.arange(4))
    predicted = out.decoded[out.plan.mask]
    goal = out.targets.repeat_interleave(model.cfg.mask.clones, 0)[out.plan.mask]
    scale = 1.0 if modality == "text" else 16**-0.5
    expected = (predicted - goal).square().sum().item() * scale
    assert out.losses[f"{modality.upper()}_regression"].item() == pytest.approx(expected, rel=1e-5)
    assert out.decoded is out.decoded, "decoding happens once"


@modalities
def test_masks_depend_on_seed_epoch_and_id_alone(modality: str) -> None:
    model, source = make_model(modality), make_source(modality)
    ids = torch.tensor([7, 2**40, 0, 3])
    plan = model.sample_masks(source, ids, epoch=2, seed=5)
    clones = plan.clones
    for i in range(4):
        alone = model.sample_masks(source[i : i + 1], ids[i : i + 1], epoch=2, seed=5)
        assert torch.equal(alone.mask, plan.mask[i * clones : (i + 1) * clones])
    flipped = model.sample_masks(source.flip(0), ids.flip(0), epoch=2, seed=5)
    assert torch.equal(flipped.mask.view(4, clones, -1).flip(0).flatten(0, 1), plan.mask)
    assert torch.equal(model(source, ids=ids, epoch=2, seed=5).plan.mask, plan.mask)
    for other in ({"epoch": 3, "seed": 5}, {"epoch": 2, "seed": 6}):
        assert not torch.equal(model.sample_masks(source, ids, **other).mask, plan.mask)


@modalities
def test_masks_without_ids_follow_torchs_generator(modality: str) -> None:
    model, source = make_model(modality), make_source(modality)
    torch.manual_seed(3)
    first, second = model(source).plan.mask, model(source).plan.mask
    torch.manual_seed(3)
    assert torch.equal(model(source).plan.mask, first)
    assert not torch.equal(first, second)


@modalities
def test_micro_batches_sum_to_the_batch(modality: str) -> None:
    """cls_rows scales the CLS loss to a fixed row count, so it does not grow with the micro-batch."""
    model, source, ids = make_noiseless(modality), make_source(modality), torch.arange(4)
    whole = model(source, ids=ids)
    whole.loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    parts = [model(source[i : i + 1], ids=ids[i : i + 1]) for i in range(4)]
    total = sum(part.loss_sum for part in parts)
    assert sum(part.sample_size.item() for part in parts) == whole.sample_size.item()
    assert total.item() == pytest.approx(whole.loss_sum.item(), rel=1e-5)
    (total / whole.sample_size).backward()
    for p, grad in zip((p for p in model.parameters() if p.grad is not None), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()) + 1e-7)


def test_the_originals_cls_loss_grows_with_the_batch() -> None:
    source, ids = make_source("image"), torch.arange(4)
    model = make_noiseless("image", cls_rows=None)
    per_sample = []
    for batch in (2, 4):
        out = model(source[:batch], ids=ids[:batch])
        per_sample.append(out.losses["cls"] / out.sample_size / batch)
    assert per_sample[0].item() == pytest.approx(per_sample[1].item(), rel=0.2)


@modalities
def test_bf16_is_close_to_fp32(modality: str) -> None:
    model, source = make_noiseless(modality), make_source(modality)
    exact = model(source, ids=torch.arange(4))
    model.compute_dtype = torch.bfloat16
    out = model(source, ids=torch.arange(4))
    assert out.student.dtype == out.decoded.dtype == torch.bfloat16
    assert out.loss.dtype == out.targets.dtype == torch.float32
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
    error = (out.student.float() - exact.student).norm() / exact.student.norm()
    assert 1e-4 < error < 0.03
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


@modalities
def test_repeats_bitwise(modality: str) -> None:
    runs = []
    for _ in range(2):
        model = make_model(modality, encoder_dropout=0.1, attention_dropout=0.1)
        out = model(make_source(modality), ids=torch.arange(4))
        out.loss.backward()
        runs.append([out.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for first, second in zip(*runs, strict=True):
        assert_bitwise_equal(first, second)


DROPOUTS = (
    "prenet_dropout",
    "encoder_dropout",
    "attention_dropout",
    "activation_dropout",
    "post_mlp_dropout",
)


@pytest.mark.parametrize("name", [*DROPOUTS, "layerdrop"])
def test_dropout_acts_in_training_only(name: str) -> None:
    model, source = make_noiseless("audio", **{name: 0.5}), make_source("audio")
    plan = model.sample_masks(source, torch.arange(4))
    students = [model(source, mask=plan).student for _ in range(4)]
    assert not all(torch.equal(student, students[0]) for student in students)
    features = [model.features(source, teacher=True).x for _ in range(2)]
    assert torch.equal(*features), "the teacher never drops"
    model.eval()
    assert_bitwise_equal(model(source, mask=plan).student, model(source, mask=plan).student)
    undropped = make_noiseless("audio")
    undropped.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(source, mask=plan).student, undropped(source, mask=plan).student)


@pytest.mark.parametrize(
    ("modality", "depth", "drops"),
    [("image", 0, True), ("audio", 0, True), ("text", 0, False), ("text", 1, True)],
)
def test_prenet_dropout_needs_no_prenet_but_of_text(modality: str, depth: int, drops: bool) -> None:
    """modalities/{images,audio,text}.py: text without blocks gives its context encoder neither norm nor
    dropout."""
    model = make_noiseless(modality, prenet_dropout=0.5, prenet_depth=depth)
    assert (model.encoder.context_encoder.norm is not None) == drops
    source = make_source(modality)
    plan = model.sample_masks(source, torch.arange(4))
    first, second = (model(source, mask=plan).student for _ in range(2))
    assert torch.equal(first, second) != drops


def test_layerdrop_skips_blocks() -> None:
    model, source = make_noiseless("audio", layerdrop=0.999), make_source("audio")
    plan = model.sample_masks(source, torch.arange(4))
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(source, mask=plan)
    assert seen == []
    model.eval()(source, mask=plan)
    assert len(seen) == 1


@modalities
def test_teacher_stays_frozen_and_in_eval_mode(modality: str) -> None:
    model = make_model(modality)
    for mode in (True, False):
        model.train(mode)
        assert model.training == mode and model.blocks[0].training == mode
        assert not any(module.training for module in model.teacher.modules())
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert all(p.dtype == torch.float32 for p in model.teacher.parameters())


@modalities
def test_teacher_follows_the_student(modality: str) -> None:
    model = make_model(modality)
    teacher, student = model.teacher_pairs()
    assert len(teacher) == len(list(model.teacher.parameters()))
    assert all(
        torch.equal(t, s) and t.data_ptr() != s.data_ptr() for t, s in zip(teacher, student, strict=True)
    )
    before = [t.clone() for t in teacher]
    with torch.no_grad():
        for p in student:
            p.add_(1.0)
    model.update_teacher(0.75)
    for t, s, old in zip(teacher, student, before, strict=True):
        torch.testing.assert_close(t, s if not s.requires_grad else old + 0.25, rtol=1e-6, atol=1e-6)
    model.reset_teacher()
    assert all(torch.equal(t, s) for t, s in zip(teacher, student, strict=True))


@modalities
def test_features(modality: str) -> None:
    model, source = make_model(modality).eval(), make_source(modality)
    features = model.features(source)
    extra = model.cfg.front.extra_tokens
    assert features.x.shape == (4, TOKENS[modality], 16) and features.padding_mask is None
    assert [layer.shape for layer in features.layers] == [(4, TOKENS[modality] + extra, 16)] * 2
    torch.testing.assert_close(model.features(source, teacher=True).x, features.x)
    alone = model.features(source[2:3])
    torch.testing.assert_close(alone.x[0], features.x[2], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for t in model.teacher.parameters():
            t.mul_(0.5)
    assert not torch.allclose(model.features(source, teacher=True).x, features.x)
    torch.testing.assert_close(model.features(source).x, features.x)


@modalities
def test_nothing_masked_is_what_features_sees(modality: str) -> None:
    model, source = make_model(modality).eval(), make_source(modality)
    plan = MaskPlan.from_mask(torch.zeros(4, TOKENS[modality], dtype=torch.bool), 1)
    out = model(source, mask=plan)
    student = out.student[:, model.cfg.front.extra_tokens :]
    torch.testing.assert_close(student, model.features(source).x, rtol=1e-4, atol=1e-5)
    assert out.sample_size.item() == 0


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_what_stands_in_the_padding_does_not_matter(modality: str) -> None:
    model, source = make_model(modality).eval(), make_source(modality)
    samples = source.shape[1]
    lengths = torch.tensor([samples, samples * 3 // 4, samples, samples // 2])
    padding = torch.arange(samples) >= lengths[:, None]
    pad, garbage = (1, 5) if modality == "text" else (0.0, 5.0)
    features = model.features(source.masked_fill(padding, pad), padding)
    tokens = [n if modality == "text" else model.cfg.front.frames(n) for n in lengths.tolist()]
    expected = torch.arange(features.x.shape[1]) >= torch.tensor(tokens)[:, None]
    assert torch.equal(features.padding_mask, expected)
    other = model.features(source.masked_fill(padding, garbage), padding)
    torch.testing.assert_close(other.x[~expected], features.x[~expected], rtol=1e-4, atol=1e-5)
    if (
        modality == "text"
    ):  # the convolutional positions of speech see where the padding begins, as in the original
        for row in (1, 3):
            alone = model.features(source[row : row + 1, : tokens[row]])
            torch.testing.assert_close(features.x[row, : tokens[row]], alone.x[0], rtol=1e-4, atol=1e-5)
    out = model(source.masked_fill(padding, pad), padding, ids=torch.arange(4))
    assert out.loss.isfinite() and out.plan.mask.sum() == out.sample_size, "padding may be masked"


PUBLISHED = ("image_base", "audio_base", "text_base", "image_large", "audio_large", "text_large")


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dict_of_published_models(name: str, goldens: Path) -> None:
    recorded = json.loads((goldens / "state_dict_keys.json").read_text())[name]
    with torch.device("meta"):
        model = Data2Vec(preset(name).model)
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    teacher = {f"_ema.{key}": shape for key, shape in recorded["ema"].items()}
    assert shapes == {**recorded["student"], **teacher}
    frozen = [
        key for key, p in model.named_parameters() if not p.requires_grad and not key.startswith("_ema.")
    ]
    assert frozen == recorded["requires_grad_false"]


@modalities
def test_initial_weights(modality: str) -> None:
    torch.manual_seed(0)
    cfg = tiny(modality, model={"dim": 128, "init_std": 0.03}).model
    model = Data2Vec(cfg)
    block = model.blocks[0]
    for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        assert layer.weight.std().item() == pytest.approx(0.03, rel=0.05)
        assert (layer.bias == 0).all()
    proj = model.encoder.decoder.proj
    if modality == "text":
        assert proj[2].weight.std().item() == pytest.approx(0.03, rel=0.05)
    else:
        assert proj.weight.std().item() == pytest.approx((3 * proj.in_features) ** -0.5, rel=0.1)
    assert len({tuple(b.attn.qkv.weight[0, :4].tolist()) for b in model.blocks}) == 2, "blocks differ"


def test_unequal_kept_counts_are_refused() -> None:
    mask = torch.zeros(8, 36, dtype=torch.bool)
    mask[:, :20] = True
    mask[5, 20] = True
    with pytest.raises(ValueError, match="row 5 keeps 15 tokens, row 0 keeps 16"):
        make_model("image")(make_source("image"), mask=mask)


@pytest.mark.parametrize("depth", [1, 2])
def test_more_layers_than_blocks_are_refused(depth: int) -> None:
    cfg = tiny("image").model
    with pytest.raises(ValueError, match=f"target.top_k must be at most depth {depth}, got 3"):
        ModelConfig(front=cfg.front, depth=depth, target=dataclasses.replace(cfg.target, top_k=3))
