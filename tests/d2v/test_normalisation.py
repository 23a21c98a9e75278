"""One value says how pictures were normalised, from pretraining through every conversion to every reader."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from torch import Tensor

import d2v
from d2v.config.fronts import ImageFront, WaveformFront
from d2v.config.recipes import recipe
from d2v.config.run import Config, ProbeConfig
from d2v.config.toml import CheckpointError, read_settings
from d2v.data.images.source import ImageSource
from d2v.data.normalisation import IMAGENET, Normalisation, of_preprocessor
from d2v.data.open import open_data
from d2v.data.types import DataError
from d2v.evaluate.features import run_extract
from d2v.evaluate.probe import run_probe
from d2v.evaluate.scores import run_eval
from d2v.formats.convert import run_convert, save_folder
from d2v.formats.open import open_encoder, open_model
from d2v.formats.recorded import recorded
from d2v.model.encoder import ModalityEncoder
from d2v.tools.race import run_race
from tests.d2v.tiny_runs import resume_finetune, run, run_finetune, tiny

TRAIN, OTHER = (7, 31, 81), (53, 211)
"""brightness of the pictures of two data sets; every picture is of one brightness, so crops are too"""
MEASURED = Normalisation((float(np.mean(TRAIN)) / 255,), (float(np.std(TRAIN)) / 255,), "measured")
GREY = ImageFront(channels=1)
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
    cfg = tiny("image", steps=3, batch=4, **sections)
    front = dataclasses.replace(cfg.model.front, channels=channels)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, front=front, cls_rows=None))


def tune(encoder: str | Path, data: str, out: Path, **data_settings: Any) -> Path:
    """A run of one step, stopped before its end (which would draw plots)."""
    opened = open_encoder(encoder)
    cfg = recipe("image_tiny").on("image_tiny", opened[0].cfg)
    plain = dataclasses.replace(cfg.augment, rand_ops=0, erase=0.0, mixup=0.0, cutmix=0.0)
    train = dataclasses.replace(cfg.train, steps=3, evaluate_every=1, device="cpu")
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

    monkeypatch.setattr("d2v.tools.race_report.plot_race", lambda *_: None)
    found = run_race(
        cfg, data, tmp_path / "race", objectives=("data2vec2",), minutes=1e-4, seeds=1, lr_scales=(1.0,),
        evaluations=1,
    )  # fmt: skip
    assert spy.looked() and found["normalisation"] == value.record
    assert "the original does not" in capsys.readouterr().out


@pytest.fixture(scope="module")
def grey_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of one step on grey pictures, and its data."""
    folder = tmp_path_factory.mktemp("grey")
    data = pictures(folder / "train.npz", TRAIN, 1)
    run(config(1), data, folder / "run", stop=one_step)
    return folder / "run", data


def copied(run_dir: Path, to: Path) -> Path:
    return Path(shutil.copytree(run_dir, to))


def forget(run_dir: Path) -> None:
    """Make it a run of a version that kept no record in config.toml."""
    settings = read_settings(run_dir)
    del settings["run"]["normalisation"]
    (run_dir / "config.toml").write_text(tomli_w.dumps(settings))


def test_older_runs_read_as_they_did(grey_run: tuple[Path, str], tmp_path: Path) -> None:
    source, _ = grey_run
    value = recorded(source, GREY)
    old = copied(source, tmp_path / "old")
    forget(old)
    assert recorded(old, GREY) == value  # from data.json
    (old / "data.json").unlink()
    assert recorded(old, GREY) is None and open_model(old)[1].data.mean is None
    run_convert(old, tmp_path / "folder", "safetensors")
    assert recorded(tmp_path / "folder", GREY) is None


