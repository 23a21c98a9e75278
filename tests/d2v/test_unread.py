"""Settings that a command does not read are refused by name, and nothing else is."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from d2v.cli.main import main
from d2v.config.model import Objective
from d2v.config.objectives import for_objective
from d2v.config.presets import PRESETS, preset
from d2v.config.recipes import RECIPES, recipe
from d2v.config.run import Config, DataConfig, OptimConfig, ProbeConfig
from d2v.config.tune import FineTuneConfig
from d2v.config.unread import (
    OF_MODALITY,
    OF_SCHEDULE,
    Unread,
    unread_in_finetuning,
    unread_in_pretraining,
    unread_in_profile,
    unread_in_race,
)
from d2v.evaluate.scores import run_eval
from d2v.tools.profile import run_profile
from d2v.tools.race import run_race
from tests.d2v.test_online_probe import stripes
from tests.d2v.tiny_runs import make_data, run, run_finetune, tiny
from tests.d2v.tiny_tuning import config


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("train image_tiny --data.max-seconds 3", "for pictures: speech alone read it"),
        ("train audio_tiny --data.block 3", "for speech: text alone read it"),
        ("train text_tiny --data.crop-scale 0.5 1.0", "for text: pictures alone read it"),
        ("train image_tiny --objective mae --ema.decay 0.5", "for objective mae, which has no teacher"),
        (
            "train image_tiny --objective mae --model.target.top-k 1",
            "for objective mae, which has no teacher",
        ),
        ("train image_tiny --objective mae --model.decoder.layers 1", "for objective mae"),
        ("train image_tiny --model.mae.depth 1", "for objective data2vec2"),
        ("train image_tiny --probe.rows 10", "with --probe.every 0"),
        ("race image_tiny --train.save-every 7", "in a race"),
        ("race image_tiny --probe.every 7", "in a race"),
        ("race image_tiny --probe.layers 1", "in a race"),
        ("race image_tiny --train.seed 7", "in a race"),
        ("race text_tiny --data.pad", "for text: speech alone read it"),
        ("race text_tiny --optim.power 2", "with --optim.schedule cosine"),
        ("race image_tiny --search-minutes 1 --lr-scales 2", "with one of --lr-scales: nothing is searched"),
        ("train image_tiny --profile-steps 3:4", "without --profile"),
        ("train image_tiny --optim.min-lr 1e-5 --optim.schedule constant", "with --optim.schedule constant"),
        ("train text_tiny --model.mask.length 2", "for random masks"),
        ("profile image_tiny --train.keep 7", "in a profile"),
        ("profile image_tiny --data.batch 3 --batch 2", "with --batch"),
        ("profile image_tiny --train.backend eager --backend eager", "with --backend"),
        ("profile image_tiny --train.precision bf16 --precision bf16", "with --precision"),
        ("profile audio_tiny --model.mae.depth 1", "for objective data2vec2"),
    ],
)
def test_what_a_command_does_not_read_is_refused(
    arguments: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments.split()
    flag = next(word for word in words if word.startswith("--") and word != "--objective")
    assert main([*words, "--data", "digits", "--out", str(tmp_path / "r")]) == 2
    assert capsys.readouterr().err == f"d2v {words[0]}: {flag} has no effect {reason}\n"
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("modality", "arguments", "reason"),
    [
        ("image", "classify --span.time-prob 0.5", "for task classify"),
        ("image", "classify --vocabulary dict.txt", "for task classify"),
        ("image", "classify --data.min-seconds 0.1", "for pictures: speech alone read it"),
        ("text", "sentence --span.channel-length 3", "for task sentence"),
        ("text", "sentence --augment.mixup 0.5", "for text"),
        ("text", "sentence --data.tokenizer x.json", "for fine-tuning, which takes the encoder's"),
        ("audio", "ctc --augment.rand-ops 1", "for speech"),
        ("audio", "ctc --augment.label-smoothing 0.1", "for task ctc"),
        ("audio", "classify --augment.cutmix 0.1", "for speech"),
        ("audio", "classify --span.time-length 2", "for task classify"),
        ("audio", "ctc --span.time-length 2 --span.time-prob 0", "with --span.time-prob 0"),
        ("image", "classify --drop.head 0.1", "for task classify"),
        ("image", "classify --augment.rand-magnitude 3", "with --augment.rand-ops 0"),
        ("image", "classify --augment.mix-batch 3", "without --augment.mixup and --augment.cutmix"),
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
    assert capsys.readouterr().err == f"d2v finetune: {rest[0]} has no effect {reason}\n"
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("eval r --lm-weight 3", "d2v eval: --lm-weight has no effect without --lm"),
        ("eval r --word-bonus 3 --beam 5", "d2v eval: --word-bonus has no effect without --lm"),
        (
            "check --data x --preset image_tiny --modality text",
            "d2v check: --modality has no effect with --preset",
        ),
        ("profile image_tiny --data.flip", "d2v profile: --data.flip has no effect without --data"),
        (
            "profile text_tiny --data.batch 3 --data.workers 2",
            "d2v profile: --data.workers has no effect without --data",
        ),
    ],
)
def test_options_that_others_make_idle_are_refused(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 2
    assert capsys.readouterr().err == f"{message}\n"


def test_every_field_of_data_is_read_by_all_or_by_those_named() -> None:
    shared = {"batch", "workers", "prefetch", "max_unreadable", "shuffle_window"}
    named = {field for fields in OF_MODALITY.values() for field in fields}
    assert not named & shared
    assert {f.name for f in dataclasses.fields(DataConfig)} == {*named, *shared}


def settings_of(cfg: Any, section: str = "") -> set[str]:
    """The names of all settings, of sections in sections too."""
    found: set[str] = set()
    for f in dataclasses.fields(cfg):
        value, name = getattr(cfg, f.name), f"{section}{f.name}"
        found |= settings_of(value, f"{name}.") if dataclasses.is_dataclass(value) else {name}
    return found


def named_in(unread: Unread, known: set[str]) -> set[str]:
    return {name for name in known if any(n == name or n[-1] == "." and name.startswith(n) for n in unread)}


def test_what_is_named_exists() -> None:
    """In the settings of every preset and recipe: a renamed field would be read again unnoticed."""
    tables: list[tuple[Unread, Any]] = []
    for cfg in map(preset, PRESETS):
        profiles = [unread_in_profile(cfg, on_data=given) for given in (True, False)]
        tables += [(table, cfg) for table in (unread_in_pretraining(cfg), unread_in_race(cfg), *profiles)]
    for name in RECIPES:
        base = recipe(name)
        modality = {"sentence": "text_tiny", "ctc": "audio_tiny"}.get(base.head.task, "image_tiny")
        tuned = base.on(name, preset(modality).model)
        tables += [(unread_in_finetuning(tuned, ours=ours), tuned) for ours in (True, False)]
    for table, cfg in tables:
        for unread in table:
            assert named_in({unread: ""}, settings_of(cfg)), unread


COPIES = ("dataclasses.py", "toml.py", "unread.py")
"""files that read every setting to copy, write or compare a config"""
CHECKS = ("__post_init__", "check_sizes", "tuned_model_config", "with_drops")
LOOKED_AT = {
    "ema.decay", "ema.end_decay", "ema.anneal", "model.decoder.projection_ratio", "data.wave_norm",
    "data.pad", "augment.mix_batch", "train.seed",
}  # fmt: skip
"""read where it changes nothing: multiplied by nothing, never used, or replaced first"""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Fills with the names of all settings that are read from now on, checks and copies left out."""
    seen: set[str] = set()
    watched: set[type] = set()

    def watch(cls: type, section: str) -> None:
        names, hints = {f.name for f in dataclasses.fields(cls)}, get_type_hints(cls)

        def read(self: object, name: str) -> Any:
            code = sys._getframe(1).f_code
            if name in names and code.co_name not in CHECKS and not code.co_filename.endswith(COPIES):
                seen.add(section + name)
            return object.__getattribute__(self, name)

        watched.add(cls)
        monkeypatch.setattr(cls, "__getattribute__", read)
        for name in names:
            for kind in {hints[name], *get_args(hints[name])} - watched:
                if dataclasses.is_dataclass(kind):
                    watch(kind, f"{section}{name}.")

    watch(Config, "")
    watch(FineTuneConfig, "")
    return seen


