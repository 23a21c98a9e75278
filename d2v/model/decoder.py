"""The convolutional decoder: kept tokens and noise on the whole grid -> predictions of the teacher's targets.

Only masked places enter the loss, so the projection (and the last layer, where it is a dense 1-D convolution)
is computed there alone; `full` gives all places.
Source: fairseq examples/data2vec/models/modalities/modules.py, Decoder1d and Decoder2d.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import d2vkern

from ..config.fronts import ImageFront
from ..config.model import ModelConfig
from .blocks import linear


def masked_rows(x: Tensor, plan: d2vkern.MaskPlan) -> Tensor:
    """[N,T,D] -> [N,T-K,D] at the masked places, ascending."""
    rows = plan.ids_mask
    index = rows + x.shape[1] * torch.arange(x.shape[0], dtype=rows.dtype, device=rows.device).unsqueeze(1)
    return x.flatten(0, 1).index_select(0, index.flatten()).view(*rows.shape, x.shape[2])


class Decoder(nn.Module):
    """`layers` convolution blocks of width `dim`, then one or two linear layers back to the model's width."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        dec = cfg.decoder
        self.settings = dec
        self.grid = cfg.front.grid if isinstance(cfg.front, ImageFront) else None
        conv = nn.Conv1d if self.grid is None else nn.Conv2d
        widths = [cfg.dim] + [dec.dim] * dec.layers
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(conv(widths[i], dec.dim, dec.kernel, groups=dec.groups))
                for i in range(dec.layers)
            )
        )
        layers: list[nn.Module] = []
        width = dec.dim
        for _ in range(dec.projection_layers - 1):
            hidden = int(dec.dim * dec.projection_ratio)
            layers += [nn.Linear(width, hidden), nn.GELU()]
            width = hidden
        self.proj: nn.Linear | nn.Sequential
        self.proj = (
            nn.Linear(width, cfg.dim) if not layers else nn.Sequential(*layers, nn.Linear(width, cfg.dim))
        )

    def forward(self, x_NTD: Tensor, plan: d2vkern.MaskPlan) -> Tensor:
        """Predictions at the masked places, ascending: [N,T-K,D]."""
        if self.settings.groups == 1 and self.grid is None:
            return self._project(self._convolve(x_NTD, plan.ids_mask))
        return self._project(masked_rows(self._convolve(x_NTD), plan))

    def full(self, x_NTD: Tensor) -> Tensor:
        """Predictions at every place: [N,T,D]."""
        return self._project(self._convolve(x_NTD))

    def _convolve(self, x_NTD: Tensor, rows: Tensor | None = None) -> Tensor:
        dec = self.settings
        n, t, _ = x_NTD.shape
        x = x_NTD if self.grid is None else x_NTD.view(n, *self.grid, -1)
        for i, layer in enumerate(self.blocks):
            conv = layer.get_submodule("0")
            assert isinstance(conv, (nn.Conv1d, nn.Conv2d))
            residual = dec.residual and conv.in_channels == conv.out_channels
            if self.grid is not None:
                x = d2vkern.conv_block_2d(x, conv.weight, conv.bias, dec.groups, residual)
            else:
                wanted = rows if i == dec.layers - 1 else None
                x = d2vkern.conv_block_1d(x, conv.weight, conv.bias, dec.groups, residual, rows=wanted)
        return x.flatten(1, 2) if self.grid is not None else x

    def _project(self, x: Tensor) -> Tensor:
        if isinstance(self.proj, nn.Linear):
            return linear(x, self.proj)
        if len(self.proj) == 3:
            first, last = self.proj[0], self.proj[2]
            assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
            return d2vkern.gelu_mlp(x, first.weight, first.bias, last.weight, last.bias)
        for layer in self.proj:
            x = linear(x, layer) if isinstance(layer, nn.Linear) else F.gelu(x)
        return x
