"""The model's convolutions on Triton: whole stacks beside eager, and the original's recorded numbers.

Everything but conv_block is eager, so that a difference is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

import d2vkern  # noqa: E402
from d2v.model import Data2Vec  # noqa: E402
from d2v.model.decoder import Decoder  # noqa: E402
from d2vkern.testing import backend_spy  # noqa: E402
from tests.d2v.golden_cases import load  # noqa: E402
from tests.d2v.test_parity import ACTIVATION, GRADIENT, LOOSE_GRADIENTS, LOSS, assert_near  # noqa: E402
from tests.d2v.tiny_models import TOKENS  # noqa: E402
from tests.d2v.tiny_runs import tiny  # noqa: E402

N, CLONES = 2, 2


def _values(run: Callable[[], Tensor], x: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Output and gradients of the input and of every parameter that got one."""
    module.zero_grad()
    out = run()
    (dx,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
    out.square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": dx, **{name: g.clone() for name, g in gradients.items()}}


def assert_same(run: Callable[[], Tensor], x: Tensor, module: nn.Module, layers: int) -> None:
    """Eager and Triton agree on everything, and each layer ran on Triton."""
    with d2vkern.use_backend("eager"):
        expected = _values(run, x, module)
    with d2vkern.use_backend("eager", conv_block="triton"), backend_spy() as calls:
        actual = _values(run, x, module)
    assert calls.count(("conv_block", "triton")) == layers
    assert actual.keys() == expected.keys() and len(actual) >= 2 + 2 * layers
    for name, value in actual.items():
        assert_near(value.cpu(), expected[name].cpu(), 2e-5, name)


@pytest.mark.parametrize("modality", TOKENS)
@pytest.mark.parametrize("full", [True, False], ids=["every place", "masked places"])
def test_decoder(modality: str, full: bool, triton_device: torch.device) -> None:
    cfg = tiny(modality).model
    decoder = Decoder(cfg).to(triton_device)
    tokens = TOKENS[modality]
    mask = torch.rand(N, tokens).argsort(1) < tokens // 2
    plan = d2vkern.MaskPlan.from_mask(mask, 1).to(triton_device)
    x = torch.randn(N, tokens, cfg.dim, device=triton_device, requires_grad=True)
    assert_same(lambda: decoder.full(x) if full else decoder(x, plan), x, decoder, cfg.decoder.layers)


@pytest.mark.parametrize("masked", [True, False], ids=["plan", "no plan"])
def test_positional_encoder(masked: bool, triton_device: torch.device) -> None:
    cfg = tiny("audio").model
    torch.manual_seed(0)
    encoder = Data2Vec(cfg).modality_encoders["AUDIO"].to(triton_device)
    plan = d2vkern.MaskPlan.from_mask(torch.rand(N * CLONES, 21).argsort(1) < 10, CLONES).to(triton_device)
    x = torch.randn(N, 21, cfg.dim, device=triton_device, requires_grad=True)

    def run() -> Tensor:
        out = encoder._conv_positions(x, plan if masked else None)
        assert out is not None
        return out

    assert_same(run, x, encoder, cfg.front.position_layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image_base", "audio_base", "text_base"])
def test_the_originals_numbers(name: str, goldens: Path) -> None:
    """Predictions, loss and the convolutions' gradients; of audio's nine layers of 16 groups, which are slow
    in the interpreter, the forward alone."""
    case = load(goldens, name)
    model = case.model()
    backward = name != "audio_base"
    with d2vkern.use_backend("eager", conv_block="triton"), backend_spy() as calls:
        with torch.set_grad_enabled(backward):
            out = model(**case.inputs())
        if backward:
            out.loss.backward()
    assert ("conv_block", "triton") in calls and ("conv_block", "eager") not in calls
    assert_near(out.decoded, case.tensors["decoder.out"], ACTIVATION)
    assert out.loss.item() == pytest.approx(case.facts["scalars"]["total_loss"], rel=LOSS)
    if not backward:
        return
    named = dict(model.named_parameters())
    recorded = {key.removeprefix("grad."): x for key, x in case.tensors.items() if key.startswith("grad.")}
    for parameter, expected in recorded.items():
        grad = named[parameter].grad
        assert grad is not None
        assert_near(grad, expected, LOOSE_GRADIENTS.get(parameter, GRADIENT), parameter)
    assert sum(".decoder.blocks." in parameter for parameter in recorded) >= 4
