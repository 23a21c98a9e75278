"""Probes while pretraining: what they say, that they change nothing, resuming, early errors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import d2v
from d2v.cli.main import main
from d2v.config.run import Config, ProbeConfig
from d2v.config.toml import read_config
from d2v.data.open import open_labelled
from d2v.data.types import DataError
from d2v.evaluate.online_probe import evenly
from d2v.evaluate.probe import probe_model
from d2v.formats.open import open_model
from d2v.model import Data2Vec
from d2v.train.checkpoint import latest_checkpoint, load_checkpoint
from d2v.train.progress import TIMING, read_metrics
from d2vkern import _backend
from tests.d2v.test_resume import RANDOM, assert_same_run
from tests.d2v.tiny_runs import LINES, make_data, run, tiny

PARTS = {"image": ("test",), "audio": ("test", "unseen_voice"), "text": ("test",)}
Chosen = Callable[[Callable[[], object]], set[str]]
OWN = "eager,residual_norm=triton"
EMBEDDED = {"image": "digits", "audio": "speech", "text": "text"}


def stripes(folder: Path) -> str:
    """Pictures of two classes: stripes along and across."""
    rows, columns = np.mgrid[:24, :24] / 24
    labels = np.arange(60) % 2
    waves = [np.sin(2 * np.pi * (3 * (columns if k else rows) + i / 60)) for i, k in enumerate(labels)]
    np.savez(folder / "x.npz", images=np.uint8(127 * (1 + np.stack(waves)))[..., None], labels=labels)
    return str(folder / "x.npz")


def probed(cfg: Config, **probe: Any) -> Config:
    return dataclasses.replace(cfg, probe=ProbeConfig(**probe))


def test_probes_change_nothing_and_resume_exactly(tmp_path: Path) -> None:
    data = stripes(tmp_path)
    cfg = tiny("image", steps=7, model=RANDOM, train={"log_every": 2})
    with_probes = probed(cfg, every=3, rows=20)
    run(cfg, data, tmp_path / "plain")
    whole = run(with_probes, data, tmp_path / "whole")
    run(with_probes, data, tmp_path / "parts", stop=lambda step: step == 4)
    run(with_probes, data, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    found = [row for row in whole.metrics if "probe/test/knn" in row]
    assert [row["step"] for row in found] == [3, 6, 7]
    assert all(0 <= row[f"probe/test/{kind}"] <= 1 for row in found for kind in ("linear", "knn"))
    assert all(1 <= row["feature_rank"] <= 16 for row in found)

    def others(name: str) -> list[dict[str, Any]]:
        rows = [row for row in read_metrics(tmp_path / name) if "loss" in row]
        return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]

    assert others("plain") == others("whole")
    one, two = (load_checkpoint(latest_checkpoint(tmp_path / name)) for name in ("plain", "whole"))  # type: ignore[arg-type]
    assert all(torch.equal(tensor, two.model[name]) for name, tensor in one.model.items())
    assert all(torch.equal(tensor, two.rng[name]) for name, tensor in one.rng.items() if "gauss" not in name)


def test_probes_see_what_is_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stripes are told apart by the encoder; a file of its own is probed, and every layer when asked."""
    data = stripes(tmp_path)
    cfg = probed(tiny("image", steps=2), every=2, data=data, layers=(0, -1))
    result = run(cfg, make_data("image", tmp_path / "plain"), tmp_path / "run")
    (row,) = [row for row in result.metrics if "feature_rank_layer0" in row]
    names = {f"probe/layer{n}/test/{kind}" for n in (0, 1) for kind in ("linear", "knn")}
    assert row.keys() == {"step", "feature_rank_layer0", "feature_rank_layer1", *names}
    model = d2v.load(tmp_path / "run")
    assert isinstance(model, Data2Vec)
    labelled = open_labelled(data, open_model(tmp_path / "run")[1])  # read as the run reads its own
    for number in (0, 1):
        wanted = probe_model(model, labelled, layer=number)["linear"]["test"]
        assert row[f"probe/layer{number}/test/linear"] == wanted
    assert row["probe/layer1/test/linear"] > 0.9
    assert "step 2: probe layer0/test/linear" in capsys.readouterr().out
    assert (tmp_path / "run" / "plots" / "scores.png").exists()


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("modality", ["image", "audio", "text"])
def test_everything_in_a_run_is_on_its_backends(
    modality: str, chosen: Chosen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The online probe too, and then what commands do with it, unless they are asked for others."""
    data, out = EMBEDDED[modality], str(tmp_path / "run")
    if modality == "image":
        data = stripes(tmp_path)
    elif modality == "text":
        lines = [json.dumps({"text": f"{LINES[i % 4]} {i}", "label": f"{i % 2}"}) for i in range(60)]
        (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
        data = str(tmp_path / "x.jsonl")
    cfg = probed(tiny(modality, steps=1, train={"backend": OWN}), every=1, rows=20)

    assert chosen(lambda: run(cfg, data, out).finished) == {"triton"}
    asked = ["--backend", "eager"]
    npz = ["--out", str(tmp_path / "f.npz")]
    few = make_data(modality, tmp_path / "few")
    assert chosen(lambda: main(["extract", out, "--data", few, *npz]) == 0) == {"triton"}
    assert chosen(lambda: main(["extract", out, "--data", few, *npz, *asked]) == 0) == {"eager"}
    if modality == "image":
        assert chosen(lambda: main(["probe", out, "--data", data, "--kind", "knn"]) == 0) == {"triton"}
        assert chosen(lambda: main(["probe", out, "--data", data, "--kind", "knn", *asked]) == 0) == {"eager"}
    capsys.readouterr()
    assert main(["extract", out, "--data", few, *npz, "--backend.mlp=eagre"]) == 2
    assert "unknown backend 'eagre'" in capsys.readouterr().err


@pytest.mark.usefixtures("no_plots")
def test_backends_of_another_machine_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = make_data("text", tmp_path / "data"), str(tmp_path / "run")
    run(tiny("text", steps=1, train={"backend": OWN}), data, out)
    gaps = _backend._machine_gaps
    monkeypatch.setattr(
        _backend, "_machine_gaps", lambda name: ("no CUDA device",) if name == "triton" else gaps(name)
    )
    given = ["extract", out, "--data", data, "--out", str(tmp_path / "f.npz")]
    assert main(given) == 2
    err = capsys.readouterr().err
    assert (
        "residual_norm: backend 'triton', requested by context use_backend, cannot run: no CUDA device" in err
    )
    assert f"the run was trained with train.backend {OWN!r}; --backend chooses others, or auto" in err
    assert main([*given, "--backend", "auto"]) == 0


@pytest.mark.parametrize("modality", ["image", "audio", "text"])
def test_parts_are_thinned_out_evenly(modality: str, tmp_path: Path) -> None:
    cfg = tiny(modality)
    labelled = open_labelled(EMBEDDED[modality], cfg, run_dir=tmp_path)
    for name in PARTS[modality]:
        split = labelled.splits[name]
        few = evenly(split, 7)
        assert len(few) == 7 and evenly(split, len(split)) is split
        (got,) = few.batches(7)
        all_of_it = list(split.batches(1))
        for i, place in enumerate(np.linspace(0, len(split) - 1, 7).round().astype(int).tolist()):
            source, _, label = all_of_it[place]
            size = source.shape[-1]
            assert torch.equal(got[0][i][..., :size], source[0])
            assert torch.equal(got[2][i][: label[0].numel()] if label.ndim > 1 else got[2][i], label[0])


def test_errors_come_before_the_first_step(tmp_path: Path) -> None:
    data = make_data("image", tmp_path / "plain")
    with pytest.raises(DataError, match="labels missing"):
        run(probed(tiny("image"), every=2), data, tmp_path / "run")
    with pytest.raises(ValueError, match=r"probe.layers must be in -2..1, got 5"):
        run(probed(tiny("image"), every=2, layers=(5,)), stripes(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="probe.every must be at least 0, got -1"):
        ProbeConfig(every=-1)


def test_settings_may_change_on_resume_and_old_runs_have_none(tmp_path: Path) -> None:
    data = stripes(tmp_path)
    cfg = tiny("image", steps=4)
    run(cfg, data, tmp_path / "run", stop=lambda step: step == 2)
    text = (tmp_path / "run" / "config.toml").read_text()
    old = text[: text.index("[probe]")]
    (tmp_path / "run" / "config.toml").write_text(old)
    assert read_config(tmp_path / "run")[0] == cfg
    assert main(["train", "--resume", str(tmp_path / "run"), "--probe.every", "2", "--probe.rows", "20"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "probe/test/linear" in row] == [4]
