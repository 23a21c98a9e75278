"""python -m d2vkern.info: the table of ops x backends and the reason for every gap."""

import json
import subprocess
import sys

import pytest
import torch

import d2vkern
from d2vkern import _backend, info
from d2vkern._backend import STEMS, Implementation


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users see it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_json_reports_versions_and_every_op() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "d2vkern.info", "--json"], check=True, capture_output=True, text=True
    )
    report = json.loads(run.stdout)
    assert report["d2vkern"] == d2vkern.__version__
    assert report["torch"] == str(torch.__version__)
    assert set(report) == {
        "d2vkern",
        "python",
        "torch",
        "cuda",
        "devices",
        "triton",
        "pipeline",
        "nvcc",
        "native",
        "ops",
        "limits",
        "measured",
    }
    assert tuple(report["ops"]) == STEMS
    assert all(backends["eager"] == [] for backends in report["ops"].values())
    assert set(report["ops"]["attention"]) == {"eager", "triton", "native", "sdpa", "flex", "xformers"}
    assert set(report["ops"]["mlp"]) == {"eager", "triton", "native", "onednn"}
    assert report["ops"]["mlp"]["native"] == ["not built yet in this version"]


def test_text_has_a_row_per_op_and_explains_gaps() -> None:
    run = subprocess.run([sys.executable, "-m", "d2vkern.info"], check=True, capture_output=True, text=True)
    rows = {line.split()[0]: line.split()[1:] for line in run.stdout.splitlines() if line.split()[:1]}
    assert rows["op"] == ["eager", "triton", "native", "sdpa", "flex", "xformers", "onednn"]
    assert rows["mlp"] == ["yes", "-", "-", "yes" if torch.backends.mkldnn.is_available() else "-"]
    (gap,) = (line for line in run.stdout.splitlines() if "native: not built yet in this version" in line)
    assert "mlp" in gap and "ema" not in gap
    assert "\nnative   " in run.stdout


def test_a_triton_without_fences_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_installed", lambda package: "3.6.0")
    words = "triton 3.6.0 leaves fence.proxy.async out of pipelined loops"
    assert info.collect()["pipeline"].startswith(f"not on sm_90: {words}")
    monkeypatch.setenv("D2VKERN_PIPELINE", "1")
    said = info.collect()["pipeline"]
    assert said.startswith("by D2VKERN_PIPELINE=1, results may not repeat bit for bit") and words in said
    monkeypatch.setattr(info, "_installed", lambda package: "3.7.1")
    assert info.collect()["pipeline"] == "yes"
    monkeypatch.setattr(info, "_installed", lambda package: None)
    assert info.collect()["pipeline"] is None


def test_a_registered_backend_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"native": Implementation("d2vkern.reference.mlp"), **_backend.REGISTRY["mlp"]}
    monkeypatch.setitem(_backend.REGISTRY, "mlp", table)
    report = info.collect()
    assert report["ops"]["mlp"]["native"] == []
    text = info.render(report)
    assert "mlp            yes       -         yes" in text
    (gap,) = (line for line in text.splitlines() if "native: not built yet in this version" in line)
    assert "mlp" not in gap and "loss" in gap


def test_unusable_nvcc_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/bin/false" if name == "nvcc" else None)
    assert info.collect()["nvcc"] == "/bin/false fails with status 1"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert info.collect()["nvcc"] is None


def test_unknown_option_is_refused() -> None:
    run = subprocess.run([sys.executable, "-m", "d2vkern.info", "--yaml"], capture_output=True, text=True)
    assert run.returncode == 2 and "--yaml" in run.stderr
