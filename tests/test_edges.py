"""NaN, sizes of 0, scalars, seeds, plans made under inference_mode: one answer or error on every backend."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import d2vkern
from d2vkern.kernels import _attention

from .edge_cases import CASES, Case, outcome

PAIRS = [(name, backend) for name, case in CASES.items() for backend in case.backends()]
everywhere = pytest.mark.parametrize(("name", "backend"), PAIRS)
all_nan = pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
"""numpy's of the interpreter's maximum, which drops NaN as a GPU's does"""
invalid = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
CONVOLUTIONS = ("conv_stem", "conv_block")
"""Triton's products may take in a neighbour with weight 0, or the padding, and NaN with them"""


def _inputs(case: Case, **sizes: int) -> dict[str, Tensor]:
    inputs = case.inputs({**case.sizes, **sizes})
    if "found_inf" in inputs:
        inputs["found_inf"].zero_()
    return inputs


def _assert_same(case: Case, backend: str, inputs: dict[str, Tensor], what: str, **changes: object) -> None:
    ours, eager = (outcome(case, name, inputs, **changes) for name in (backend, "eager"))
    if isinstance(ours, str) or isinstance(eager, str):
        assert ours == eager, what
        assert re.match(r"(Value|Type)Error: [\w.]+: \w", ours), ours
        return
    for key in ours:  # flex has no gradients
        torch.testing.assert_close(ours[key], eager[key], rtol=1e-4, atol=1e-4, msg=lambda m: f"{what}: {m}")


@all_nan
@invalid
@everywhere
def test_nan_shows(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    clean = _inputs(case)
    for place, x in enumerate(clean.values()):
        if not x.is_floating_point():
            continue
        given = dict(clean)
        given[list(clean)[place]] = dirty = x.clone()
        dirty.view(-1)[x.numel() // 2] = float("nan")
        what = f"NaN in {list(clean)[place]}"
        eager, ours = case.run("eager", given), case.run(backend, given)
        for key, result in ours.items():
            hidden = eager[key].isnan() & ~result.isnan()
            assert not hidden.any(), f"{what}: {key} hides it"
            # the loss takes predictions as target + error
            more = case.stem in CONVOLUTIONS or (case.stem == "loss" and what == "NaN in target")
            assert more or torch.equal(result.isnan(), eager[key].isnan()), f"{what}: {key}"


@all_nan
@invalid
@pytest.mark.parametrize("backend", ["eager", "triton", "sdpa"])
@pytest.mark.parametrize("tokens", [5, 6])
def test_what_nan_does_to_attention(
    tokens: int, backend: str, monkeypatch: pytest.MonkeyPatch, triton_device: torch.device
) -> None:
    monkeypatch.setitem(_attention.SHORT, 4, 5)  # Triton has kernels for short sequences, and others
    case = CASES["attention, positions"]
    for given, heads in (("alibi_scale", [1]), ("qkv", [0])):
        inputs = _inputs(case, S=tokens)
        nan = torch.tensor(float("nan"))
        if given == "qkv":
            inputs["qkv"][0, 2, 0, 0] = nan  # one query of one head
        else:
            inputs["alibi_scale"][1] = nan  # of which the maximum with 0 is NaN
        results = {key: x.isnan() for key, x in case.run(backend, inputs).items()}
        out = results["0"].view(2, tokens, 2, 4)
        assert out[0, 2, heads].all() and not out[:, :, [1 - heads[0]]].any()
        assert out[:, :, heads].all() == (given == "alibi_scale")
        assert results["dqkv"][0, :, 1:, heads].all() and results["dalibi_scale"][heads].all()
        assert not results["dqkv"][:, :, :, [1 - heads[0]]].any()


@pytest.mark.parametrize(("name", "backend"), [(name, b) for name, b in PAIRS if "lengths" in name])
def test_nan_in_padding_is_ignored(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = _inputs(case)
    padded = torch.zeros_like(inputs["qkv"], dtype=torch.bool)
    padded[2, 1:, (1 if "attend" in name else 0) :] = True  # the third sequence has 1 token
    dirty = {"qkv": inputs["qkv"].masked_fill(padded, float("nan"))}
    for who in (backend, "eager"):
        clean, result = case.run(who, inputs), case.run(who, dirty)
        for key in clean:
            torch.testing.assert_close(result[key], clean[key], rtol=0, atol=0)


@everywhere
def test_sizes_of_zero(name: str, backend: str) -> None:
    case = CASES[name]
    for size in case.sizes:
        _assert_same(case, backend, _inputs(case, **{size: 0}), f"{size} = 0")


@everywhere
def test_scalars(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = _inputs(case)
    for given in inputs:
        if case.stem == "adamw_ema" and given in ("p", "g"):
            continue  # torch itself refuses a gradient of another shape
        _assert_same(case, backend, {**inputs, given: inputs[given].new_ones(())}, f"{given} 0-dim")


@pytest.mark.parametrize("name", ["ema_update_", "AdamWEMA", "grad_norm"])
def test_parameters_may_be_scalars(name: str) -> None:
    case = CASES[name]
    inputs = {key: x.new_ones(()) * (i + 1) for i, (key, x) in enumerate(_inputs(case).items())}
    for backend in case.backends():
        _assert_same(case, backend, inputs, "scalars")


@pytest.mark.parametrize(("name", "backend"), [(name, b) for name, b in PAIRS if CASES[name].seeded])
def test_seeds(name: str, backend: str) -> None:
    case = CASES[name]
    inputs = _inputs(case)
    for seed in (-(2**63), 2**64 - 1, 2**64, -(2**63) - 1, 1.5, "x"):
        _assert_same(case, backend, inputs, f"seed {seed}", seed=seed)
    signed, unsigned = (case.run("eager", inputs, seed=seed) for seed in (-5, 2**64 - 5))
    for key, result in signed.items():
        assert torch.equal(result, unsigned[key])  # the same 64 bits
    assert "seed must have 64 bits, -2^63 to 2^64 - 1, got" in str(outcome(case, backend, inputs, seed=2**64))
    assert "seed must be an int or a 0-dim int64 tensor" in str(outcome(case, backend, inputs, seed=1.5))


@pytest.mark.parametrize("how", ["made", "given", "looked at"])
@pytest.mark.parametrize("name", ["gather_tokens", "scatter_tokens", "loss", "conv_block_1d, plan"])
def test_plans_made_under_inference_mode(name: str, how: str) -> None:
    case = CASES[name]
    expected = d2vkern.random_mask(torch.arange(2), 3, 7, prob=0.4)
    plan = expected
    with torch.inference_mode():
        if how == "made":
            plan = d2vkern.random_mask(torch.arange(2), 3, 7, prob=0.4)
        elif how == "given":
            lengths = torch.full((6,), 7, dtype=torch.int32)
            plan = d2vkern.MaskPlan.from_mask(expected.mask.clone(), 3, lengths)
        assert plan.ids_mask.shape == (6, 3)
    inputs = _inputs(case)
    for backend in ("eager", *(case.backends() if how == "made" else ())):
        results, wanted = (case.run(backend, inputs, plan=p) for p in (plan, expected))
        for key in wanted:
            assert torch.equal(results[key], wanted[key])
