"""Settings that a command does not read are refused by name, and nothing else is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from d2v.cli.main import main
from d2v.config.presets import PRESETS, preset
from d2v.config.recipes import RECIPES, recipe
from d2v.config.run import DataConfig
from d2v.config.toml import flatten, to_dict
from d2v.config.unread import OF_MODALITY, unread_in_finetuning, unread_in_pretraining, unread_in_race


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("train image_tiny --data.max-seconds 3", "pictures: speech alone read it"),
        ("train audio_tiny --data.block 3", "speech: text alone read it"),
        ("train text_tiny --data.crop-scale 0.5 1.0", "text: pictures alone read it"),
        ("train image_tiny --objective mae --ema.decay 0.5", "objective mae, which has no teacher"),
        ("train image_tiny --objective mae --model.target.top-k 1", "objective mae, which has no teacher"),
        ("train image_tiny --objective mae --model.decoder.layers 1", "objective mae"),
        ("train image_tiny --model.mae.depth 1", "objective data2vec2"),
        ("train image_tiny --probe.rows 10", "--probe.every 0"),
        ("race image_tiny --train.save-every 7", "a race"),
        ("race image_tiny --probe.every 7", "a race"),
        ("race image_tiny --probe.layers 1", "a race"),
        ("race text_tiny --data.pad", "text: speech alone read it"),
    ],
)
def test_what_a_command_does_not_read_is_refused(
    arguments: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments.split()
    flag = next(word for word in words if word.startswith("--") and word != "--objective")
    assert main([*words, "--data", "digits", "--out", str(tmp_path / "r")]) == 2
    assert capsys.readouterr().err == f"d2v {words[0]}: {flag} has no effect for {reason}\n"
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("modality", "arguments", "reason"),
    [
        ("image", "classify --span.time-prob 0.5", "task classify"),
        ("image", "classify --vocabulary dict.txt", "task classify"),
        ("image", "classify --data.min-seconds 0.1", "pictures: speech alone read it"),
        ("text", "sentence --span.channel-length 3", "task sentence"),
        ("text", "sentence --augment.mixup 0.5", "text"),
        ("text", "sentence --data.tokenizer x.json", "fine-tuning, which takes the encoder's"),
        ("audio", "ctc --augment.rand-ops 1", "speech"),
        ("audio", "ctc --augment.label-smoothing 0.1", "task ctc"),
        ("audio", "classify --augment.cutmix 0.1", "speech"),
        ("audio", "classify --span.time-length 2", "task classify"),
    ],
)
def test_what_a_task_does_not_read_is_refused(
    modality: str,
    arguments: str,
    reason: str,
    encoders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task, *rest = arguments.split()
    out = tmp_path / "r"
    given = ["finetune", str(encoders[modality]), "--task", task, "--data", "nowhere", "--out", str(out)]
    assert main([*given, *rest]) == 2
    assert capsys.readouterr().err == f"d2v finetune: {rest[0]} has no effect for {reason}\n"
    assert not out.exists()


def test_every_field_of_data_is_read_by_all_or_by_one() -> None:
    shared = {"batch", "workers", "prefetch"}
    named = [field for fields in OF_MODALITY.values() for field in fields]
    assert len(named) == len(set(named))
    assert {f.name for f in dataclasses.fields(DataConfig)} == {*named, *shared}


def test_what_is_named_exists() -> None:
    """In the settings of every preset and recipe: a renamed field would be read again unnoticed."""
    for name in PRESETS:
        cfg = preset(name)
        known = {
            *flatten(to_dict(cfg)),
            *(f"data.{f.name}" for f in dataclasses.fields(DataConfig)),
            "probe.data",
        }
        for unread in (*unread_in_pretraining(cfg), *unread_in_race(cfg)):
            assert any(key == unread or (unread[-1] == "." and key.startswith(unread)) for key in known), (
                unread
            )
    optional = {"vocabulary", "glue", "augment.mix_batch"}
    for name in RECIPES:
        base = recipe(name)
        modality = {"sentence": "text_tiny", "ctc": "audio_tiny"}.get(base.head.task, "image_tiny")
        cfg = base.on(name, preset(modality).model)
        known = {
            *flatten(to_dict(cfg)),
            *(f"data.{f.name}" for f in dataclasses.fields(DataConfig)),
            *optional,
        }
        for unread in unread_in_finetuning(cfg):
            assert any(key == unread or (unread[-1] == "." and key.startswith(unread)) for key in known), (
                unread
            )
