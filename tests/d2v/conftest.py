"""Fixtures of the trainer's tests."""

from __future__ import annotations

import pytest

from d2v.learner import Learner


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw nothing at their end, which takes them most of their time."""
    for module in ("d2v.train", "d2v.finetune.run"):
        monkeypatch.setattr(f"{module}.plot_run", lambda out: [])


@pytest.fixture(params=[False, True], ids=["host", "capturable"])
def capturable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Runs take their decisions on the host, as on a CPU, or on the device, as on a GPU."""
    on_device: bool = request.param
    monkeypatch.setattr(Learner, "decides_on", staticmethod(lambda device: on_device))
    return on_device
