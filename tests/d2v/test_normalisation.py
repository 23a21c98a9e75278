"""One value says how pictures were normalised, from pretraining through every conversion to every reader."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import d2v
from d2v.config import Config, ProbeConfig
from d2v.convert import run_convert
from d2v.extract import open_model, run_extract
from d2v.finetune.evaluate import run_eval
from d2v.finetune.recipes import recipe
from d2v.finetune.run import resume_finetune, run_finetune
from d2v.model.encoder import ModalityEncoder
from d2v.normalisation import Normalisation, recorded
from d2v.probe import run_probe
from d2v.race import run_race
from d2v.train import run
from tests.d2v.tiny_runs import tiny

TRAIN, OTHER = (7, 31, 81), (53, 211)
"""brightness of the pictures of two data sets; every picture is of one brightness, so crops are too"""
MEASURED = Normalisation((float(np.mean(TRAIN)) / 255,), (float(np.std(TRAIN)) / 255,), "measured")
GIVEN = Normalisation((0.31, 0.62, 0.155), (0.2, 0.3, 0.11), "given")


def pictures(file: Path, levels: tuple[int, ...], channels: int, count: int = 24) -> str:
    """Labelled pictures of two classes, each of one of the levels in every channel."""
    level = np.resize(levels, count).astype(np.uint8)
    images = np.broadcast_to(level[:, None, None, None], (count, 24, 24, channels))
    np.savez(file, images=images, labels=np.arange(count) % 2)
    return str(file)


class Spy:
    """Looks at every picture that reaches a model of ours, wherever it is computed."""

    def __init__(self, patch: pytest.MonkeyPatch, levels: tuple[int, ...]) -> None:
        self.seen, self.levels = 0, torch.tensor(levels)
        local = ModalityEncoder.local

        def look(encoder: ModalityEncoder, source: Tensor, *rest: Any) -> Tensor:
            self.take(source)
            return local(encoder, source, *rest)

        patch.setattr(ModalityEncoder, "local", look)

    def take(self, source: Tensor) -> None:
        """Undone with the one value, the pixels must be those of a data set."""
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.value.mean, self.value.std))
        pixels = 255 * (source * std + mean)
        assert (pixels[..., None] - self.levels).abs().amin(-1).max() < 0.05
        self.seen += 1

    def watch(self, value: Normalisation) -> Spy:
        self.value = value
        return self

    def looked(self) -> bool:
        """Whether there was a picture since this was last asked."""
        seen, self.seen = self.seen, 0
        return seen > 0


def config(channels: int, **sections: Any) -> Config:
    cfg = tiny("image", steps=2, batch=4, **sections)
    front = dataclasses.replace(cfg.model.front, channels=channels)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, front=front, cls_rows=None))


def tune(encoder: Path, data: str, out: Path, **data_settings: Any) -> Path:
    """A run of one step, stopped before its end (which would draw plots)."""
    opened = open_model(encoder)
    cfg = recipe("image_tiny").on("image_tiny", opened[0].cfg)
    plain = dataclasses.replace(cfg.augment, rand_ops=0, erase=0.0, mixup=0.0, cutmix=0.0)
    train = dataclasses.replace(cfg.train, steps=2, evaluate_every=1, device="cpu")
    changed = dataclasses.replace(cfg.data, batch=4, **data_settings)
    cfg = dataclasses.replace(cfg, augment=plain, train=train, data=changed)
    run_finetune(cfg, encoder, data, out, opened=opened, stop=lambda step: step == 1)
    return out


def one_step(step: int) -> bool:
    return step == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_one_value_goes_through_everything(
    channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Grey pictures: measured. Colour: given."""
    data = pictures(tmp_path / "train.npz", TRAIN, channels)
    other = pictures(tmp_path / "other.npz", OTHER, channels)
    if channels == 3:
        value, wish = GIVEN, {"mean": GIVEN.mean, "std": GIVEN.std}
    else:
        value, wish = MEASURED, {}
    spy = Spy(monkeypatch, TRAIN + OTHER).watch(value)
    cfg = dataclasses.replace(config(channels, data=wish), probe=ProbeConfig(every=1, data=other, rows=8))

    source = tmp_path / "run"  # with the online probe, on other pictures
    run(cfg, data, source, stop=one_step)
    front = d2v.load(source).cfg.front
    kept = recorded(source, front)
    assert spy.looked() and kept is not None and kept.origin == value.origin
    np.testing.assert_allclose(kept.mean + kept.std, value.mean + value.std, rtol=1e-12)
    value = kept
    pictures(tmp_path / "train.npz", (101, 102), channels)  # not measured again when it goes on
    spy.levels = torch.tensor(TRAIN + OTHER + (101, 102))
    run(cfg, data, source, resume=True, stop=lambda step: step == 2)
    assert spy.looked() and recorded(source, front) == value
    pictures(tmp_path / "train.npz", TRAIN, channels)

    stations = [source]
    for target in ("safetensors", "hf", "original", "hf", "safetensors"):
        stations.append(tmp_path / f"{len(stations)}-{target}")
        run_convert(stations[-2], stations[-1], target)  # type: ignore[arg-type]
    for place in [*stations, source / "checkpoints" / "step_2"]:
        if place.parent.name != "checkpoints":
            found = recorded(place, front)
            assert value.same_as(found) and found is not None
            assert found.origin in (value.origin, "preprocessor")
        run_extract(place, other, tmp_path / "features.npz")
        assert spy.looked(), place
    run_probe(stations[-1], other, kinds=("knn",))
    assert spy.looked()

    for number, place in enumerate([source, stations[1], stations[2], stations[3]]):
        tuned = tune(place, other, tmp_path / f"tuned{number}")
        assert spy.looked() and recorded(tuned, front) == dataclasses.replace(value, origin="encoder")
    resume_finetune(tuned, stop=lambda step: step == 2)
    run_eval(tuned, data)
    assert spy.looked()
    for target in ("safetensors", "hf", "original"):
        run_convert(tuned, tmp_path / f"tuned-{target}", target)  # type: ignore[arg-type]
        assert value.same_as(recorded(tmp_path / f"tuned-{target}", front))

    monkeypatch.setattr("d2v.race_report.plot_race", lambda *_: None)
    found = run_race(
        cfg, data, tmp_path / "race", objectives=("data2vec2",), minutes=1e-4, seeds=1, lr_scales=(1.0,),
        evaluations=1,
    )  # fmt: skip
    assert spy.looked() and found["normalisation"] == value.record
    assert "the original does not" in capsys.readouterr().out
