"""What fits on a GPU: the largest micro-batch of each published preset in 8, 12, 24 and 80 GiB.

    python -m benchmarks.fits

From the model alone, on the meta device: 20 bytes for each parameter (weights, gradient, two moments, the
teacher's share) and the activations that `d2v.train.micro_batch` estimates, in the share of the rest that a
run gives them. The estimate keeps attention's logits, which fused attention does not, so more may fit:
`train.micro_batch` says how many to try.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from benchmarks.report import markdown
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


if __name__ == "__main__":
    print("\n".join(fits_table()))
