"""Run directories: exact round trips, crashes at any point, damage that is noticed, what resume compares."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import d2v
from d2v.config.presets import PRESETS, preset
from d2v.config.toml import CheckpointError, diff_maths, read_config, write_config
from d2v.train import checkpoint
from d2v.train.checkpoint import fill_model, latest_checkpoint, load_checkpoint, save_checkpoint
from d2v.train.environment import write_environment

FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")


def small_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    model.half_weight = torch.nn.Parameter(torch.randn(4).to(torch.bfloat16))
    model.transposed = torch.nn.Parameter(torch.randn(3, 2).t())
    model.register_buffer("table", torch.randn(6)[2:5])
    model.register_buffer("alias", model[0].weight.detach())
    return model


def optimizer_state(model: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {"step": torch.tensor(7.0), "exp_avg": torch.randn_like(p), "exp_avg_sq": torch.rand_like(p)}
        for name, p in model.named_parameters()
    }


def random_states() -> dict[str, torch.Tensor]:
    return {"torch": torch.get_rng_state(), "numpy": torch.tensor([3, -1]), "empty": torch.empty(0)}


TRAINER = {
    "position": {"epoch": 2, "step": 11},
    "tiny": 1e-45,
    "third": 1 / 3,
    "nan": float("nan"),
    "list": (1, 2),
}


def save(run: Path, step: int, keep: int = 2, seed: int = 0) -> Path:
    model = small_model(seed)
    return save_checkpoint(run, step, model, optimizer_state(model), TRAINER, random_states(), keep)


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_round_trip_is_bitwise(tmp_path):
    model = small_model()
    optimizer, rng = optimizer_state(model), random_states()
    path = save_checkpoint(tmp_path, 12, model, optimizer, TRAINER, rng, keep=1)
    assert path == tmp_path / "checkpoints" / "step_12"
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)
    loaded = load_checkpoint(path)
    assert loaded.step == 12
    for want, got in ((model.state_dict(), loaded.model), (rng, loaded.rng)):
        assert want.keys() == got.keys()
        for key, tensor in want.items():
            assert got[key].dtype == tensor.dtype and torch.equal(got[key], tensor), key
    assert loaded.optimizer.keys() == optimizer.keys()
    for name, fields in optimizer.items():
        assert fields.keys() == loaded.optimizer[name].keys()
        assert all(torch.equal(loaded.optimizer[name][key], fields[key]) for key in fields), name
    trainer = dict(loaded.trainer)
    assert trainer.pop("nan") != 0
    assert trainer == {"position": {"epoch": 2, "step": 11}, "tiny": 1e-45, "third": 1 / 3, "list": [1, 2]}
    other = small_model(seed=1)
    fill_model(other, loaded.model, path)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in other.state_dict().items())


def test_saving_twice_gives_the_same_bytes(tmp_path):
    torch.manual_seed(3)
    first = save(tmp_path / "a", 5)
    torch.manual_seed(3)
    second = save(tmp_path / "b", 5)
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 10, 9):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_10", "step_2", "step_9"]  # a later one than the saved is not touched
    save(tmp_path, 11, keep=1)
    assert names(tmp_path) == ["step_11"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_11"
    with pytest.raises(ValueError, match="keep must be positive, got 0"):
        save(tmp_path, 12, keep=0)


def test_latest_is_by_number_and_ignores_other_names(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for name in ("step_9", "step_10", "step_x", ".tmp-step_99", "step_11.bak"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_12").write_text("a file")
    assert latest_checkpoint(tmp_path).name == "step_10"


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 3, seed=0)
    save(tmp_path, 3, seed=1)
    assert names(tmp_path) == ["step_3"]
    want = small_model(1).state_dict()
    got = load_checkpoint(tmp_path / "checkpoints" / "step_3").model
    assert all(torch.equal(tensor, want[key]) for key, tensor in got.items())


@pytest.mark.parametrize("at", range(1, 16))
def test_disk_full_at_any_write_leaves_the_previous_one(tmp_path, monkeypatch, at):
    """The at-th write, flush or rename of a save fails with ENOSPC."""
    save(tmp_path, 1)
    calls = {"n": 0}

    def failing(real):
        def call(*args, **kwargs):
            calls["n"] += 1
            if calls["n"] == at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", failing(safetensors.torch.save_file))
        patch.setattr(checkpoint.Path, "write_text", failing(Path.write_text))
        patch.setattr(checkpoint.Path, "rename", failing(Path.rename))
        patch.setattr(checkpoint.os, "fsync", failing(os.fsync))
        try:
            save(tmp_path, 1 if at % 2 else 2, seed=1)
        except CheckpointError as error:
            assert "No space left on device; the newest complete checkpoint is" in str(error)
        else:
            assert calls["n"] < at, "every failure must be reported"
    checkpoint._tidy(tmp_path / "checkpoints")
    assert "step_1" in names(tmp_path)
    load_checkpoint(tmp_path / "checkpoints" / "step_1")
    save(tmp_path, 4)
    assert load_checkpoint(latest_checkpoint(tmp_path)).step == 4


def test_disk_really_full(tmp_path):
    """The kernel refuses to write past a limit (as a full disk does), inside the tensor library."""
    save(tmp_path, 1)
    model = torch.nn.Linear(64, 64)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
    try:
        with pytest.raises(CheckpointError, match="saving failed: .*(File too large|os error 27)") as caught:
            save_checkpoint(tmp_path, 2, model, {}, {}, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value).endswith(f"checkpoint is {tmp_path / 'checkpoints' / 'step_1'}")
    assert names(tmp_path) == ["step_1"]
    load_checkpoint(tmp_path / "checkpoints" / "step_1")


def test_killed_while_saving(tmp_path):
    """A process that dies between two files leaves a hidden folder; the next save clears it."""
    save(tmp_path, 1)
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(d2v.__file__).parents[1])!r})
import torch
from d2v.train import checkpoint
real = checkpoint.safetensors.torch.save_file
def dying(tensors, path):
    if path.name.startswith("rng"):
        os._exit(9)
    real(tensors, path)
checkpoint.safetensors.torch.save_file = dying
checkpoint.save_checkpoint({str(tmp_path)!r}, 2, torch.nn.Linear(2, 2), {{}}, {{}}, {{}}, 1)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    assert names(tmp_path) == [".tmp-step_2", "step_1"]
    assert latest_checkpoint(tmp_path).name == "step_1"
    load_checkpoint(latest_checkpoint(tmp_path))
    save(tmp_path, 3, keep=5)
    assert names(tmp_path) == ["step_1", "step_3"]


def test_a_checkpoint_that_stood_aside_returns(tmp_path):
    path = save(tmp_path, 1)
    path.rename(path.with_name(".old-step_1"))
    save(tmp_path, 2)
    assert names(tmp_path) == ["step_1", "step_2"]
    shutil.copytree(path, path.with_name(".old-step_1"))
    save(tmp_path, 3, keep=3)
    assert names(tmp_path) == ["step_1", "step_2", "step_3"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "longer"])
def test_damage_is_noticed_and_the_intact_one_is_named(tmp_path, name, how):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=9)
    bad = tmp_path / "checkpoints" / "step_4" / name
    data = bytearray(bad.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    bad.write_bytes({"flipped": data, "cut": data[:-3], "gone": b"", "longer": data + b"x"}[how])
    if how == "gone":
        bad.unlink()
    (tmp_path / "checkpoints" / "step_3" / "rng.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "checkpoints" / "step_4")
    message = str(caught.value)
    assert str(bad) in message
    assert f"the newest intact older checkpoint is {tmp_path / 'checkpoints' / 'step_2'}" in message


def test_altered_state_is_noticed(tmp_path):
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    state["trainer"]["position"]["step"] = 12
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(
        CheckpointError, match="state.json: damaged or altered.*no older checkpoint is intact"
    ):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="not a checkpoint, or half-written"):
        load_checkpoint(tmp_path)


def test_fill_model_lists_what_does_not_fit():
    model = torch.nn.Linear(3, 2)
    with pytest.raises(CheckpointError) as caught:
        fill_model(model, {"weight": torch.zeros(2, 4), "extra": torch.zeros(1)}, "x.pt")
    assert str(caught.value) == (
        "x.pt: does not fit the model: 1 missing: bias; 1 unexpected: extra; "
        "1 wrong shape: weight (2, 4) instead of (2, 3)"
    )


@pytest.mark.parametrize("name", PRESETS)
def test_config_round_trip(tmp_path, name):
    config = preset(name)
    write_config(tmp_path, config, "some/folder")
    assert read_config(tmp_path) == (config, "some/folder")


def test_config_errors_name_the_file(tmp_path):
    with pytest.raises(CheckpointError, match="config.toml: No such file or directory: not a run directory"):
        read_config(tmp_path)
    cases = {"a = [": "config.toml", "bogus=1\n[run]\ndata='x'": "unknown key 'bogus'", "": "'run'"}
    for text, match in cases.items():
        (tmp_path / "config.toml").write_text(text)
        with pytest.raises(CheckpointError, match=match):
            read_config(tmp_path)


def test_diff_maths():
    old = preset("image_tiny")

    def changed(section: str, **values: object):
        return dataclasses.replace(old, **{section: dataclasses.replace(getattr(old, section), **values)})

    assert diff_maths(old, old) == []
    neutral = changed("train", save_every=7, keep=3, log_every=1, device="cpu", min_rank=0.0, alarm_after=1)
    assert diff_maths(old, neutral) == [] and diff_maths(old, changed("data", workers=3, prefetch=9)) == []
    assert diff_maths(old, changed("data", shuffle_window=9)) == ["data.shuffle_window: 0 -> 9"]
    assert diff_maths(old, changed("train", steps=10)) == [f"train.steps: {old.train.steps} -> 10"]
    assert diff_maths(old, changed("optim", clip=None)) == ["optim.clip: 4.0 -> none"]
    assert diff_maths(old, changed("train", micro_batch=8)) == ["train.micro_batch: none -> 8"]
    new = changed("model", depth=5, mask=dataclasses.replace(old.model.mask, clones=2))
    assert diff_maths(old, new) == ["model.depth: 4 -> 5", "model.mask.clones: 8 -> 2"]


def test_environment(tmp_path):
    written = write_environment(tmp_path)
    assert json.loads((tmp_path / "env.json").read_text()) == written
    assert written["torch"] == torch.__version__ and written["cpu"] and written["cpu_count"] > 0
    assert written["commit"] is None or len(written["commit"]) == 40


def test_importing_d2v_is_light():
    code = "import sys, d2v; d2v.preset; print(sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    root = Path(d2v.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        d2v.nothing  # noqa: B018
    assert d2v.CheckpointError is CheckpointError and d2v.__version__
