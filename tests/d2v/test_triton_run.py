"""Whole training steps on the Triton backends, in Triton's interpreter where there is no GPU."""

import dataclasses

import pytest
import torch

from d2v.config.run import Config
from d2v.data.types import Batch
from d2v.train.pretrain_step import Trainer
from d2vkern._backend import STEMS
from d2vkern.testing import backend_spy
from tests.d2v.tiny_models import make_source
from tests.d2v.tiny_runs import tiny

STEPS = 2


def curve(cfg: Config, device: torch.device, backend: str) -> tuple[list[float], set[tuple[str, str]]]:
    train = dataclasses.replace(cfg.train, backend=backend)
    trainer = Trainer(dataclasses.replace(cfg, train=train), device)
    losses = []
    with backend_spy() as calls:
        for step in range(1, STEPS + 1):
            source = make_source(cfg.model.modality, 2)
            outcome = trainer.step(step, [Batch(source, torch.arange(2) + step, 0).to(device)])
            losses.append(float(sum(outcome.losses.values())))
    return losses, set(calls)


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["image", "audio", "text"])
def test_triton_gives_eagers_loss_curve(modality: str, triton_device: torch.device) -> None:
    cfg = tiny(modality, optim={"lr": 1e-2, "warmup": 0, "eps": 1e-3})
    # dropout without a seed draws from torch's generator, each backend in its own way
    model = dataclasses.replace(
        cfg.model,
        prenet_dropout=0.0,
        encoder_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        post_mlp_dropout=0.0,
        layerdrop=0.0,
        mask=dataclasses.replace(cfg.model.mask, clones=2),
        decoder=dataclasses.replace(cfg.model.decoder, input_dropout=0.0),
    )
    cfg = dataclasses.replace(cfg, model=model)
    expected, _ = curve(cfg, triton_device, "eager")
    losses, calls = curve(cfg, triton_device, ",".join(f"{stem}=triton" for stem in STEMS))
    # the optimizer averages the teacher; the tiny speech model has no convolutional stem
    assert {stem for stem, name in calls if name == "triton"} == set(STEMS) - {"ema", "conv_stem"}
    assert losses == pytest.approx(expected, rel=2e-5)
    assert len(set(losses)) == STEPS
