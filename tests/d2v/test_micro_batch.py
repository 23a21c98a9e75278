"""From the global batch to micro-batches: what fits in memory, and how it is said."""

import dataclasses

import pytest
import torch

from d2v.config.presets import PRESETS, preset
from d2v.train.micro_batch import activation_bytes, equation, micro_batch
from tests.d2v.tiny_runs import tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("batch", "micro", "text"),
    [
        (32, 32, "batch 32 images = 1 process x 1 micro-batch of 32"),
        (32, 8, "batch 32 images = 1 process x 4 micro-batches of 8"),
        (32, 12, "batch 32 images = 1 process x 3 micro-batches of at most 12"),
    ],
)
def test_the_batch_is_printed_as_an_equation(batch, micro, text):
    assert equation(tiny("image", batch=batch), micro) == text


def test_the_micro_batch_follows_the_free_memory(monkeypatch):
    cfg = preset("image_base")
    one = activation_bytes(cfg)
    for room, expected in ((1_000 * one, 256), (100 * one, 86), (3 * one, 3), (0, 1)):
        monkeypatch.setattr(
            "d2v.train.micro_batch.free_bytes", lambda device, room=room: int(room / 0.6) + 1_000
        )
        assert micro_batch(cfg, CPU, 0) == expected
    chosen = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, micro_batch=7))
    assert micro_batch(chosen, CPU, 0) == 7


def test_a_speech_micro_batch_holds_the_longest_utterance(monkeypatch):
    monkeypatch.setattr("d2v.train.micro_batch.free_bytes", lambda device: 0)
    assert 20 <= micro_batch(preset("audio_base"), CPU, 0) <= 40


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("tiny")])
def test_tiny_presets_take_the_whole_batch(name, monkeypatch):
    monkeypatch.setattr("d2v.train.micro_batch.free_bytes", lambda device: 4 << 30)
    cfg = preset(name)
    assert micro_batch(cfg, CPU, 1_000_000) == cfg.data.batch


def test_the_estimate_of_activations_is_of_the_right_size():
    """image_base, one image in fp32: a step of the original peaked at 3,107 MiB on two CPU cores."""
    cfg = preset("image_base")
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, precision="fp32"))
    assert 0.5e9 < activation_bytes(cfg) < 3.2e9
