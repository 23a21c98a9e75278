"""What fits on a GPU: the largest micro-batch of each published preset in 8, 12, 24 and 80 GiB.

    python -m benchmarks.fits

From the model alone, on the meta device: 20 bytes for each parameter (weights, gradient, two moments, the
teacher's share) and the activations that `d2v.train.micro_batch` estimates, in the share of the rest that a
run gives them. The estimate keeps attention's logits, which fused attention does not, so more may fit:
`train.micro_batch` says how many to try. `checked_table` holds the computed memory against the peaks that
bench_step.py measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.report import NOT_MEASURED, Results, markdown, percent, short
from benchmarks.step_table import step_rows
from d2v.config.presets import preset
from d2v.config.run import Config
from d2v.model import build_model
from d2v.train.micro_batch import SHARE, UNITS, activation_bytes

PRESETS = (
    "image_base", "image_large", "image_huge14", "audio_base", "audio_large", "text_base", "text_large",
)  # fmt: skip
GIB = (8, 12, 24, 80)
TRAINED, TEACHER = 16, 4
"""bytes of a trained parameter (weight, gradient, two moments in fp32), and of one of the teacher"""


def fixed_bytes(cfg: Config) -> tuple[int, int]:
    """Trained parameters, and the bytes that weights, gradients, moments and teacher take."""
    with torch.device("meta"):
        model = build_model(cfg.model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    others = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return trained, TRAINED * trained + TEACHER * others


def fitting(cfg: Config, fixed: int, gib: int) -> int:
    """Units of `data.batch` that fit in one micro-batch, 0 for none."""
    room = SHARE * (gib * 2**30 - fixed)
    units = max(0, int(room // activation_bytes(cfg)))
    return 0 if cfg.model.modality == "audio" and units < cfg.data.max_seconds else units


def fits_table(presets: Sequence[str] = PRESETS) -> list[str]:
    """A line a preset: trained parameters, fixed memory, and what fits in bf16."""
    lines = []
    for name in presets:
        cfg = preset(name)
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, precision="bf16"))
        trained, fixed = fixed_bytes(cfg)
        found = [fitting(cfg, fixed, gib) for gib in GIB]
        lines.append([name, f"{trained / 1e6:,.0f} M", f"{fixed / 2**30:.1f}", UNITS[cfg.model.modality],
                      *(f"{units:,}" if units else "none" for units in found)])  # fmt: skip
    head = ["preset, bf16", "parameters", "fixed GiB", "unit", *(f"{gib} GiB" for gib in GIB)]
    return markdown(head, lines, 1)


def computed_bytes(name: str, precision: Any, shape: Sequence[int]) -> int:
    """Weights, gradients, moments, teacher and activations of a step whose source has this shape."""
    cfg = preset(name)
    units, data = float(shape[0]), cfg.data
    if cfg.model.modality == "audio":
        seconds = shape[1] / cfg.model.front.sample_rate  # type: ignore[union-attr]
        units, data = units * seconds, dataclasses.replace(data, max_seconds=seconds)
    elif cfg.model.modality == "text":
        data = dataclasses.replace(data, block=shape[1])
    train = dataclasses.replace(cfg.train, precision=precision)
    cfg = dataclasses.replace(cfg, data=data, train=train)
    return fixed_bytes(cfg)[1] + round(units * activation_bytes(cfg))


def checked_table(files: Sequence[Results]) -> list[str]:
    """Computed beside measured peak memory of every step that was measured with its shape."""
    lines = []
    for one in files:
        machine = str(one.facts.get("gpu") or one.facts.get("cpu"))
        for row in step_rows(one.data):
            if row.get("status", "ok") != "ok" or not row.get("shape") or row.get("variant") == "compile":
                continue
            computed = computed_bytes(row["preset"], row["precision"], row["shape"]) / 2**20
            shape = "x".join(map(str, row["shape"]))
            lines.append([
                machine, row["preset"], row["precision"], row.get("variant", "eager"), shape, short(computed),
                short(row["peak_MiB"]), percent(computed / row["peak_MiB"]),
            ])  # fmt: skip
    head = ["machine", "preset", "precision", "backend", "input", "computed MiB", "measured MiB",
            "of measured"]  # fmt: skip
    return markdown(head, lines, 5) if lines else [f"{NOT_MEASURED.capitalize()}."]


if __name__ == "__main__":
    print("\n".join(fits_table()))
