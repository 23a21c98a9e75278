"""Fixtures of the trainer's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from d2v.train.learner import Learner
from d2v.train.pretrain import run
from d2vkern import _backend
from d2vkern._backend import Implementation
from d2vkern.testing import backend_spy
from tests.d2v.tiny_runs import make_data, tiny
from tests.d2v.tiny_tuning import RECIPES, labelled


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw nothing at their end, which takes them most of their time."""
    monkeypatch.setattr("d2v.train.loop.plot_run", lambda out: [])


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pretraining run of two steps for each modality; tests only read it."""
    root = tmp_path_factory.mktemp("encoders")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("d2v.train.loop.plot_run", lambda out: [])
        for modality in RECIPES:
            run(tiny(modality, steps=2), make_data(modality, root / f"{modality}_data"), root / modality)
    return {modality: root / modality for modality in RECIPES}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Labelled data of each modality; tests only read it."""
    root = tmp_path_factory.mktemp("labelled")
    return {modality: labelled(modality, root / modality) for modality in RECIPES}


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], set[str]]:
    """Which backends of residual_norm a call ran, when all else was eager.

    Its "triton" is eager's code here: auto takes it nowhere on a CPU, and it costs no more.
    """
    table = _backend.REGISTRY["residual_norm"]
    named = {"triton": Implementation(table["eager"].module, auto=()), "eager": table["eager"]}
    monkeypatch.setitem(_backend.REGISTRY, "residual_norm", named)
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def of(call: Callable[[], object]) -> set[str]:
        with backend_spy() as calls:
            assert call()
        assert {name for stem, name in calls if stem != "residual_norm"} == {"eager"}
        return {name for stem, name in calls if stem == "residual_norm"}

    return of


@pytest.fixture(params=[False, True], ids=["host", "capturable"])
def capturable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Runs take their decisions on the host, as on a CPU, or on the device, as on a GPU."""
    on_device: bool = request.param
    monkeypatch.setattr(Learner, "decides_on", staticmethod(lambda device: on_device))
    return on_device
