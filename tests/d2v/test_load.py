"""`d2v.load`: the original's files and our run directories, through to a working model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import d2v
from d2v.config.recipes import recipe
from d2v.config.toml import CheckpointError, read_config, write_config
from d2v.config.tune import HeadConfig
from d2v.formats.convert import run_convert
from d2v.formats.open import load_run
from d2v.model.tuned import FineTuned
from d2v.train.checkpoint import save_checkpoint
from tests.d2v.tiny_runs import tiny


def golden_file(goldens: Path, case: str, path: Path) -> Path:
    """The original's `.pt` layout of a golden: nested teacher, 4-D ALiBi scale, plain containers."""
    arrays = np.load(goldens / f"weights_{case}.npz")
    tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    tensors = {key: t.squeeze(0) if key.endswith("alibi_scale") else t for key, t in tensors.items()}
    model: dict = {key: t for key, t in tensors.items() if not key.startswith("_ema.")}
    model["_ema"] = {key.removeprefix("_ema."): t for key, t in tensors.items() if key.startswith("_ema.")}
    cfg = json.loads((goldens / f"weights_{case}.json").read_text())["cfg"]
    torch.save({"cfg": {"model": cfg}, "model": model}, path)
    return path


def run_directory(path: Path, seed: int = 0, steps: tuple[int, ...] = (5, 7)) -> dict[int, d2v.Data2Vec]:
    """A run of `image_tiny` with a checkpoint of a differently initialised model at each step."""
    config = d2v.preset("image_tiny")
    write_config(path, config, "digits")
    models = {}
    for step in steps:
        torch.manual_seed(seed + step)
        models[step] = d2v.Data2Vec(config.model)
        models[step].update_teacher(0.5)
        save_checkpoint(path, step, models[step], {}, {}, {}, keep=9)
    return models


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("case", ["image_base", "audio_base", "text_base"])
def test_original_files_become_models(goldens, tmp_path, case):
    model = d2v.load(golden_file(goldens, case, tmp_path / "x.pt"))
    assert not model.training and model.modality == case.split("_")[0]
    state, arrays = model.state_dict(), np.load(goldens / f"weights_{case}.npz")
    assert set(state) == set(arrays.files)
    assert all(np.array_equal(state[key].numpy(), arrays[key]) for key in arrays.files)
    golden = np.load(goldens / f"case_{case}.npz")
    with torch.no_grad():
        features = model.features(torch.from_numpy(golden["in.source"]))
    want = torch.from_numpy(golden["feat.x"])
    assert (features.x - want).norm() < 1e-4 * want.norm()


def test_omegaconf_file_becomes_a_model(goldens, tmp_path):
    tree = d2v.load(goldens / "ckpt_image_base.pt")
    assert same_weights(tree, d2v.load(golden_file(goldens, "image_base", tmp_path / "x.pt")))


def test_half_precision_students_load_in_fp32(goldens, tmp_path):
    path = golden_file(goldens, "text_base", tmp_path / "x.pt")
    saved = torch.load(path)
    saved["model"] = {key: value if key == "_ema" else value.half() for key, value in saved["model"].items()}
    torch.save(saved, path)
    state = d2v.load(path).state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert torch.equal(state["blocks.1.attn.qkv.weight"].half(), saved["model"]["blocks.1.attn.qkv.weight"])


def test_keys_that_do_not_fit_are_listed(goldens, tmp_path):
    path = golden_file(goldens, "text_base", tmp_path / "x.pt")
    saved = torch.load(path)
    saved["model"]["blocks.9.bias"] = torch.zeros(1)
    saved["model"]["blocks.0.norm1.bias"] = torch.zeros(3)
    del saved["model"]["blocks.1.norm1.bias"], saved["model"]["_ema"]["2.mlp.fc2.bias"]
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=r"x\.pt: does not fit the model") as caught:
        d2v.load(path)
    assert "2 missing: " in str(caught.value) and "_ema.2.mlp.fc2.bias" in str(caught.value)
    assert "1 unexpected: blocks.9.bias" in str(caught.value)
    assert "1 wrong shape: blocks.0.norm1.bias (3,) instead of (64,)" in str(caught.value)


def test_run_directories(tmp_path):
    models = run_directory(tmp_path)
    loaded = d2v.load(tmp_path)
    assert not loaded.training and same_weights(loaded, models[7]) and not same_weights(loaded, models[5])
    assert same_weights(d2v.load(str(tmp_path), step=5), models[5])
    assert same_weights(d2v.load(tmp_path / "checkpoints" / "step_5"), models[5])
    x = torch.rand(2, 1, 24, 24)
    with torch.no_grad():
        assert torch.equal(loaded.features(x, teacher=True).x, models[7].eval().features(x, teacher=True).x)