def test_older_fine_tuned_runs_measure_on_their_own_pictures(
    grey_run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Where the encoder had no record: what they trained on, as long as it is there."""
    source, data = grey_run
    old = copied(source, tmp_path / "old")
    forget(old)
    (old / "data.json").unlink()
    own = pictures(tmp_path / "own.npz", OTHER, 1)
    tuned = tune(old, own, tmp_path / "tuned")
    value = recorded(tuned, GREY)
    assert value is not None and value.origin == "measured"
    assert 0.45 < value.mean[0] < 0.6, "four fifths of them"
    forget(tuned)
    (tuned / "data.json").unlink()  # older runs of fine-tuning have none
    spy = Spy(monkeypatch, TRAIN).watch(value)
    run_eval(tuned, data)
    assert spy.looked()
    Path(own).unlink()
    monkeypatch.undo()
    run_eval(tuned, data)
    assert "recorded nowhere, and its data are gone" in capsys.readouterr().out


def test_what_is_given_wins_and_is_said(grey_run: tuple[Path, str], tmp_path: Path, capsys: Any) -> None:
    source, data = grey_run
    tuned = tune(source, data, tmp_path / "a", mean=(0.25,), std=(0.5,))
    assert recorded(tuned, GREY) == Normalisation((0.25,), (0.5,), "given")
    said = capsys.readouterr().out
    assert f"as given, with mean 0.25, std 0.5; {source} was trained with mean 0.155556, std 0.12" in said
    value = recorded(source, GREY)
    assert value is not None
    tune(source, data, tmp_path / "b", mean=value.mean, std=value.std)
    assert "as given" not in capsys.readouterr().out


def test_files_of_the_original_have_imagenets(goldens: Path, tmp_path: Path) -> None:
    """Float pictures too, which would be measured in pretraining."""
    file = goldens / "ckpt_image_base.pt"
    model, cfg, _ = open_model(file)
    assert recorded(file, model.cfg.front) == IMAGENET
    assert (cfg.data.mean, cfg.data.std) == (IMAGENET.mean, IMAGENET.std)
    run_convert(file, tmp_path / "folder", "safetensors")
    assert recorded(tmp_path / "folder", model.cfg.front) == IMAGENET
    run_convert(file, tmp_path / "hf", "hf")
    assert IMAGENET.same_as(recorded(tmp_path / "hf", model.cfg.front))


@pytest.mark.parametrize(
    ("said", "mean", "std"),
    [
        ({"image_mean": [0.2], "image_std": [0.4]}, 0.2, 0.4),
        ({"image_mean": 0.2, "image_std": 0.4, "rescale_factor": 0.003921568627}, 0.2, 0.4),
        ({"image_mean": [0.2], "image_std": [0.4], "do_normalize": False}, 0.0, 1.0),
        ({"image_mean": [51.0], "image_std": [102.0], "do_rescale": False}, 0.2, 0.4),
        ({"image_mean": [0.4], "image_std": [0.8], "rescale_factor": 2 / 255}, 0.2, 0.4),
    ],
)
def test_preprocessors_of_transformers(said: dict[str, Any], mean: float, std: float, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    value = of_preprocessor(tmp_path, 1)
    assert value is not None and value.mean + value.std == pytest.approx((mean, std))


WRONG: list[tuple[list[float], list[float], str]] = [
    ([0.1, 0.2], [1.0], r"mean must have 1 values \(front.channels\), got "),
    ([0.1], [0.0], "std must be positive, got "),
    ([float("nan")], [1.0], "mean must be finite numbers, got "),
    ([0.1], [float("inf")], "std must be finite numbers, got "),
]


@pytest.mark.parametrize(("mean", "std", "words"), WRONG)
def test_wrong_numbers_are_named_before_anything_is_made(
    mean: list[float], std: list[float], words: str, grey_run: tuple[Path, str], tmp_path: Path
) -> None:
    source, data = grey_run
    wish = {"mean": tuple(mean), "std": tuple(std)}
    with pytest.raises(ValueError, match=rf"data: data\.{words}"):
        run(config(1, data=wish), data, tmp_path / "run")
    with pytest.raises(ValueError, match=rf"data: data\.{words}"):
        tune(source, data, tmp_path / "run", **wish)
    assert not (tmp_path / "run").exists()
    record = {"mean": mean, "std": std, "origin": "measured"}
    bad = copied(source, tmp_path / "bad")
    settings = read_settings(bad)
    settings["run"]["normalisation"] = record
    (bad / "config.toml").write_text(tomli_w.dumps(settings))
    with pytest.raises(CheckpointError, match=rf"bad/config.toml: run.normalisation.{words}"):
        open_model(bad)
    save_folder(d2v.load(source), tmp_path / "folder")
    file = tmp_path / "folder" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "normalisation": record}))
    with pytest.raises(CheckpointError, match=rf"folder/config.json: normalisation.{words}"):
        open_model(tmp_path / "folder")
    pt = {"d2v": {"normalisation": record}, "cfg": None, "model": {}}
    torch.save(pt, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=rf"a.pt: d2v.normalisation.{words}"):
        recorded(tmp_path / "a.pt", GREY)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    with pytest.raises(CheckpointError, match=rf"preprocessor_config.json: image_{words}"):
        of_preprocessor(tmp_path, 1)


def test_pictures_that_have_no_mean_are_refused(tmp_path: Path) -> None:
    images = np.zeros((4, 24, 24, 1), np.float32)
    images[2, 3, 3] = np.nan
    np.savez(tmp_path / "nan.npz", images=images)
    assert open_data(str(tmp_path / "nan.npz"), config(1)).meta["mean"] == [0.0]
    images[:, 3, 3] = np.nan
    np.savez(tmp_path / "nan.npz", images=images)
    with pytest.raises(DataError, match=r"nan.npz: none of 4 pictures can be read"):
        open_data(str(tmp_path / "nan.npz"), config(1))


def test_models_of_transformers_bring_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vit = transformers.ViTConfig(image_size=24, patch_size=12, num_channels=1, **small)
    transformers.ViTModel(vit).save_pretrained(tmp_path / "vit")
    said = {"image_mean": [0.31], "image_std": [0.2]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(said))
    spy = Spy(monkeypatch, TRAIN + OTHER).watch(Normalisation((0.31,), (0.2,), "encoder"))
    normalise = ImageSource.normalise

    def look(source: ImageSource, pixels: Tensor) -> Tensor:
        made = normalise(source, pixels)
        spy.take(made)
        return made

    monkeypatch.setattr(ImageSource, "normalise", look)
    data, other = (pictures(tmp_path / f"{levels[0]}.npz", levels, 1) for levels in (TRAIN, OTHER))
    run_extract(f"hf:{tmp_path / 'vit'}", other, tmp_path / "features.npz")
    assert spy.looked()
    tuned = tune(f"hf:{tmp_path / 'vit'}", data, tmp_path / "tuned")
    assert spy.looked() and recorded(tuned, GREY) == spy.value
    resume_finetune(tuned, stop=lambda step: step == 2)
    run_eval(tuned, other)
    assert spy.looked()


SOUND = WaveformFront(
    conv_layers=((8, 10, 5), (8, 3, 2), (8, 2, 2)), position_groups=2, position_layers=2, sample_rate=8_000
)
