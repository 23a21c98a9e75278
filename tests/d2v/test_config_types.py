"""Configs from files: every wrong key, type, literal and size is one line, and nothing is built before."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import d2v
from d2v.config.model import ModelConfig
from d2v.config.presets import PRESETS, preset
from d2v.config.recipes import RECIPES, recipe
from d2v.config.run import Config
from d2v.config.toml import CheckpointError, from_dict, read_config, read_settings, to_dict
from d2v.config.tune import FineTuneConfig
from d2v.formats.convert import run_convert
from d2v.train.pretrain import run
from tests.d2v.tiny_runs import make_data, tiny


@pytest.mark.parametrize("name", PRESETS)
def test_presets_come_back_as_they_were(name: str) -> None:
    assert from_dict(Config, to_dict(preset(name))) == preset(name)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_come_back_as_they_were(name: str) -> None:
    base = recipe(name)
    of_task = {"classify": "image_tiny", "ctc": "audio_tiny", "sentence": "text_tiny"}
    cfg = base.on(name, preset(of_task[base.head.task]).model)
    assert from_dict(FineTuneConfig, to_dict(cfg)) == cfg


WRONG: list[tuple[str, Any, str]] = [
    ("model.objective", "evil", "config.model.objective must be one of data2vec2, .*, mlm, got 'evil'"),
    ("model.depth", "12", "config.model.depth must be int, got '12'"),
    ("model.depth", True, "config.model.depth must be int, got True"),
    ("model.depth", 2.0, "config.model.depth must be int, got 2.0"),
    ("model.depth", 10**9, "model.depth must be at most 1,000, got 1000000000"),
    ("model.dim", 10**9, "model.dim must be at most 65,536"),
    ("model.dim", 10**40, "model.dim must be at most 65,536"),
    ("model.dim", -4, "model.dim must be positive, got -4"),
    ("model.mlp_ratio", 1e9, r"model.mlp_ratio must be in \(0, 100\]"),
    ("model.loss_scale", "x", "config.model.loss_scale must be float or none, got 'x'"),
    ("model.norm_eps", float("nan"), "config.model.norm_eps must be finite, got nan"),
    ("model.mask.clones", 10**9, "mask.clones must be at most 1,000"),
    ("model.mask.kind", "stripes", "config.model.mask.kind must be one of inverse_block, .* or none, got"),
    ("model.decoder", 3, "config.model.decoder must be a table, got 3"),
    ("model.decoder.layers", [6], r"config.model.decoder.layers must be int, got \[6\]"),
    ("model.front", "image", "config.model.front must be a table, got 'image'"),
    ("model.front.kind", "smell", "config.model.front: kind must be one of image, .*got 'smell'"),
    ("model.front.kind", ["image"], r"config.model.front: kind must be one of image, .*got \['image'\]"),
    ("model.front.height", 10**6, "front.height must be at most 65,536"),
    ("model.front.width", 65_536, "front.patch must be so large that there are at most 65,536 patches"),
    ("model.front.smell", 1, "config.model.front: unknown key 'smell', known: channels"),
    ("optim.betas", [0.9], r"config.optim.betas must be tuple\[float, float\], got \[0.9\]"),
    ("optim.betas", [0.9, "x"], r"config.optim.betas must be tuple\[float, float\]"),
    ("optim.betas", [0.9, float("inf")], "config.optim.betas must be finite"),
    ("train.precision", "fp8", "config.train.precision must be one of fp32, bf16, got 'fp8'"),
    ("train.steps", None, "config.train: unknown key 'steps2'"),
    ("data.workers", 10**9, r"data.workers must be in 0 \.\. 10,000"),
    ("data", [], r"config.data must be a table, got \[\]"),
]  # fmt: skip


def put(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        values = values[name]
    values[last] = value


@pytest.mark.parametrize(("key", "value", "message"), WRONG, ids=lambda v: str(v)[:24])
def test_what_is_wrong_in_a_config_is_one_line(key: str, value: Any, message: str, tmp_path: Path) -> None:
    values = {"run": {"data": "x"}, **to_dict(preset("image_tiny"))}
    if value is None:
        values["train"]["steps2"] = 1
    else:
        put(values, key, value)
    if not (isinstance(value, int) and value > 2**63):  # TOML holds no such number, Python and JSON do
        (tmp_path / "config.toml").write_text(tomli_w.dumps(values))
        with pytest.raises(CheckpointError, match=rf"config\.toml: (config: )?{message}") as caught:
            read_config(tmp_path)
        assert "\n" not in str(caught.value)
    del values["run"]
    with pytest.raises(ValueError, match=message):
        from_dict(Config, json.loads(json.dumps(values)))


def test_whole_numbers_are_floats_and_missing_keys_are_named() -> None:
    values = to_dict(preset("image_tiny"))
    values["optim"]["lr"] = 1
    lr = from_dict(Config, values).optim.lr
    assert lr == 1.0 and isinstance(lr, float)
    del values["model"]["front"]
    with pytest.raises(ValueError, match="config.model: key 'front' is missing"):
        from_dict(Config, values)


@pytest.mark.parametrize("objective", ["evil", "", "MAE"])
def test_an_unknown_objective_is_refused_in_python_too(objective: Any) -> None:
    with pytest.raises(ValueError, match=r"model.objective must be one of data2vec2, .*got"):
        dataclasses.replace(preset("image_tiny").model, objective=objective)


@pytest.mark.parametrize("modality", ["image", "audio", "text"])
def test_sizes_are_compared_with_the_weights_before_a_model_is_made(
    modality: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config that asks for much more than the weights have: refused while nothing has memory."""
    folder = tmp_path / "run"
    run(tiny(modality, steps=1), make_data(modality, tmp_path / "data"), folder)
    run_convert(folder, tmp_path / "converted", "safetensors")
    settings = read_settings(folder)
    settings["model"] |= {"dim": 65_536, "heads": 256, "depth": 20}
    (folder / "config.toml").write_text(tomli_w.dumps(settings))
    converted = json.loads((tmp_path / "converted" / "config.json").read_text())
    converted["model"] |= {"dim": 65_536, "heads": 256, "depth": 20}
    (tmp_path / "converted" / "config.json").write_text(json.dumps(converted))
    for path in (folder, tmp_path / "converted"):
        with pytest.raises(CheckpointError, match="does not fit the model: .* wrong shape"):
            d2v.load(path)
    shutil.rmtree(folder)


def test_a_model_config_of_limits_itself_is_taken() -> None:
    model = preset("text_tiny").model
    assert isinstance(dataclasses.replace(model, depth=1_000), ModelConfig)
