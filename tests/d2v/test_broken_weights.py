"""NaN weights: commands end with one line that names them, runs go on and say that there are no scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from d2v.cli.main import main
from d2v.config.run import ProbeConfig
from d2v.evaluate.online_probe import OnlineProbe
from d2v.evaluate.scores import evaluate
from d2v.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from d2v.train.progress import read_metrics
from tests.d2v.tiny_runs import run, run_finetune
from tests.d2v.tiny_tuning import config, labelled

from .test_online_probe import stripes
from .tiny_runs import make_data, tiny

WEIGHT = "blocks.1.mlp.fc2.weight"


@pytest.fixture(scope="module", params=["image", "audio", "text"])
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, str]:
    """(modality, run, data): a run whose weights in the last block are NaN, and data with labels."""
    folder, modality = tmp_path_factory.mktemp(request.param), request.param
    if modality == "image":
        data = stripes(folder)
    elif modality == "text":
        data = labelled("text", folder / "data")
    else:
        data = str(folder / "data")
        for label in ("a", "b"):
            make_data("audio", folder / "data" / label)
    run(tiny(modality, steps=1), data, folder / "run")
    _poison(folder / "run", WEIGHT)
    return modality, folder / "run", data


def _poison(folder: Path, name: str, value: float = float("nan")) -> None:
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    held = load_checkpoint(checkpoint)
    held.model[name][0] = value
    model: Any = SimpleNamespace(state_dict=lambda: held.model)
    save_checkpoint(folder, held.step, model, held.optimizer, held.trainer, held.rng, 1)


def test_probe_and_extract(
    trained: tuple[str, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modality, out, data = trained
    assert main(["probe", str(out), "--data", data]) == 2
    said = capsys.readouterr().err
    assert f"are NaN or infinite, as are values of {WEIGHT} in the model" in said
    assert said.startswith("probe: features of rows 0 to ") and said.count("\n") == 1
    for pool in ("mean", "none"):
        to = tmp_path / "x.npz"
        assert main(["extract", str(out), "--data", data, "--out", str(to), "--pool", pool]) == 2
        said = capsys.readouterr().err
        assert said.startswith("extract: features of ") and WEIGHT in said and said.count("\n") == 1
        assert not list(tmp_path.iterdir())
    # an earlier block is sound
    assert main(["extract", str(out), "--data", data, "--out", str(to), "--layer", "0"]) == 0


def test_transformers_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    from .test_hf_encoder import saved

    saved("ViT", tmp_path / "model")
    model = transformers.ViTModel.from_pretrained(tmp_path / "model")
    next(p for p in model.parameters() if p.dim() == 2).data[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "model")
    data, out = stripes(tmp_path), str(tmp_path / "x.npz")
    for arguments in (["probe"], ["extract", "--out", out]):
        command, *more = arguments
        assert main([command, f"hf:{tmp_path / 'model'}", "--data", data, *more]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith(f"{command}: features of ") and "are NaN or infinite, as are values of" in said


def test_values_of_a_part(tmp_path: Path) -> None:
    from d2v.evaluate.probe import probe_rows
    from d2v.model.finite import NotFinite

    x, y = np.eye(4, dtype=np.float32), np.arange(4)
    broken = x.copy()
    broken[2, 1] = np.inf
    with pytest.raises(NotFinite, match="probe: values of part test are NaN or infinite$"):
        probe_rows({"train": (x, y), "test": (broken, y)}, "sample", ("linear",))


def test_probes_while_training_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = OnlineProbe._run

    def break_once(self: OnlineProbe, model: nn.Module) -> object:
        if (tmp_path / "broken").exists():
            return whole(self, model)  # type: ignore[arg-type]
        (tmp_path / "broken").touch()
        weight = dict(model.named_parameters())[WEIGHT].data
        sound = weight.clone()
        weight[0] = float("nan")
        try:
            return whole(self, model)  # type: ignore[arg-type]
        finally:
            weight.copy_(sound)

    monkeypatch.setattr(OnlineProbe, "_run", break_once)
    cfg = dataclasses.replace(tiny("image", steps=2), probe=ProbeConfig(every=1, rows=20))
    result = run(cfg, stripes(tmp_path), tmp_path / "run")
    assert [row["step"] for row in result.metrics if "feature_rank" in row] == [2]
    said = capsys.readouterr().out
    assert "step 1: probe without scores (probe: features of rows 0 to 20 are NaN or infinite, as" in said
    assert "step 2: probe test/linear" in said


def test_fine_tuning_and_its_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny("image", steps=1), make_data("image", tmp_path / "plain"), tmp_path / "encoder")
    data = labelled("image", tmp_path / "labelled")
    cfg = config(tmp_path / "encoder", "image", steps=2, evaluate_every=1)

    def break_once(model: nn.Module, *given: object) -> dict[str, float]:
        if not (tmp_path / "broken").exists():
            (tmp_path / "broken").touch()
            head = model.head.bias.data
            sound = head.clone()
            head[0] = float("inf")
            try:
                return evaluate(model, *given)  # type: ignore[arg-type]
            finally:
                head.copy_(sound)
        return evaluate(model, *given)  # type: ignore[arg-type]

    result = run_finetune(cfg, tmp_path / "encoder", data, tmp_path / "run", evaluate=break_once)
    assert result.finished and result.scores
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "test/top1" in row] == [2]
    assert "warning: step 1: no scores: evaluate: outputs of samples 0 to" in capsys.readouterr().out
    _poison(tmp_path / "run" / "best", "head.weight")
    assert main(["eval", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1 and "of part test are NaN or infinite, as are values of head.weight in" in said
    )
