"""Scaling curves: the fit, what each axis varies, and a smoke run of the whole command."""

import json
import math

import pytest
import torch

from benchmarks.scaling import FACTORS, curve, fit, main, points
from d2v.config.fronts import TextFront
from d2v.config.presets import PRESETS

CPU = torch.device("cpu")


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_fit_finds_the_exponent(power):
    xs = [1, 2, 3, 8]
    assert fit(xs, [7.0 * x**power for x in xs]) == pytest.approx(power, abs=1e-12)


def test_fit_is_least_squares_on_logarithms():
    assert fit([1, 10, 100], [1, 1, 1000]) == pytest.approx(1.5)
    assert fit([1, math.e], [1, math.e**3]) == pytest.approx(3)


@pytest.mark.parametrize(("xs", "ys"), [([2, 2], [1, 3]), ([1, 2], [0, 1]), ([0, 2], [1, 1])])
def test_fit_refuses_what_has_no_slope(xs, ys):
    with pytest.raises(ValueError, match="fit: xs must be"):
        fit(xs, ys)


@pytest.mark.parametrize("name", [name for name in PRESETS if "large" not in name and "huge" not in name])
@pytest.mark.parametrize("axis", FACTORS)
def test_an_axis_varies_what_it_says_and_nothing_else(name, axis):
    for device in ("cpu", "cuda"):
        found = points(name, axis, FACTORS[axis], device)
        xs = [point.x for point in found]
        assert xs == sorted(set(xs)) and len(xs) == len(FACTORS[axis])
        models = [point.cfg.model for point in found]
        seen = {
            "masks": {model.mask.clones for model in models},
            "tokens": {point.shape[1:] for point in found},
            "width": {model.dim for model in models},
            "depth": {model.depth for model in models},
        }
        assert {key for key, values in seen.items() if len(values) > 1} == {axis}
        assert len({model.dim // model.heads for model in models}) == 1
        assert all(
            point.shape[1] <= model.front.max_positions
            for point, model in zip(found, models, strict=True)
            if isinstance(model.front, TextFront)
        )


@pytest.mark.parametrize("preset", ["image_tiny", "text_tiny"])
def test_memory_grows_with_masks(preset):
    found = curve(preset, "masks", CPU, 1, "fp32", (1, 8))
    assert [point["x"] for point in found["points"]] == [1, 8]
    assert found["points"][0]["peak_MiB"] < found["points"][1]["peak_MiB"]
    assert 0 < found["memory_exponent"] < 1.2


def test_smoke(tmp_path, capsys):
    out = tmp_path / "scaling_smoke.json"
    assert main(["--smoke", "--presets", "audio_tiny", "--axes", "tokens", "depth", "--out", str(out)]) == 0
    assert [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()] == ["audio_tiny,"] * 2
    results = json.loads(out.read_text())
    assert [(one["preset"], one["axis"]) for one in results["curves"]] == [
        ("audio_tiny", "tokens"),
        ("audio_tiny", "depth"),
    ]
    assert all(point["seconds"] > 0 for one in results["curves"] for point in one["points"])
    assert results["provenance"]["device"] == "cpu"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_rounds_must_be_positive(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--rounds", "0"])
    assert stop.value.code == 2
    assert "--rounds must be positive, got 0" in capsys.readouterr().err
