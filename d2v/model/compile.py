"""torch.compile of a model, region by region: the front end, every block, the decoder.

Blocks share one graph, so it takes the time of one block to compile them all, and the phases between regions
keep their names in profilers. What lies between (masks, targets, loss, optimizer) is few and large kernels.
"""

import torch
from torch import nn

from ..config.fronts import LogMelFront
from . import Pretraining
from .blocks import Block


def compile_regions(model: Pretraining) -> None:
    """Compile the model's regions in place; its parameters and their names stay as they are.

    Speech comes in many lengths: after the first two a region is compiled once more, for all lengths.
    """
    dynamic = None if model.modality == "audio" else False

    def compiled(owner: nn.Module, method: str) -> None:
        setattr(owner, method, torch.compile(getattr(owner, method), fullgraph=True, dynamic=dynamic))

    for block in (module for module in model.modules() if isinstance(module, Block)):
        compiled(block, "forward")
        compiled(block, "halves")
    if not isinstance(model.cfg.front, LogMelFront):  # Inductor has no code for its complex spectra
        compiled(model.encoder, "local")
    compiled(model.encoder, "contextualise")
    if model.encoder.decoder is not None:
        compiled(model.encoder.decoder, "forward")