def assert_known(cfg: Config | FineTuneConfig, reads: set[str], unread: Unread, flags: set[str]) -> None:
    """What was never read of the sections that have flags is what the table names, and `LOOKED_AT`."""
    read = reads | {"model.cls_loss", "head.regression"}  # which configs refuse where they are not read
    known = {name for name in settings_of(cfg) if name.partition(".")[0] in flags}
    named = named_in(unread, known)
    assert known - read == named - read
    assert named & read <= LOOKED_AT


@pytest.mark.parametrize(
    ("modality", "objective", "schedule"),
    [
        ("image", "data2vec2", "cosine"),
        ("image", "data2vec1", "tri_stage"),
        ("image", "mae", "polynomial"),
        ("audio", "data2vec2", "polynomial"),
        ("audio", "mae", "constant"),
        ("text", "data2vec2", "constant"),
        ("text", "data2vec1", "tri_stage"),
        ("text", "mlm", "cosine"),
    ],
)
def test_training_reads_what_is_not_refused(
    modality: str, objective: Objective, schedule: Any, reads: set[str], tmp_path: Path, no_plots: None
) -> None:
    cfg = for_objective(tiny(modality, steps=2, train={"alarm_after": 1}), objective)
    optim = dataclasses.replace(cfg.optim, schedule=schedule, warmup=0)
    cfg = dataclasses.replace(cfg, optim=optim, data=dataclasses.replace(cfg.data, batch=4))
    data = make_data(modality, tmp_path / "data")
    reads.clear()
    run(cfg, data, tmp_path / "run")
    assert_known(cfg, reads, unread_in_pretraining(cfg), {"model", "optim", "ema", "data", "train", "probe"})