def test_checkpoint_folders_from_inside_and_runs_kept_under_that_name(tmp_path, monkeypatch):
    run = tmp_path / "checkpoints" / "run"
    models = run_directory(run)
    assert same_weights(d2v.load(run), models[7])
    monkeypatch.chdir(run / "checkpoints")
    assert same_weights(d2v.load("step_5"), models[5])


RECIPES = {
    ("image", "classify"): "image_tiny",
    ("audio", "classify"): "sound_tiny",
    ("audio", "ctc"): "speech_tiny",
    ("text", "sentence"): "text_tiny",
}


def tuned_run(path: Path, modality: str, task: str, steps: dict[str, int]) -> dict[str, FineTuned]:
    """A run of `d2v finetune` with a differently initialised model in each folder of checkpoints."""
    name = RECIPES[modality, task]
    cfg = recipe(name).on(name, tiny(modality).model)
    cfg = dataclasses.replace(cfg, head=HeadConfig(task=task, outputs=3))
    write_config(path, cfg, "digits", encoder="x")
    (path / "labels.json").write_text('["a", "b", "c"]')
    models = {}
    for folder, step in steps.items():
        torch.manual_seed(step)
        models[folder] = FineTuned(cfg.model, cfg.head)
        save_checkpoint(path / folder, step, models[folder], {}, {}, {}, keep=9)
    return models


@pytest.mark.parametrize(("modality", "task"), RECIPES)
def test_every_folder_of_a_fine_tuned_run_opens(tmp_path, monkeypatch, modality, task):
    run = tmp_path / "run"
    models = tuned_run(run, modality, task, {".": 7, "best": 4})
    newest, best = models["."], models["best"]
    expected = {
        "": best, "best": best, "best/checkpoints": best, "best/checkpoints/step_4": best,
        "checkpoints": newest, "checkpoints/step_7": newest,
    }  # fmt: skip
    for place, model in expected.items():
        opened = d2v.load(run / place)
        assert isinstance(opened, FineTuned) and not opened.training
        assert same_weights(opened, model), place
        assert opened.head_cfg == HeadConfig(task=task, outputs=3)
    assert same_weights(d2v.load(run, step=7), newest)
    assert same_weights(load_run(run / "checkpoints")[0], newest)
    (tmp_path / "link").symlink_to(run / "checkpoints" / "step_7")
    assert same_weights(d2v.load(tmp_path / "link"), newest)
    monkeypatch.chdir(run / "best" / "checkpoints")
    assert same_weights(d2v.load("step_4"), best)
    run_convert("step_4", tmp_path / "folder", "safetensors")
    assert same_weights(d2v.load(tmp_path / "folder"), best)
    assert (tmp_path / "folder" / "labels.json").is_file()  # of the run, three folders above
    with pytest.raises(ValueError, match="step must be None for a checkpoint folder, got 4"):
        d2v.load(run / "checkpoints", step=4)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        shutil.rmtree(run / "best" / "checkpoints" / "step_4")
        d2v.load(run / "best")
    assert same_weights(d2v.load(run), newest)
    with pytest.raises(CheckpointError, match=r"config\.toml: of a fine-tuning run, not of pretraining"):
        read_config(run)


def test_checkpoints_on_another_disk(tmp_path):
    models = run_directory(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "disk")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    for place, step in (("", 7), ("checkpoints", 7), ("checkpoints/step_5", 5)):
        assert same_weights(d2v.load(tmp_path / "run" / place), models[step])
    with pytest.raises(CheckpointError, match=r"disk.config\.toml: No such file .*not a run directory"):
        d2v.load(tmp_path / "disk")


def test_load_errors(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing: No such file"):
        d2v.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        write_config(tmp_path / "new", d2v.preset("image_tiny"), "digits")
        d2v.load(tmp_path / "new")
    with pytest.raises(CheckpointError, match="not a run directory"):
        (tmp_path / "empty").mkdir()
        d2v.load(tmp_path / "empty")
    run_directory(tmp_path / "run")
    with pytest.raises(CheckpointError, match="step_6/state.json: No such file"):
        d2v.load(tmp_path / "run", step=6)
    with pytest.raises(ValueError, match="step must be None for a checkpoint folder, got 5"):
        d2v.load(tmp_path / "run" / "checkpoints" / "step_5", step=5)
    with pytest.raises(ValueError, match="step must be None for a file, got 5"):
        d2v.load(tmp_path / "x.pt", step=5)
    weights = tmp_path / "run" / "checkpoints" / "step_7" / "model.safetensors"
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: a part of a model's folder: give .*step_7$"
    ):
        d2v.load(weights)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has .*intact older .* is .*step_5"):
        d2v.load(tmp_path / "run")