def test_a_race_reads_what_is_not_refused(
    reads: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = dataclasses.replace(tiny("image", steps=2, batch=4), probe=ProbeConfig(rows=20))
    data = stripes(tmp_path)
    monkeypatch.setattr("d2v.tools.race_report.plot_race", lambda race, path: path)
    monkeypatch.setattr("d2v.tools.race._peak", lambda *contestant: 1)
    reads.clear()
    run_race(
        cfg, data, tmp_path / "race", objectives=("data2vec2",), minutes=1e-4, seeds=1, lr_scales=(1.0,),
        evaluations=1,
    )  # fmt: skip
    assert_known(cfg, reads, unread_in_race(cfg), {"optim", "data", "train", "probe"})


@pytest.mark.parametrize(("modality", "on_data"), [("image", True), ("audio", False), ("text", False)])
def test_a_profile_reads_what_is_not_refused(
    modality: str, on_data: bool, reads: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2v.tools.roofline.plot_profile", lambda profile, out: [])
    cfg, data = tiny(modality, steps=2), make_data(modality, tmp_path / "data") if on_data else None
    reads.clear()
    run_profile(cfg, tmp_path / "profile", data=data, steps=1, quick=True)
    unread = unread_in_profile(cfg, on_data=on_data)
    assert_known(cfg, reads, unread, {"model", "optim", "ema", "data", "train"})


@pytest.mark.parametrize(
    ("modality", "changed"),
    [
        ("image", {"mixup": 0.3, "cutmix": 0.2, "rand_ops": 1}),
        ("image", {"mixup": 0.0, "rand_ops": 0}),
        ("audio", {}),
        ("text", {}),
    ],
)
def test_finetuning_reads_what_is_not_refused(
    modality: str,
    changed: dict[str, Any],
    encoders: dict[str, Path],
    data: dict[str, str],
    reads: set[str],
    tmp_path: Path,
    no_plots: None,
) -> None:
    cfg = config(encoders[modality], modality, steps=2, evaluate_every=2)
    cfg = dataclasses.replace(cfg, augment=dataclasses.replace(cfg.augment, **changed))
    reads.clear()
    run_finetune(cfg, encoders[modality], data[modality], tmp_path / "run")
    if cfg.head.task != "ctc":
        with pytest.raises(ValueError, match=f"--beam is for task ctc, .* is for {cfg.head.task}"):
            run_eval(tmp_path / "run", beam=2)
    # dropouts are read as the encoder's
    reads |= {f"drop.{name}" for name in ("dropout", "attention", "activation", "layer")}
    sections = {f.name for f in dataclasses.fields(cfg)} - {"model", "recipe", "transformers"}
    assert_known(cfg, reads, unread_in_finetuning(cfg), sections)


def test_schedules_are_known() -> None:
    assert set(OF_SCHEDULE) == set(get_args(get_type_hints(OptimConfig)["schedule"]))
